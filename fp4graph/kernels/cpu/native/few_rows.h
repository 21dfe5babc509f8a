// Few rows of activations: a panel's codes are decoded once and used for each row.
#pragma once
#include "call.h"
#include "scratch.h"

namespace {

// Rows in float32: one row at a time in streams of panels, or up to V::kFewRows.
template <Isa V, class Format>
class FewRows : Call<V, Format> {
 public:
  using Call<V, Format>::Call;

  bool run() {
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
    parallel_ranges(panels_, tasks_, [&](int64_t begin, int64_t end) {
      for_weights(begin, end, [&](const Fp4Linear& call, int64_t p0, int64_t p1) {
        if (call_.M == 1) return one_row(call, p0, p1, x, unit[0]);
        for (int64_t p = p0; p < p1; p++) {
          float sums[V::kFewRows * kPanelRows];
          exact_rows(panel(call, p), x, sums);
          for (int64_t m = 0; m < call_.M; m++) store(sums + m * kPanelRows, call, m, p, unit[m]);
        }
      });
    });
    return true;
  }

 private:
  using Base = Call<V, Format>;
  using Base::call_, Base::groups_, Base::Kp_, Base::panels_, Base::panel_bytes_, Base::tasks_;
  using Base::panel, Base::row, Base::store, Base::for_columns, Base::for_weights;

  template <int kM = V::kFewRows>
  FP4_INLINE void exact_rows(const uint8_t* tiles, const float* x, float* sums) const {
    if constexpr (kM > 2) {
      if (call_.M < kM) return exact_rows<kM - 1>(tiles, x, sums);
    }
    for_columns(tiles, [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
      gemv_rows<V, Format, kM>(tile, x + g * Format::kGroup, Kp_, groups, sums, accumulate);
    });
  }

  void one_row(const Fp4Linear& call, int64_t p0, int64_t p1, const float* x, float unit) const {
    this->in_streams(
        call, p0, p1,
        [&](auto panels, const uint8_t* tile, int64_t g, int64_t groups, float* sums, bool more) {
          gemv<V, Format, panels>(tile, panel_bytes_, x + g * Format::kGroup, groups, sums, more);
        },
        [&](int64_t p, const float* sums) { store(sums, call, 0, p, unit); });
  }
};

// bfloat16 activations as they are, in pairs, where the instruction set multiplies such.
template <Isa V, class Format>
class PairRows : Call<V, Format> {
 public:
  using Call<V, Format>::Call;

  bool run() {
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
    parallel_ranges(panels_, tasks_, [&](int64_t begin, int64_t end) {
      for_weights(begin, end, [&](const Fp4Linear& call, int64_t p0, int64_t p1) {
        for (int64_t p = p0; p < p1; p++) {
          float sums[V::kFewPairRows * kPanelRows];
          run_pairs(panel(call, p), x, sums);
          for (int64_t m = 0; m < call_.M; m++) store(sums + m * kPanelRows, call, m, p, unit[m]);
        }
      });
    });
    return true;
  }

 private:
  using Base = Call<V, Format>;
  using Base::call_, Base::groups_, Base::Kp_, Base::panels_, Base::panel_bytes_, Base::tasks_;
  using Base::panel, Base::row, Base::store, Base::for_columns, Base::for_weights;

  template <int kM = V::kFewPairRows>
  FP4_INLINE void run_pairs(const uint8_t* tiles, const uint16_t* x, float* sums) const {
    if constexpr (kM > 1) {
      if (call_.M < kM) return run_pairs<kM - 1>(tiles, x, sums);
    }
    for_columns(tiles, [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
      gemv_pairs<V, Format, kM>(tile, x + g * Format::kGroup, Kp_, groups, sums, accumulate);
    });
  }
};

}  // namespace
