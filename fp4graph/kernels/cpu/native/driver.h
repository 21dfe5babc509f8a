// One call: which loops for how many rows, who does which panels, and where scratch lies.
#pragma once
#include <atomic>

#include "panel.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace {

template <class V, class Format>
class Linear {
 public:
  explicit Linear(const Fp4Linear& call)
      : call_(call),
        groups_((call.K + Format::kGroup - 1) / Format::kGroup),
        Kp_(groups_ * Format::kGroup),
        panels_((call.N + kPanelRows - 1) / kPanelRows),
        panel_bytes_(groups_ * kTileBytes<Format>) {
    // A team costs microseconds: give each thread 64 KB of weights at least.
    const int64_t work = panels_ * panel_bytes_ * max64(1, call.M / 4);
    tasks_ = max64(1, min64(fp4_threads(), work / (64 << 10)));
  }

  bool run() {
    if (call_.M == 0 || panels_ == 0) return true;
    if (call_.mode == FP4_INT8) return int8_rows();
    if constexpr (V::kFewPairRows > 0) {
      if (call_.dtype == FP4_BFLOAT16) {
        return call_.M <= V::kFewPairRows ? pair_rows() : many_rows<typename V::Pairs>();
      }
    }
    return call_.M <= V::kFewRows ? few_rows() : many_rows<V>();
  }

 private:
  const void* row(int64_t m) const { return at(call_.x, m * call_.K * dtype_bytes(call_.dtype)); }
  const uint8_t* panel(int64_t p) const { return call_.tiles + p * panel_bytes_; }

  void store(const float* sums, int64_t m, int64_t p, float unit) const {
    store_row<V>(sums, call_, m, p * kPanelRows, min64(kPanelRows, call_.N - p * kPanelRows), unit);
  }

  // A row of panels' tiles in pieces of kColumns: `use(tiles, first group, groups, accumulate)`.
  template <class Use>
  FP4_INLINE void for_columns(const uint8_t* tiles, Use use) const {
    constexpr int64_t kStride = kColumns / Format::kGroup;
    if (groups_ == 0) use(tiles, 0, 0, false);
    for (int64_t g = 0; g < groups_; g += kStride) {
      use(tiles + g * kTileBytes<Format>, g, min64(kStride, groups_ - g), g > 0);
    }
  }

  template <int kM = V::kFewRows>
  FP4_INLINE void exact_rows(const uint8_t* tiles, const float* x, float* sums) const {
    if constexpr (kM > 1) {
      if (call_.M < kM) return exact_rows<kM - 1>(tiles, x, sums);
    }
    for_columns(tiles, [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
      const float* columns = x + g * Format::kGroup;
      if constexpr (kM == 1) {
        gemv<V, Format>(tile, columns, groups, sums, accumulate);
      } else {
        gemv_rows<V, Format, kM>(tile, columns, Kp_, groups, sums, accumulate);
      }
    });
  }

  bool few_rows() {
    float *x, *unit;
    if (!carve(shared_scratch, [&](Carver& c) {
          x = c.take<float>(call_.M * Kp_);
          unit = c.take<float>(call_.M);
        })) {
      return false;
    }
    for (int64_t m = 0; m < call_.M; m++) {
      uint32_t amax;
      unit[m] = load_row<V>(row(m), call_.dtype, call_.K, Kp_, x + m * Kp_, &amax);
      V::reorder_row(x + m * Kp_, Kp_, x + m * Kp_);
    }
    parallel_ranges(panels_, tasks_, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        float sums[V::kFewRows * kPanelRows];
        exact_rows(panel(p), x, sums);
        for (int64_t m = 0; m < call_.M; m++) store(sums + m * kPanelRows, m, p, unit[m]);
      }
    });
    return true;
  }

  // bfloat16 activations as they are, in pairs, where the instruction set multiplies such.
  bool pair_rows() {
    float *wide, *unit;
    uint16_t* x;
    if (!carve(shared_scratch, [&](Carver& c) {
          wide = c.take<float>(Kp_);
          x = c.take<uint16_t>(call_.M * Kp_);
          unit = c.take<float>(call_.M);
        })) {
      return false;
    }
    for (int64_t m = 0; m < call_.M; m++) {
      uint32_t amax;
      unit[m] = load_row<V>(row(m), call_.dtype, call_.K, Kp_, wide, &amax);
      V::Pairs::reorder_row(wide, Kp_, reinterpret_cast<float*>(x + m * Kp_));
    }
    parallel_ranges(panels_, tasks_, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        float sums[V::kFewPairRows * kPanelRows];
        run_pairs(panel(p), x, sums);
        for (int64_t m = 0; m < call_.M; m++) store(sums + m * kPanelRows, m, p, unit[m]);
      }
    });
    return true;
  }

  template <int kM = V::kFewPairRows>
  FP4_INLINE void run_pairs(const uint8_t* tiles, const uint16_t* x, float* sums) const {
    if constexpr (kM > 1) {
      if (call_.M < kM) return run_pairs<kM - 1>(tiles, x, sums);
    }
    for_columns(tiles, [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
      gemv_pairs<V, Format, kM>(tile, x + g * Format::kGroup, Kp_, groups, sums, accumulate);
    });
  }

  bool int8_rows() {
    float *scale, *unit;
    int8_t* rounded;
    int32_t* offset;
    if (!carve(shared_scratch, [&](Carver& c) {
          rounded = c.take<int8_t>(call_.M * Kp_);
          scale = c.take<float>(call_.M * groups_);
          offset = c.take<int32_t>(call_.M * groups_);
          unit = c.take<float>(call_.M);
        })) {
      return false;
    }
    std::atomic<bool> failed{false};
    std::atomic<bool> odd{false};  // a row with Inf or NaN, which integers cannot carry
    parallel_ranges(call_.M, tasks_, [&](int64_t m0, int64_t m1) {
      auto* x = reinterpret_cast<float*>(own_scratch.get(max64(Kp_, 1) * 4));
      if (x == nullptr) failed = true;
      for (int64_t m = m0; m < m1 && x != nullptr; m++) {
        uint32_t amax;
        unit[m] = load_row<V>(row(m), call_.dtype, call_.K, Kp_, x, &amax);
        if (amax >= 0x7F800000) odd = true;
        round_row<V, Format>(x, groups_, rounded + m * Kp_, scale + m * groups_,
                             offset + m * groups_);
      }
    });
    if (failed) return false;
    if (odd) return call_.M <= V::kFewRows ? few_rows() : many_rows<V>();
    parallel_ranges(panels_, tasks_, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        for (int64_t m = 0; m < call_.M;) {
          float sums[4 * kPanelRows];
          const int64_t left = call_.M - m;
          const int64_t taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          for_columns(panel(p), [&](const uint8_t* tile, int64_t g, int64_t groups, bool more) {
            const int64_t first = m * groups_ + g;
            const IntRows in{rounded + first * Format::kGroup, scale + first, offset + first,
                             groups_};
            const auto run = taken == 4   ? int_rows<V, Format, 4>
                             : taken == 2 ? int_rows<V, Format, 2>
                                          : int_rows<V, Format, 1>;
            run(tile, in, groups, sums, more);
          });
          for (int64_t i = 0; i < taken; i++) store(sums + i * kPanelRows, m + i, p, unit[m + i]);
          m += taken;
        }
      }
    });
    return true;
  }

  // Many rows, by the vector type W: V itself, or V's bfloat16 pairs. Activations are packed
  // [blocks of kDepth columns][rows][kSegment]; a thread takes runs of panels, decodes kTilePanels
  // of them by kDepth columns and multiplies all row blocks of the moment with these, whose
  // activations and sums stay in L2.
  static constexpr int64_t kRowBlocks = 144 / V::kBlockRows;
  static constexpr int64_t kRun = 8;

  // Where the segment of a row that starts with column k0 lies.
  template <class W>
  float* segment(float* x, int64_t k0, int64_t m) const {
    return x + (k0 / W::kDepth * call_.M + m) * kSegment<W>;
  }

  template <class W>
  bool many_rows() {
    const int64_t blocks = (call_.M + W::kBlockRows - 1) / W::kBlockRows;
    const auto first_row = [&](int64_t block) { return call_.M * block / blocks; };
    float *x, *unit;
    if (!carve(shared_scratch, [&](Carver& c) {
          x = c.take<float>(round_up(Kp_, W::kDepth) / W::kDepth * call_.M * kSegment<W>);
          unit = c.take<float>(call_.M);
        })) {
      return false;
    }
    std::atomic<bool> failed{false};
    parallel_ranges(call_.M, tasks_, [&](int64_t begin, int64_t end) {
      auto* wide = reinterpret_cast<float*>(own_scratch.get(max64(Kp_, 1) * sizeof(float)));
      if (wide == nullptr) {
        failed = true;
        return;
      }
      for (int64_t m = begin; m < end; m++) {
        uint32_t amax;
        unit[m] = load_row<V>(row(m), call_.dtype, call_.K, Kp_, wide, &amax);
        for (int64_t k0 = 0; k0 < Kp_; k0 += W::kDepth) {
          W::reorder_row(wide + k0, min64(W::kDepth, Kp_ - k0), segment<W>(x, k0, m));
        }
      }
    });
    int64_t run = kRun;  // short enough that no thread waits long for another
    while (run > W::kTilePanels && panels_ / run < 8 * tasks_) run /= 2;
    const int64_t runs = (panels_ + run - 1) / run;
    for (int64_t b0 = 0; b0 < blocks && !failed; b0 += kRowBlocks) {
      const int64_t b1 = min64(blocks, b0 + kRowBlocks);
      std::atomic<int64_t> next{0};  // runs go to whoever is free
      parallel(tasks_, [&](int64_t) {
        float *w, *sums;
        if (!carve(own_scratch, [&](Carver& c) {
              w = c.take<float>(W::kTilePanels * kPanelRows * W::kDepth);
              sums = c.take<float>((run + W::kTilePanels) * kRowBlocks * W::kBlockRows * kPanelRows);
            })) {
          failed = true;
          return;
        }
        for (int64_t r = next++; r < runs; r = next++) {
          multiply_run<W>(x, unit, w, sums, r * run, min64(panels_, (r + 1) * run), b0, b1,
                          first_row);
        }
      });
    }
    return !failed;
  }

  // Panels p0 to p1 with row blocks b0 to b1. The last tile may reach beyond the last panel: it
  // takes the last one again, and what comes of it is not stored.
  template <class W, class FirstRow>
  FP4_INLINE void multiply_run(float* x, const float* unit, float* w, float* sums,
                               int64_t p0, int64_t p1, int64_t b0, int64_t b1,
                               FirstRow first_row) const {
    const int64_t m0 = first_row(b0), rows = first_row(b1) - m0, stride = rows * kPanelRows;
    if (Kp_ == 0) memset(sums, 0, (p1 - p0) * stride * sizeof(float));
    for (int64_t k0 = 0; k0 < Kp_; k0 += W::kDepth) {
      const int64_t columns = min64(W::kDepth, Kp_ - k0), steps = columns / W::kStep;
      const int64_t tile = k0 / Format::kGroup * kTileBytes<Format>;
      for (int64_t p = p0; p < p1; p += W::kTilePanels) {
        const int64_t next_panel = p + 1 < panels_ ? panel_bytes_ : 0;
        decode_panels<W, Format>(panel(p) + tile, next_panel, columns / Format::kGroup, w);
        float* c = sums + (p - p0) * stride;
        for (int64_t b = b0; b < b1; b++) {
          const int64_t m = first_row(b);
          const float* block = segment<W>(x, k0, m);
          for (int r = 0; r < kRowVectors<W>; r++) {
            constexpr int kWidth = W::kRows * W::kVectors * W::kTilePanels;
            multiply_block<W>(first_row(b + 1) - m, w + r * steps * kWidth, block, steps,
                              c + (m - m0) * kPanelRows + r * W::kRows, stride, k0 > 0);
          }
        }
      }
    }
    for (int64_t m = 0; m < rows; m++) {
      for (int64_t p = p0; p < p1; p++) {
        store(sums + (p - p0) * stride + m * kPanelRows, m0 + m, p, unit[m0 + m]);
      }
    }
  }

  template <class W, int kM = W::kBlockRows>
  static FP4_INLINE void multiply_block(int64_t rows, const float* w, const float* x,
                                        int64_t steps, float* c, int64_t stride,
                                        bool accumulate) {
    if constexpr (kM > 0) {
      if (rows == kM) {
        multiply<W, kM>(w, x, steps, c, stride, accumulate);
      } else {
        multiply_block<W, kM - 1>(rows, w, x, steps, c, stride, accumulate);
      }
    }
  }

  const Fp4Linear& call_;
  int64_t groups_, Kp_, panels_, panel_bytes_;
  int64_t tasks_ = 1;
};

template <class V>
bool linear(const Fp4Linear& call) {
  return call.format == FP4_NVFP4 ? Linear<V, Nvfp4>(call).run() : Linear<V, Mxfp4>(call).run();
}

}  // namespace
