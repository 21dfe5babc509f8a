// NEON: 128-bit vectors, 32 registers, part of every aarch64.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "codec.h"
#include "fp4.h"
#include "linear.h"

namespace {

struct Neon : IsaDefaults {
  using F = float32x4_t;
  using I = int32x4_t;
  static constexpr int kRows = 4;
  // As in avx2.cpp: bfloat16 by two byte lookups, pairs split by a shift and a mask.
  static constexpr int kStep = 2;
  static constexpr int kSlots = 2;
  static constexpr int kVectors = 2;
  static constexpr int kHalfSteps = 2;
  static constexpr int kFewRows = 8;
  static constexpr int kTilePanels = 1;
  static constexpr int kBlockRows = 8;
  static constexpr int64_t kDepth = 256;
  static constexpr int32_t kOffset = 0;

  struct Tables {
    uint8x16_t high = vld1q_u8(kHighByte), low = vld1q_u8(kLowByte);
    uint32x4_t odd = vdupq_n_u32(0xFFFF0000);
  };
  struct IntTables {
    int8x16_t values = vld1q_s8(kTwice);
  };

  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    reorder<Neon>(in, n, out);
  }
  static FP4_INLINE F zero() { return vdupq_n_f32(0); }
  static FP4_INLINE F splat(float x) { return vdupq_n_f32(x); }
  static FP4_INLINE F load(const float* p) { return vld1q_f32(p); }
  static FP4_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
  static FP4_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
  static FP4_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
  static FP4_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static FP4_INLINE F to_float(I x) { return vcvtq_f32_s32(x); }
  static FP4_INLINE uint8x16_t load_codes(const uint8_t* p) { return vld1q_u8(p); }
  static FP4_INLINE F broadcast(const float* x) {
    return vreinterpretq_f32_f64(vld1q_dup_f64(reinterpret_cast<const double*>(x)));
  }

  static FP4_INLINE uint8x16_t nibbles(uint8x16_t raw, int half) {
    return half ? vshrq_n_u8(raw, 4) : vandq_u8(raw, vdupq_n_u8(15));
  }
  // The lanes are those of avx2.cpp.
  static FP4_INLINE void decode(const Tables& t, uint8x16_t raw, int half, F (&d)[2][2]) {
    const uint8x16_t index = nibbles(raw, half);
    const uint8x16_t high = vqtbl1q_u8(t.high, index), low = vqtbl1q_u8(t.low, index);
    const uint32x4_t a = vreinterpretq_u32_u8(vzip1q_u8(low, high));
    const uint32x4_t b = vreinterpretq_u32_u8(vzip2q_u8(low, high));
    d[0][0] = vreinterpretq_f32_u32(vshlq_n_u32(a, 16));
    d[0][1] = vreinterpretq_f32_u32(vshlq_n_u32(b, 16));
    d[1][0] = vreinterpretq_f32_u32(vandq_u32(a, t.odd));
    d[1][1] = vreinterpretq_f32_u32(vandq_u32(b, t.odd));
  }

  // The same lanes from FP8, as float16 with the bits one place lower.
  struct Fp8Tables {
    int16x8_t kept = vdupq_n_s16(static_cast<int16_t>(0xBFFF));
  };
  static FP4_INLINE void decode_fp8(const Fp8Tables& t, const uint8_t* p, F (&d)[2][2]) {
    const int8x16_t codes = vreinterpretq_s8_u8(vld1q_u8(p));
    const int8x8_t half[2] = {vget_low_s8(codes), vget_high_s8(codes)};
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      const int16x8_t bits = vandq_s16(vshlq_n_s16(vmovl_s8(half[s]), 7), t.kept);
      d[s][0] = vcvt_f32_f16(vreinterpret_f16_s16(vget_low_s16(bits)));
      d[s][1] = vcvt_f32_f16(vreinterpret_f16_s16(vget_high_s16(bits)));
    }
  }

  static FP4_INLINE void swap_middle(F (&d)[2][2]) {
    for (int i = 0; i < 2; i++) {
      const F even = d[0][i], odd = d[1][i];
      d[0][i] = vtrn1q_f32(even, odd);
      d[1][i] = vtrn2q_f32(even, odd);
    }
  }

  template <class Format>
  static FP4_INLINE F scales(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, 4);
    const uint16x4_t wide = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
    if constexpr (Format::kE4M3) {
      return vcvt_f32_f16(vreinterpret_f16_u16(vshl_n_u16(wide, 7)));
    } else {
      const uint32x4_t bits = vshlq_n_u32(vmovl_u16(wide), 23);
      return vreinterpretq_f32_u32(vmaxq_u32(bits, vdupq_n_u32(0x00400000)));
    }
  }
  static FP4_INLINE void expand(F s, F (&out)[2]) {
    out[0] = vzip1q_f32(s, s);
    out[1] = vzip2q_f32(s, s);
  }
  static FP4_INLINE F finish(const F (&acc)[2]) { return vpaddq_f32(acc[0], acc[1]); }

  static FP4_INLINE I int_decode(const IntTables& t, uint8x16_t raw, int half) {
    return vreinterpretq_s32_s8(vqtbl1q_s8(t.values, nibbles(raw, half)));
  }
  // Products are at most 12 * 128, the sum of four of them fits 16 bits.
  template <int kParts>
  static FP4_INLINE I dot(const I (&codes)[kParts], const int8_t* x, int32_t) {
    I sum = vdupq_n_s32(0);
    FP4_UNROLL for (int p = 0; p < kParts; p += 2) {
      const int8x16_t c = vreinterpretq_s8_s32(codes[p]), d = vreinterpretq_s8_s32(codes[p + 1]);
      const int8x16_t a = quad(x + 4 * p), b = quad(x + 4 * p + 4);
      const int16x8_t low =
          vmlal_s8(vmull_s8(vget_low_s8(c), vget_low_s8(a)), vget_low_s8(d), vget_low_s8(b));
      const int16x8_t high = vmlal_high_s8(vmull_high_s8(c, a), d, b);
      sum = vpadalq_s16(sum, vpaddq_s16(low, high));
    }
    return sum;
  }
  static FP4_INLINE int8x16_t quad(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(bytes));
  }

  static FP4_INLINE void from_float16(const uint8_t* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
      __fp16 half;
      memcpy(&half, in + 2 * i, 2);
      out[i] = half;
    }
  }
  static FP4_INLINE void to_float16(const float* in, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i++) {
      const __fp16 half = in[i];
      memcpy(out + 2 * i, &half, 2);
    }
  }
};

}  // namespace

const Fp4Isa fp4_neon = {"neon",       linear<Neon>, quantize<Neon>, fake_quantize<Neon>,
                         rotate<Neon>, attend<Neon>};
#endif
