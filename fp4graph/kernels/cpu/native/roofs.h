// What no kernel can beat on this machine, for benchmarks.
#pragma once
#include <atomic>

#include "panel.h"
#include "parallel.h"

namespace {

// Reads every byte: the roof of whatever streams weights.
template <class V>
uint64_t read_roof(const uint8_t* bytes, int64_t count) {
  using Loaded = decltype(V::load_codes(bytes));
  constexpr int kLoads = 8, kBytes = sizeof(Loaded);
  constexpr int64_t kStep = kLoads * kBytes;
  std::atomic<uint64_t> total{0};
  parallel_ranges(count / kStep, fp4_threads(), [&](int64_t begin, int64_t end) {
    Loaded seen[kLoads] = {};
    const auto read = [&](int64_t i) FP4_LAMBDA {
      FP4_UNROLL for (int j = 0; j < kLoads; j++) {
        __builtin_prefetch(bytes + i * kStep + j * kBytes + 4096 / V::kStreams);
        seen[j] |= V::load_codes(bytes + i * kStep + j * kBytes);
      }
    };
    const int64_t each = (end - begin) / V::kStreams;
    for (int64_t i = begin; i < begin + each; i++) {
      FP4_UNROLL for (int stream = 0; stream < V::kStreams; stream++) read(i + stream * each);
    }
    for (int64_t i = begin + each * V::kStreams; i < end; i++) read(i);
    FP4_UNROLL for (int j = 1; j < kLoads; j++) seen[0] |= seen[j];
    uint64_t words[kBytes / 8];
    memcpy(words, &seen[0], kBytes);
    total |= words[0];
  });
  return total;
}

// Independent FMAs on as many accumulators as hide their latency: the roof of `multiply`.
template <class V>
double fma_roof(int64_t iterations) {
  constexpr int kChains = 10;
  std::atomic<int64_t> done{0};
  parallel(fp4_threads(), [&](int64_t) {
    typename V::F acc[kChains];
    FP4_UNROLL for (int i = 0; i < kChains; i++) acc[i] = V::splat(i * .1f);
    const auto a = V::splat(.999f), b = V::splat(.001f);
    for (int64_t n = 0; n < iterations; n++) {
      FP4_UNROLL for (int i = 0; i < kChains; i++) {
        acc[i] = V::fma(acc[i], a, b);
        asm volatile("" : "+" FP4_VECTOR_REGISTER(acc[i]));
      }
    }
    done += 2 * kChains * V::kRows * iterations;
  });
  return static_cast<double>(done);
}

}  // namespace
