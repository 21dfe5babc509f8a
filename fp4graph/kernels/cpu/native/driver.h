// One call: which loops for how many rows, who does which panels, and where scratch lies.
#pragma once
#include <atomic>

#include "integers.h"
#include "many_rows.h"

namespace {

template <class V, class Format>
class Linear : Call<V, Format> {
 public:
  explicit Linear(const Fp4Linear& call) : Call<V, Format>(call) {}

  bool run() {
    if (panels_ == 0) return true;
    if (call_.mode == FP4_INT8 && !exact_is_faster()) return int8_rows();
    if constexpr (V::kSplits) {
      if (call_.M == 1 && call_.dtype != FP4_FLOAT32) return row_in_digits();
    }
    if constexpr (V::kFewPairRows > 0) {
      if (call_.dtype == FP4_BFLOAT16) {
        return call_.M <= V::kFewPairRows ? pair_rows() : many_rows<typename V::Pairs>();
      }
    }
    if (call_.M <= V::kFewRows) return few_rows();
    if constexpr (V::kTiles) {
      if (call_.dtype == FP4_BFLOAT16) return many_rows<typename V::template Tiles<1>>();
      if (call_.dtype == FP4_FLOAT16) return many_rows<typename V::template Tiles<2>>();
      // few outputs do not repay that activations are packed, which V reads where they are
      if (call_.N >= V::kTiledOutputs) return many_rows<typename V::template Tiles<3>>();
    }
    return many_rows<V>();
  }

 private:
  using Base = Call<V, Format>;
  using Base::call_, Base::groups_, Base::Kp_, Base::panels_, Base::panel_bytes_, Base::tasks_;
  using Base::panel, Base::row, Base::store;

  // Than activations of 8 bits, which tiles do not multiply here.
  bool exact_is_faster() const {
    if constexpr (V::kTiles) {
      if (call_.dtype != FP4_FLOAT32) return call_.M >= 16;
      return call_.M >= 32 && call_.N >= V::kTiledOutputs;
    }
    return false;
  }

  template <class W>
  bool many_rows() const {
    return ManyRows<V, Format, W>(call_).run();
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
    if constexpr (kM > 2) {
      if (call_.M < kM) return exact_rows<kM - 1>(tiles, x, sums);
    }
    for_columns(tiles, [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
      gemv_rows<V, Format, kM>(tile, x + g * Format::kGroup, Kp_, groups, sums, accumulate);
    });
  }

  // Panels [p, end), kPanels of them at a time: `multiply(count, tiles, first group, groups, sums,
  // accumulate)` leaves a row's sums, which go to `use(panel, sums)`.
  template <int kPanels = V::kStreams, class Multiply, class Use>
  FP4_INLINE void in_streams(int64_t p, int64_t end, Multiply multiply, Use use) const {
    for (; p + kPanels <= end; p += kPanels) {
      float sums[kPanels * kPanelRows];
      if constexpr (kPanels > 1) {  // else what follows is where loops fetch from
        for (int i = 0; i < kPanels; i++) {
          const uint8_t* next = panel(p + kPanels + i);
          FP4_UNROLL for (int line = 0; line < kAhead<kPanels>; line += 64) {
            __builtin_prefetch(next + line, 0, 2);
          }
        }
      }
      for_columns(panel(p), [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
        multiply(std::integral_constant<int, kPanels>(), tile, g, groups, sums, accumulate);
      });
      for (int i = 0; i < kPanels; i++) use(p + i, sums + i * kPanelRows);
    }
    if constexpr (kPanels > 1) in_streams<kPanels / 2>(p, end, multiply, use);
  }

  void one_row(int64_t p0, int64_t p1, const float* x, float unit) const {
    in_streams(
        p0, p1,
        [&](auto panels, const uint8_t* tile, int64_t g, int64_t groups, float* sums, bool more) {
          gemv<V, Format, panels>(tile, panel_bytes_, x + g * Format::kGroup, groups, sums, more);
        },
        [&](int64_t p, const float* sums) { store(sums, 0, p, unit); });
  }

  template <int kCount, class Use>
  void one_int_row(int64_t p0, int64_t p1, const IntRows<Format, kCount>& in, Use use) const {
    in_streams(
        p0, p1,
        [&](auto panels, const uint8_t* tile, int64_t g, int64_t groups, float* sums, bool more) {
          int_rows<V, Format, 1, panels>(tile, panel_bytes_, in.from(0, g), groups, sums, more);
        },
        use);
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
      if (call_.M == 1) return one_row(p0, p1, x, unit[0]);
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
      unit[m] = load_row<V, true>(row(m), call_.dtype, call_.K, Kp_, wide, &amax);
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

  // A row of bfloat16 or float16: in digits, and what they do not hold column by column.
  bool row_in_digits() {
    const int64_t most = Kp_ / 64;
    float *x, *scale;
    int8_t* digits;
    int32_t* offset;
    Apart* apart;
    if (!carve(shared_scratch, [&](Carver& c) {
          x = c.take<float>(Kp_);
          scale = c.take<float>(groups_);
          digits = c.take<int8_t>(Kp_ * kDigits);
          offset = c.take<int32_t>(groups_ * kDigits);
          apart = c.take<Apart>(most);
        })) {
      return false;
    }
    uint32_t amax;
    const float unit = load_row<V>(row(0), call_.dtype, call_.K, Kp_, x, &amax);
    if (amax >= 0x7F800000) return few_rows();
    const int64_t count = split_row<V, Format>(x, groups_, digits, scale, offset, apart, most);
    if (count > most) return few_rows();
    parallel_ranges(panels_, tasks_, [&](int64_t p0, int64_t p1) {
      const IntRows<Format, kDigits> in{digits, scale, offset, groups_};
      one_int_row(p0, p1, in, [&](int64_t p, float* sums) {
        for (int64_t i = 0; i < count; i++) add_column<V, Format>(panel(p), apart[i], sums);
        store(sums, 0, p, unit);
      });
    });
    return true;
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
    const IntRows<Format, 1> in{rounded, scale, offset, groups_};
    parallel_ranges(panels_, tasks_, [&](int64_t p0, int64_t p1) {
      if (call_.M == 1) {
        return one_int_row(p0, p1, in, [&](int64_t p, float* sums) { store(sums, 0, p, unit[0]); });
      }
      for (int64_t p = p0; p < p1; p++) {
        for (int64_t m = 0; m < call_.M;) {
          float sums[4 * kPanelRows];
          const int64_t left = call_.M - m;
          const int64_t taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          for_columns(panel(p), [&](const uint8_t* tile, int64_t g, int64_t groups, bool more) {
            const auto run = taken == 4   ? int_rows<V, Format, 4, 1, 1>
                             : taken == 2 ? int_rows<V, Format, 2, 1, 1>
                                          : int_rows<V, Format, 1, 1, 1>;
            run(tile, 0, in.from(m, g), groups, sums, more);
          });
          for (int64_t i = 0; i < taken; i++) store(sums + i * kPanelRows, m + i, p, unit[m + i]);
          m += taken;
        }
      }
    });
    return true;
  }
};

// So many rows at a time that scratch stays small; weights are decoded anew for fewer.
constexpr int64_t kCallRows = 2048;

template <class V>
bool linear(const Fp4Linear& call) {
  for (int64_t m = 0; m < call.M; m += kCallRows) {
    Fp4Linear part = call;
    part.x = at(call.x, m * call.K * dtype_bytes(call.dtype));
    part.y = at(call.y, m * call.N * dtype_bytes(call.dtype));
    part.M = min64(kCallRows, call.M - m);
    const bool nvfp4 = call.format == FP4_NVFP4;
    if (!(nvfp4 ? Linear<V, Nvfp4>(part).run() : Linear<V, Mxfp4>(part).run())) return false;
  }
  return true;
}

}  // namespace
