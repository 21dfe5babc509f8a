// A plain read of memory by torch's threads: what no kernel that reads weights once can beat.
// Compiled for the machine that it runs on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

using torch::stable::Tensor;

namespace {

typedef uint64_t Word __attribute__((vector_size(64)));
constexpr int kLoads = 4;
constexpr int64_t kStep = kLoads * sizeof(Word);

// Each thread reads `streams` places at a time: some prefetchers stop at pages, and the other
// streams go on meanwhile.
Tensor plain_read(const Tensor& bytes, int64_t streams) {
  const auto* base = static_cast<const uint8_t*>(bytes.const_data_ptr());
  std::atomic<uint64_t> total{0};
  torch::stable::parallel_for(0, bytes.numel() / kStep, 256, [&](int64_t begin, int64_t end) {
    Word seen[kLoads] = {};
    const auto step = [&](int64_t i) {
      for (int j = 0; j < kLoads; j++) {
        const uint8_t* at = base + i * kStep + j * sizeof(Word);
        __builtin_prefetch(at + 4096 / streams);
        Word word;
        memcpy(&word, at, sizeof word);
        seen[j] |= word;
      }
    };
    const int64_t each = (end - begin) / streams;
    for (int64_t i = begin; i < begin + each; i++) {
      for (int64_t stream = 0; stream < streams; stream++) step(i + stream * each);
    }
    for (int64_t i = begin + each * streams; i < end; i++) step(i);
    for (int j = 1; j < kLoads; j++) seen[0] |= seen[j];
    total |= seen[0][0];
  });
  Tensor out = torch::stable::new_empty(bytes, {}, torch::headeronly::ScalarType::Long);
  *static_cast<int64_t*>(out.mutable_data_ptr()) = static_cast<int64_t>(total.load());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(fp4graph_bench, m) { m.def("read(Tensor bytes, int streams) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fp4graph_bench, CPU, m) { m.impl("read", TORCH_BOX(&plain_read)); }
