// Rows of activations as integers: in digits, which is exact, or rounded to 8 bits.
#pragma once
#include <atomic>

#include "few_rows.h"
#include "integers.h"
#include "many_rows.h"

namespace {

// One row in streams of panels: `use(panel, sums)`.
template <Isa V, class Format>
struct IntegerCall : Call<V, Format> {
  using Call<V, Format>::Call;

  template <int kCount, class Use>
  void one_int_row(const Fp4Linear& call, int64_t p0, int64_t p1, const IntRows<Format, kCount>& in,
                   Use use) const {
    this->in_streams(
        call, p0, p1,
        [&](auto panels, const uint8_t* tile, int64_t g, int64_t groups, float* sums, bool more) {
          int_rows<V, Format, 1, panels>(tile, this->panel_bytes_, in.from(0, g), groups, sums,
                                         more);
        },
        use);
  }
};

// A row of bfloat16 or float16: in digits, and what they do not hold column by column.
template <Isa V, class Format>
class DigitRow : IntegerCall<V, Format> {
 public:
  using IntegerCall<V, Format>::IntegerCall;

  bool run() {
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
    if (amax >= 0x7F800000) return FewRows<V, Format>(calls_, count_).run();
    const int64_t count = split_row<V, Format>(x, groups_, digits, scale, offset, apart, most);
    if (count > most) return FewRows<V, Format>(calls_, count_).run();
    parallel_ranges(panels_, tasks_, [&](int64_t begin, int64_t end) {
      const IntRows<Format, kDigits> in{digits, scale, offset, groups_};
      for_weights(begin, end, [&](const Fp4Linear& call, int64_t p0, int64_t p1) {
        this->one_int_row(call, p0, p1, in, [&](int64_t p, float* sums) {
          for (int64_t i = 0; i < count; i++) add_column<V, Format>(panel(call, p), apart[i], sums);
          store(sums, call, 0, p, unit);
        });
      });
    });
    return true;
  }

 private:
  using Base = IntegerCall<V, Format>;
  using Base::call_, Base::calls_, Base::count_, Base::groups_, Base::Kp_, Base::panels_;
  using Base::tasks_, Base::panel, Base::row, Base::store, Base::for_weights;
};

// Rows rounded to 8 bits, an approximation; with Inf or NaN in any of them the exact way.
template <Isa V, class Format>
class Int8Rows : IntegerCall<V, Format> {
 public:
  using IntegerCall<V, Format>::IntegerCall;

  bool run() {
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
    if (odd) {
      return call_.M <= V::kFewRows ? FewRows<V, Format>(calls_, count_).run()
                                    : ManyRows<V, Format, V>(calls_, count_).run();
    }
    const IntRows<Format, 1> in{rounded, scale, offset, groups_};
    parallel_ranges(panels_, tasks_, [&](int64_t begin, int64_t end) {
      for_weights(begin, end, [&](const Fp4Linear& call, int64_t p0, int64_t p1) {
        if (call_.M == 1) {
          return this->one_int_row(
              call, p0, p1, in, [&](int64_t p, float* sums) { store(sums, call, 0, p, unit[0]); });
        }
        for (int64_t p = p0; p < p1; p++) some_rows(call, p, in, unit);
      });
    });
    return true;
  }

 private:
  using Base = IntegerCall<V, Format>;
  using Base::call_, Base::calls_, Base::count_, Base::groups_, Base::Kp_, Base::panels_;
  using Base::tasks_, Base::panel, Base::row, Base::store, Base::for_columns, Base::for_weights;

  void some_rows(const Fp4Linear& call, int64_t p, const IntRows<Format, 1>& in,
                 const float* unit) const {
    for (int64_t m = 0; m < call_.M;) {
      float sums[4 * kPanelRows];
      const int64_t left = call_.M - m;
      const int64_t taken = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for_columns(panel(call, p), [&](const uint8_t* tile, int64_t g, int64_t groups, bool more) {
        const auto run = taken == 4   ? int_rows<V, Format, 4, 1, 1>
                         : taken == 2 ? int_rows<V, Format, 2, 1, 1>
                                      : int_rows<V, Format, 1, 1, 1>;
        run(tile, 0, in.from(m, g), groups, sums, more);
      });
      for (int64_t i = 0; i < taken; i++) store(sums + i * kPanelRows, call, m + i, p, unit[m + i]);
      m += taken;
    }
  }
};

}  // namespace
