// Rows of activations and results: from and to the caller's dtype, and into the kernels' orders.
#pragma once
#include <cmath>
#include <cstring>

#include "fp4.h"
#include "layout.h"

namespace {

FP4_INLINE float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

FP4_INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

FP4_INLINE int64_t dtype_bytes(int dtype) { return dtype == FP4_FLOAT32 ? 4 : 2; }

FP4_INLINE const uint8_t* at(const void* base, int64_t bytes) {
  return static_cast<const uint8_t*>(base) + bytes;
}
FP4_INLINE uint8_t* at(void* base, int64_t bytes) { return static_cast<uint8_t*>(base) + bytes; }

// Unaligned source, any dtype, to float32.
template <class V>
FP4_INLINE void to_floats(const void* source, int dtype, int64_t n, float* out) {
  if (dtype == FP4_FLOAT32) {
    memcpy(out, source, n * 4);
  } else if (dtype == FP4_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) {
      uint16_t half;
      memcpy(&half, at(source, i * 2), 2);
      out[i] = float_of(static_cast<uint32_t>(half) << 16);
    }
  } else {
    V::from_float16(static_cast<const uint8_t*>(source), n, out);
  }
}

FP4_INLINE uint16_t bfloat16_of(float f) {  // to nearest even; NaN stays NaN
  const uint32_t bits = bits_of(f);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

FP4_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7FFFu;
  float magnitude = float_of(rest << 13) * 0x1p112f;  // exact, subnormals too
  if (rest >= 0x7C00) magnitude = float_of(0x7F800000 | rest << 13);
  return float_of(sign | bits_of(magnitude));
}

FP4_INLINE uint16_t half_of(float f) {  // to nearest even
  const uint32_t sign = bits_of(f) >> 16 & 0x8000, rest = bits_of(f) & 0x7FFFFFFF;
  uint32_t half;
  if (rest > 0x7F800000) {
    half = 0x7E00;
  } else if (rest >= 0x477FF000) {  // rounds past 65504
    half = 0x7C00;
  } else if (rest < 0x38800000) {  // subnormal: the sum's mantissa is the rounded result
    half = bits_of(float_of(rest) + .5f) - bits_of(.5f);
  } else {
    half = (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

template <class V>
FP4_INLINE void from_floats(const float* in, int dtype, int64_t n, void* out) {
  if (dtype == FP4_FLOAT32) {
    memcpy(out, in, n * 4);
  } else if (dtype == FP4_BFLOAT16) {
    for (int64_t i = 0; i < n; i++) {
      const uint16_t half = bfloat16_of(in[i]);
      memcpy(at(out, i * 2), &half, 2);
    }
  } else {
    V::to_float16(in, n, static_cast<uint8_t*>(out));
  }
}

FP4_INLINE uint32_t amax_bits(const float* x, int64_t n) {  // NaN above Inf above all else
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    amax = magnitude > amax ? magnitude : amax;
  }
  return amax;
}

// The power of two that a row is divided by so that no sum of ours leaves float32's range where
// the dequantised weight's would not, nor products of pairs, which flush, lose bits: 1 for rows
// with ordinary values, and for Inf and NaN.
template <bool kFlushes>
FP4_INLINE float row_unit(uint32_t amax) {
  constexpr int kLeast = 127 - (kFlushes ? 20 : 89), kMost = 127 + 89;
  const int exponent = static_cast<int>(amax >> 23);
  const bool ordinary = (exponent >= kLeast && exponent <= kMost) || amax == 0 || exponent == 255;
  const int within = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  return ordinary ? 1.f : float_of(static_cast<uint32_t>(within) << 23);
}

// A row of float32 into V's order of columns; n is a multiple of 8.
template <class V>
FP4_INLINE void reorder(const float* in, int64_t n, float* out) {
  if constexpr (V::kStep == 2) {
    for (int64_t k = 0; k < n; k += 4) {
      const float second = in[k + 1], third = in[k + 2];
      out[k] = in[k];
      out[k + 1] = third;
      out[k + 2] = second;
      out[k + 3] = in[k + 3];
    }
  } else if (in != out) {
    memcpy(out, in, n * sizeof(float));
  }
}

// Read a row: [K] -> out [Kp], padded with zeros and divided by the unit that is returned.
template <class V, bool kFlushes = V::kFlushes>
FP4_INLINE float load_row(const void* source, int dtype, int64_t K, int64_t Kp, float* out,
                          uint32_t* amax) {
  to_floats<V>(source, dtype, K, out);
  memset(out + K, 0, (Kp - K) * 4);
  *amax = amax_bits(out, K);
  const float unit = row_unit<kFlushes>(*amax);
  if (unit != 1.f) {
    const float inverse = 1.f / unit;
    for (int64_t k = 0; k < K; k++) out[k] *= inverse;
  }
  return unit;
}

template <class V>
FP4_INLINE void store_rows(const float* sums, const Fp4Linear& call, int64_t m, int64_t row,
                           int64_t rows, float unit) {
  float out[kPanelRows];
  float bias[kPanelRows];
  const float* row_scale = call.row_scale + row;
  if (unit == 1.f) {
    for (int64_t i = 0; i < rows; i++) out[i] = sums[i] * row_scale[i];
  } else {
    for (int64_t i = 0; i < rows; i++) out[i] = sums[i] * row_scale[i] * unit;
  }
  const int64_t size = dtype_bytes(call.dtype);
  if (call.bias != nullptr) {
    to_floats<V>(at(call.bias, row * size), call.dtype, rows, bias);
    for (int64_t i = 0; i < rows; i++) out[i] += bias[i];
  }
  from_floats<V>(out, call.dtype, rows, at(call.y, (m * call.N + row) * size));
}

// A result: sums of a panel's rows -> y = sum * row_scale * unit + bias, in the caller's dtype.
template <class V>
FP4_INLINE void store_row(const float* sums, const Fp4Linear& call, int64_t m, int64_t row,
                          int64_t rows, float unit) {
  if (rows == kPanelRows) {  // nearly always, and without a loop
    store_rows<V>(sums, call, m, row, kPanelRows, unit);
  } else {
    store_rows<V>(sums, call, m, row, rows, unit);
  }
}

}  // namespace
