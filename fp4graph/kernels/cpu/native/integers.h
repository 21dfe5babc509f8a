// Activations as integers, which VNNI and its like multiply by weights: rounded to 8 bits, an
// approximation; or in digits of 8 bits, which hold bfloat16 and float16 exactly.
#pragma once
#include "panel.h"
#include "rows.h"

namespace {

// Rows of kCount digits, the highest first: value = scale * sum of 2^(8 * place) * digit.
template <class Format, int kCount>
struct IntRows {
  const int8_t* x;        // [rows][groups][kCount][kGroup]
  const float* scale;     // [rows][groups]
  const int32_t* offset;  // [rows][groups]: V::kOffset times the sum of value / scale
  int64_t groups;         // of a whole row

  IntRows from(int64_t row, int64_t group) const {
    const int64_t at = row * groups + group;
    return {x + at * kCount * Format::kGroup, scale + at, offset + at, groups};
  }
};

constexpr float kCodeUnit = .5f;  // the tables hold twice a code's value
constexpr int kDigits = 3;        // of an exact activation

// Round a row to 8 bits, a scale a group. x: [Kp] float32, finite and ordinary.
template <Isa V, class Format>
FP4_INLINE void round_row(const float* x, int64_t groups, int8_t* out, float* scale,
                          int32_t* offset) {
  constexpr int kGroup = Format::kGroup;
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * kGroup;
    const float amax = float_of(amax_bits(v, kGroup));
    const float inverse = amax > 1e-36f ? 127.f / amax : 0.f;
    int8_t* bytes = out + g * kGroup;
    int32_t sum = 0;
    for (int i = 0; i < kGroup; i++) {
      bytes[i] = static_cast<int8_t>(__builtin_nearbyintf(v[i] * inverse));
      sum += bytes[i];
    }
    scale[g] = amax / 127.f * kCodeUnit;
    offset[g] = V::kOffset * sum;
  }
}

// An activation that is too small beside its group's largest for digits to hold it.
struct Apart {
  int64_t column;
  float x;
};

// Split a row into three digits, a power of two a group; what they do not hold goes to `apart`.
//
//   x      = unit * n, n a whole number of 22 bits and a sign
//   n      = 2^16 d0 + 2^8 d1 + d2, digits of -128 to 127
//   out    d0 of a group's columns | d1 of them | d2 of them | the next group
//
// Returns how many that are, or `most` + 1 where there are more. x: [Kp] float32, finite and
// ordinary.
template <Isa V, class Format>
FP4_INLINE int64_t split_row(const float* x, int64_t groups, int8_t* out, float* scale,
                             int32_t* offset, Apart* apart, int64_t most) {
  constexpr int kGroup = Format::kGroup, kBits = 22, kLeast = 127 - 80;
  int64_t count = 0;
  for (int64_t g = 0; g < groups; g++) {
    const float* v = x + g * kGroup;
    const uint32_t exponent = amax_bits(v, kGroup) >> 23;
    const bool held = exponent >= kLeast;  // else the scale itself would be too small
    const float unit = held ? float_of((exponent - kBits + 1) << 23) : 0.f;
    const float inverse = held ? float_of((254 + kBits - 1 - exponent) << 23) : 0.f;
    int32_t sum = 0;
    for (int at = 0; at < kGroup; at += 16) {
      int8_t* digits = out + g * kGroup * kDigits + at;
      for (uint32_t lost = V::split(v + at, inverse, unit, digits, kGroup, sum); lost != 0;
           lost &= lost - 1) {
        if (count == most) return most + 1;
        const int i = at + __builtin_ctz(lost);
        apart[count++] = {g * kGroup + i, v[i]};
      }
    }
    offset[g] = V::kOffset * sum;
    scale[g] = unit * kCodeUnit;
  }
  return count;
}

// y [kPanels, kM, 16] (+)= groups of kPanels panels, `stride` bytes apart, times kM rows.
template <Isa V, class Format, int kM, int kPanels, int kCount>
FP4_HOT void int_rows(const uint8_t* tiles, int64_t stride, const IntRows<Format, kCount>& in,
                      int64_t groups, float* y, bool accumulate) {
  constexpr int kGroup = Format::kGroup;
  const typename V::IntTables tables;
  typename V::F acc[kPanels][kM][kRowVectors<V>];
  FP4_UNROLL for (int p = 0; p < kPanels; p++) {
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++)
        acc[p][m][r] = V::zero();
    }
  }
  for (int64_t g = 0; g < groups; g++) {
    FP4_UNROLL for (int p = 0; p < kPanels; p++) {
      const uint8_t* tile = tiles + p * stride;
      prefetch_tile<V, Format, kPanels>(tile);
      FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
        typename V::I codes[kGroup / 4];
        FP4_UNROLL for (int oct = 0; oct < kGroup / 8; oct++) {
          const auto raw = V::load_codes(tile + r * V::kRows * 4 + oct * kOctBytes);
          codes[2 * oct] = V::int_decode(tables, raw, 0);
          codes[2 * oct + 1] = V::int_decode(tables, raw, 1);
        }
        const auto scale = V::template scales<Format>(tile + kScaleOffset<Format> + r * V::kRows);
        FP4_UNROLL for (int m = 0; m < kM; m++) {
          const int64_t at = m * in.groups + g;
          const int8_t* x = in.x + at * kCount * kGroup;
          auto sum = V::dot(codes, x, kCount == 1 ? in.offset[at] : 0);
          if constexpr (kCount > 1) {
            FP4_UNROLL for (int digit = 1; digit < kCount; digit++) {
              const int32_t offset = digit == kCount - 1 ? in.offset[at] : 0;
              sum = V::next_digit(sum, V::dot(codes, x + digit * kGroup, offset));
            }
          }
          const auto unscaled = V::mul(V::to_float(sum), V::splat(in.scale[at]));
          acc[p][m][r] = V::fma(unscaled, scale, acc[p][m][r]);
        }
      }
    }
    tiles += kTileBytes<Format>;
  }
  FP4_UNROLL for (int p = 0; p < kPanels; p++) {
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
        put<V>(y + (p * kM + m) * kPanelRows + r * V::kRows, acc[p][m][r], accumulate);
      }
    }
  }
}

// y [16] += a panel's column times its activation.
template <Isa V, class Format>
FP4_INLINE void add_column(const uint8_t* panel, const Apart& apart, float* y) {
  static_assert(V::kVectors == 1 && kRowVectors<V> == 1);
  const uint8_t* tile = panel + apart.column / Format::kGroup * kTileBytes<Format>;
  const int64_t column = apart.column % Format::kGroup;
  typename V::F d[4][1];
  V::decode(typename V::Tables(), load_oct<V>(tile + column / 8 * kOctBytes), column / 4 % 2, d);
  const auto product = V::mul(d[column % 4][0], V::splat(apart.x));
  const auto scale = V::template scales<Format>(tile + kScaleOffset<Format>);
  V::store(y, V::fma(product, scale, V::load(y)));
}

}  // namespace
