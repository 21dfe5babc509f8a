// Many rows and one weight, by the vector type W: V itself, or pairs of bfloat16, V's or those of
// tiles. A thread takes runs of panels, decodes kTilePanels of them by kDepth columns and
// multiplies all row blocks of the moment with these, whose activations and sums stay in L2.
// Activations are read where they are, if they are ordinary float32 and rows end with a group; else
// they are packed [blocks of kDepth columns][rows][kSegment].
#pragma once
#include <atomic>
#include <type_traits>

#include "call.h"
#include "scratch.h"

namespace {

template <Isa V, class Format, Vectors W>
class ManyRows : Call<V, Format> {
 public:
  using Call<V, Format>::Call;

  bool run() {
    if constexpr (kPlain) {
      const bool aligned = reinterpret_cast<uintptr_t>(call_.x) % sizeof(float) == 0;
      if (call_.dtype == FP4_FLOAT32 && call_.K == Kp_ && aligned) {
        const auto* x = static_cast<const float*>(call_.x);
        if (!multiply_all({x, call_.K, W::kDepth, nullptr})) return false;
        if (ordinary_) return true;  // else what is in y may be out of range
      }
    }
    const int64_t rows = Multiplier<W>::kEvenBlocks ? call_.M : round_up(call_.M, W::kBlockRows);
    float *x, *unit;
    if (!carve(shared_scratch, [&](Carver& c) {
          x = c.take<float>(round_up(Kp_, W::kDepth) / W::kDepth * rows * kSegment<W>);
          unit = c.take<float>(call_.M);
        })) {
      return false;
    }
    const Activations packed{x, kSegment<W>, rows * kSegment<W>, unit};
    std::atomic<bool> failed{false};
    parallel_ranges(call_.M, tasks_, [&](int64_t begin, int64_t end) {
      auto* wide = reinterpret_cast<float*>(own_scratch.get(max64(Kp_, 1) * sizeof(float)));
      if (wide == nullptr) {
        failed = true;
        return;
      }
      for (int64_t m = begin; m < end; m++) {
        uint32_t amax;
        unit[m] = load_row<V, W::kFlushes>(row(m), call_.dtype, call_.K, Kp_, wide, &amax);
        for (int64_t k0 = 0; k0 < Kp_; k0 += W::kDepth) {
          const int64_t columns = min64(W::kDepth, Kp_ - k0);
          float* segment = x + k0 / W::kDepth * packed.segment;
          if constexpr (kPlain) {
            memcpy(segment + m * packed.stride, wide + k0, columns * sizeof(float));
          } else {
            W::pack_row(wide + k0, columns, segment, m);
          }
        }
      }
    });
    if (failed || !multiply_all(packed)) return false;
    if constexpr (!kPlain) {
      if (!exact_) return ManyRows<V, Format, V>(&call_, 1).run();
    }
    return true;
  }

 private:
  using Base = Call<V, Format>;
  using Base::call_, Base::groups_, Base::Kp_, Base::panels_, Base::panel_bytes_, Base::tasks_;
  using Base::panel, Base::row, Base::store;

  static constexpr bool kPlain = std::is_same_v<V, W>;  // activations lie as float32, in order
  static constexpr int64_t kRowBlocks = Multiplier<W>::kPassRows / W::kBlockRows;
  static constexpr int64_t kRun = 8;

  struct Activations {
    const float* x;
    int64_t stride;   // from row to row
    int64_t segment;  // from one block of kDepth columns to the next
    const float* unit;
  };

  bool multiply_all(const Activations& in) {
    const int64_t blocks = (call_.M + W::kBlockRows - 1) / W::kBlockRows;
    const auto first_row = [&](int64_t block) {
      return Multiplier<W>::kEvenBlocks ? call_.M * block / blocks
                                        : min64(call_.M, block * W::kBlockRows);
    };
    const int64_t passes = (blocks + kRowBlocks - 1) / kRowBlocks;
    int64_t run = kRun;  // short enough that no thread waits long for another
    while (run > W::kTilePanels && panels_ * passes < 4 * tasks_ * run) run /= 2;
    const int64_t runs = (panels_ + run - 1) / run;
    std::atomic<bool> failed{false};
    std::atomic<int64_t> next{0};  // runs go to whoever is free
    parallel(tasks_, [&](int64_t) {
      float *w, *sums;
      uint32_t* amax;
      if (!carve(own_scratch, [&](Carver& c) {
            w = c.take<float>(W::kTilePanels * kPanelRows * W::kDepth);
            amax = c.take<uint32_t>(kRowBlocks * W::kBlockRows);
            sums = c.take<float>((run + W::kTilePanels) * kRowBlocks * W::kBlockRows * kPanelRows);
          })) {
        failed = true;
        return;
      }
      Multiplier<W> multiplier;
      for (int64_t i = next++; i < passes * runs; i = next++) {
        const int64_t p0 = i % runs * run, pass = i / runs;
        multiply_run(in, multiplier, w, sums, amax, p0, min64(panels_, p0 + run),
                     blocks * pass / passes, blocks * (pass + 1) / passes, first_row);
      }
    });
    return !failed;
  }

  // Panels p0 to p1 with row blocks b0 to b1:
  //
  //          kDepth columns           panels p0 .. p1
  //        +---+---+---+            +----+----+----+
  //   rows | x | . | . |  times     | w  | .. | .. |  kTilePanels of them decoded at a time
  //        +---+---+---+            +----+----+----+
  //   sums [panel][rows][16] += x w, block by block of columns; stored after the last.
  //
  // The last tile may reach beyond the last panel: it takes the last one again, and what comes of
  // it is not stored.
  template <class FirstRow>
  FP4_INLINE void multiply_run(const Activations& in, Multiplier<W>& multiplier, float* w,
                               float* sums, uint32_t* amax, int64_t p0, int64_t p1, int64_t b0,
                               int64_t b1, FirstRow first_row) {
    const int64_t m0 = first_row(b0), rows = first_row(b1) - m0, stride = rows * kPanelRows;
    if (Kp_ == 0) memset(sums, 0, (p1 - p0) * stride * sizeof(float));
    const bool looks = in.unit == nullptr && p0 == 0;  // at activations that are about to be read
    if (looks) memset(amax, 0, rows * sizeof *amax);
    for (int64_t k0 = 0; k0 < Kp_; k0 += W::kDepth) {
      const int64_t columns = min64(W::kDepth, Kp_ - k0), steps = columns / W::kStep;
      const int64_t tile = k0 / Format::kGroup * kTileBytes<Format>;
      for (int64_t m = 0; looks && m < rows; m++) {
        const uint32_t found = amax_bits(in.x + (m0 + m) * in.stride + k0, columns);
        amax[m] = found > amax[m] ? found : amax[m];
      }
      for (int64_t p = p0; p < p1; p += W::kTilePanels) {
        const int64_t next_panel = p + 1 < panels_ ? panel_bytes_ : 0;
        if (!decode_panels<W, Format>(panel(call_, p) + tile, next_panel, columns / Format::kGroup,
                                      w)) {
          exact_ = false;
        }
        float* c = sums + (p - p0) * stride;
        for (int64_t b = b0; b < b1; b++) {
          const int64_t m = first_row(b);
          const float* block = in.x + m * in.stride + k0 / W::kDepth * in.segment;
          for (int r = 0; r < kRowVectors<W>; r++) {
            constexpr int kWidth = W::kRows * W::kVectors * W::kTilePanels;
            multiplier(first_row(b + 1) - m, w + r * steps * kWidth, block, in.stride, steps,
                       c + (m - m0) * kPanelRows + r * W::kRows, stride, k0 > 0);
          }
        }
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      if (looks && row_unit<false>(amax[m]) != 1.f) ordinary_ = false;
      for (int64_t p = p0; p < p1; p++) {
        const float unit = in.unit == nullptr ? 1.f : in.unit[m0 + m];
        store(sums + (p - p0) * stride + m * kPanelRows, call_, m0 + m, p, unit);
      }
    }
  }

  std::atomic<bool> ordinary_{true};  // whether no row needs a unit
  std::atomic<bool> exact_{true};     // whether pairs hold the weights and their products
};

}  // namespace
