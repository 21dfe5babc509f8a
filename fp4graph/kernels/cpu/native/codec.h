// Rounding to nearest, bit for bit what fp4graph/formats computes: plain C++, vectorised by the
// compiler for each instruction set. Needs -ffp-contract=off.
#pragma once
#include <atomic>
#include <vector>

#include "rotate.h"

namespace {

constexpr float kE2M1Max = 6.f;
constexpr float kE4M3Max = 448.f;

FP4_INLINE float decode_e4m3(uint32_t code) {
  const uint32_t exponent = (code >> 3) & 15, mantissa = code & 7;
  if (exponent == 0) return mantissa * 0x1p-9f;
  return float_of((exponent + 120) << 23 | mantissa << 20);
}

FP4_INLINE uint8_t encode_e4m3(float x) {  // positive
  const float magnitude = x < kE4M3Max ? x : kE4M3Max;
  if (magnitude < 0x1p-6f) return static_cast<uint8_t>(__builtin_nearbyintf(magnitude * 0x1p9f));
  const uint32_t bits = bits_of(magnitude);
  return static_cast<uint8_t>(((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3));
}

FP4_INLINE float decode_e8m0(uint32_t code) {
  return float_of(code == 0 ? 0x00400000 : code << 23);
}

FP4_INLINE int floor_exponent(uint32_t bits) { return static_cast<int>((bits >> 23) & 255) - 127; }
FP4_INLINE int ceil_exponent(uint32_t bits) {
  return floor_exponent(bits) + ((bits & 0x7FFFFF) > 0);
}

FP4_INLINE uint8_t encode_e8m0(uint32_t amax, int rule) {
  int exponent;
  switch (rule) {
    case FP4_FLOOR: exponent = floor_exponent(amax) - 2; break;
    case FP4_CEIL: exponent = ceil_exponent(amax) - 2; break;
    case FP4_RCEIL: exponent = ceil_exponent(bits_of(float_of(amax) / kE2M1Max)); break;
    default: exponent = floor_exponent(amax + (1 << 21)) - 2;
  }
  return static_cast<uint8_t>((exponent < -127 ? -127 : exponent > 127 ? 127 : exponent) + 127);
}

FP4_INLINE uint8_t encode_e2m1(float x) {  // ties to even codes
  const float m = float_of(bits_of(x) & 0x7FFFFFFF);
  const int code =
      (m > .25f) + (m >= .75f) + (m > 1.25f) + (m >= 1.75f) + (m > 2.5f) + (m >= 3.5f) + (m > 5.f);
  return static_cast<uint8_t>(code | ((bits_of(x) >> 28) & 8));
}

// A group's stored scale, the factor before rounding, and the factor after decoding.
struct GroupScale {
  uint8_t code;
  float inverse, factor;
};

template <class Format>
FP4_INLINE GroupScale group_scale(uint32_t amax, float per_tensor_scale, int rule) {
  if constexpr (Format::kE4M3) {
    float scale = (float_of(amax) / kE2M1Max) / per_tensor_scale;
    scale = scale > 0x1p-9f ? scale : 0x1p-9f;
    const uint8_t code = encode_e4m3(scale);
    const float decoded = decode_e4m3(code);
    return {code, (1.f / per_tensor_scale) / decoded, per_tensor_scale * decoded};
  } else {
    const uint8_t code = encode_e8m0(amax, rule);
    return {code, decode_e8m0(254u - code), decode_e8m0(code)};
  }
}

template <class Format>
FP4_INLINE float per_tensor_scale_of(uint32_t amax) {
  if constexpr (!Format::kE4M3) return 1.f;
  const float scale = float_of(amax) / (kE2M1Max * kE4M3Max);
  return scale > 0x1p-110f ? scale : 0x1p-110f;
}

// All groups of a matrix, row by row, padded with zeros; `use(row, group, values)`.
template <class V, class Format, class Use>
FP4_INLINE void for_groups(const Fp4Matrix& in, Use use) {
  const int64_t groups = (in.K + Format::kGroup - 1) / Format::kGroup;
  parallel_ranges(in.M, tasks_for(in), [&](int64_t m0, int64_t m1) {
    std::vector<float> row(groups * Format::kGroup);
    for (int64_t m = m0; m < m1; m++) {
      rotated_row<V>(in, m, row.data());
      for (int64_t g = 0; g < groups; g++) use(m, g, row.data() + g * Format::kGroup);
    }
  });
}

// The largest magnitude among groups of finite values, which alone take part in the tensor scale.
template <class V, class Format>
FP4_INLINE uint32_t finite_amax(const Fp4Matrix& in) {
  std::atomic<uint32_t> amax{0};
  const int64_t groups = (in.K + Format::kGroup - 1) / Format::kGroup;
  parallel_ranges(in.M, tasks_for(in), [&](int64_t m0, int64_t m1) {
    std::vector<float> row(groups * Format::kGroup);
    uint32_t here = 0;
    for (int64_t m = m0; m < m1; m++) {
      rotated_row<V>(in, m, row.data());
      for (int64_t g = 0; g < groups; g++) {
        const uint32_t group = amax_bits(row.data() + g * Format::kGroup, Format::kGroup);
        if (group < 0x7F800000 && group > here) here = group;
      }
    }
    uint32_t before = amax;
    while (before < here && !amax.compare_exchange_weak(before, here)) {
    }
  });
  return amax;
}

template <class V, class Format>
FP4_INLINE float tensor_scale(const Fp4Matrix& in) {
  if constexpr (!Format::kE4M3) return 1.f;
  return per_tensor_scale_of<Format>(finite_amax<V, Format>(in));
}

template <class V, class Format>
int64_t quantize_as(const Fp4Matrix& in, uint8_t* qdata, uint8_t* scale, float* per_tensor_scale) {
  constexpr int kGroup = Format::kGroup;
  const int64_t groups = (in.K + kGroup - 1) / kGroup;
  const float tensor = *per_tensor_scale = tensor_scale<V, Format>(in);
  std::atomic<int64_t> broken{0};
  for_groups<V, Format>(in, [&](int64_t n, int64_t g, const float* values) {
    const uint32_t amax = amax_bits(values, kGroup);
    if (amax >= 0x7F800000) broken++;
    const GroupScale s = group_scale<Format>(amax, tensor, in.rule);
    scale[n * groups + g] = s.code;
    uint8_t codes[kGroup];
    for (int i = 0; i < kGroup; i++) codes[i] = encode_e2m1(values[i] * s.inverse);
    uint8_t* out = qdata + (n * groups + g) * (kGroup / 2);
    for (int i = 0; i < kGroup / 2; i++) {
      out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    }
  });
  return broken;
}

// To the dtype, what lies beyond its range becoming its largest value.
template <class V>
FP4_INLINE void from_floats_saturated(float* in, int dtype, int64_t n, void* out) {
  const float largest = dtype == FP4_FLOAT16    ? 65504.f
                        : dtype == FP4_BFLOAT16 ? 0x1.FEp127f
                                                : 0x1.FFFFFEp127f;
  for (int64_t i = 0; i < n; i++) {
    in[i] = in[i] > largest ? largest : in[i] < -largest ? -largest : in[i];
  }
  from_floats<V>(in, dtype, n, out);
}

template <class V, class Format>
void fake_quantize_as(const Fp4Matrix& in, void* y) {
  constexpr int kGroup = Format::kGroup;
  const float tensor = tensor_scale<V, Format>(in);
  for_groups<V, Format>(in, [&](int64_t m, int64_t g, const float* values) {
    const uint32_t amax = amax_bits(values, kGroup);
    const GroupScale s = group_scale<Format>(amax < 0x7F800000 ? amax : 0, tensor, in.rule);
    const float factor = amax < 0x7F800000 ? s.factor : float_of(0x7FC00000);
    float out[kGroup];
    for (int i = 0; i < kGroup; i++) out[i] = kValues[encode_e2m1(values[i] * s.inverse)] * factor;
    from_floats_saturated<V>(out, in.dtype, min64(kGroup, in.K - g * kGroup),
                             at(y, (m * in.K + g * kGroup) * dtype_bytes(in.dtype)));
  });
}

template <class V>
int64_t quantize(const Fp4Matrix& in, uint8_t* qdata, uint8_t* scale, float* per_tensor_scale) {
  const auto run = in.format == FP4_NVFP4 ? quantize_as<V, Nvfp4> : quantize_as<V, Mxfp4>;
  return run(in, qdata, scale, per_tensor_scale);
}

template <class V>
void fake_quantize(const Fp4Matrix& in, void* y) {
  const auto run = in.format == FP4_NVFP4 ? fake_quantize_as<V, Nvfp4> : fake_quantize_as<V, Mxfp4>;
  run(in, y);
}

}  // namespace
