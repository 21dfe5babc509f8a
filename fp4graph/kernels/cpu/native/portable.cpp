// Any CPU, by the compiler's own 128-bit vectors: right everywhere, fast nowhere.
#include "codec.h"
#include "fp4.h"
#include "linear.h"

namespace {

struct Portable : IsaDefaults {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  static constexpr int kRows = 4;
  static constexpr int kStep = 1;
  static constexpr int kSlots = 1;
  static constexpr int kVectors = 1;
  static constexpr int kHalfSteps = 4;
  static constexpr int kFewRows = 4;
  static constexpr int kTilePanels = 1;
  static constexpr int kBlockRows = 6;
  static constexpr int64_t kDepth = 256;
  static constexpr int32_t kOffset = 0;

  struct Tables {};
  struct IntTables {};

  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    reorder<Portable>(in, n, out);
  }
  static FP4_INLINE F zero() { return F{}; }
  static FP4_INLINE F splat(float x) { return F{x, x, x, x}; }
  static FP4_INLINE F load(const float* p) {
    F x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static FP4_INLINE void store(float* p, F x) { memcpy(p, &x, sizeof x); }
  static FP4_INLINE F add(F a, F b) { return a + b; }
  static FP4_INLINE F mul(F a, F b) { return a * b; }
  static FP4_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static FP4_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
  static FP4_INLINE I load_codes(const uint8_t* p) {
    I x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static FP4_INLINE F broadcast(const float* x) { return splat(*x); }

  static FP4_INLINE void decode(const Tables&, I raw, int half, F (&d)[4][1]) {
    FP4_UNROLL for (int s = 0; s < 4; s++) {
      const I index = raw >> (8 * s + 4 * half) & 15;
      d[s][0] = F{kValues[index[0]], kValues[index[1]], kValues[index[2]], kValues[index[3]]};
    }
  }
  struct Fp8Tables {};
  static FP4_INLINE void decode_fp8(const Fp8Tables&, const uint8_t* p, F (&d)[4][1]) {
    FP4_UNROLL for (int s = 0; s < 4; s++) {
      FP4_UNROLL for (int r = 0; r < kRows; r++) {
        const uint32_t code = p[s % 2 * 8 + 2 * r + s / 2];
        d[s][0][r] = (code & 128 ? -1.f : 1.f) * decode_e4m3(code & 127) / kE4M3Excess;
      }
    }
  }
  template <class Format>
  static FP4_INLINE F scales(const uint8_t* p) {
    F out;
    FP4_UNROLL for (int r = 0; r < kRows; r++) {
      out[r] = Format::kE4M3 ? decode_e4m3(p[r]) / kE4M3Excess : decode_e8m0(p[r]);
    }
    return out;
  }
  static FP4_INLINE void expand(F s, F (&out)[1]) { out[0] = s; }
  static FP4_INLINE F finish(const F (&acc)[1]) { return acc[0]; }

  static FP4_INLINE I int_decode(const IntTables&, I raw, int half) {
    int8_t out[16];
    FP4_UNROLL for (int i = 0; i < 16; i++) {
      out[i] = kTwice[raw[i / 4] >> (i % 4 * 8 + 4 * half) & 15];
    }
    I packed;
    memcpy(&packed, out, sizeof packed);
    return packed;
  }
  template <int kParts>
  static FP4_INLINE I dot(const I (&codes)[kParts], const int8_t* x, int32_t) {
    I sum = {};
    FP4_UNROLL for (int p = 0; p < kParts; p++) {
      FP4_UNROLL for (int i = 0; i < 4; i++)
        sum += (codes[p] << (24 - 8 * i) >> 24) * x[4 * p + i];
    }
    return sum;
  }

  static FP4_INLINE void from_float16(const uint8_t* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) {
      uint16_t half;
      memcpy(&half, in + 2 * i, 2);
      out[i] = float_of_half(half);
    }
  }
  static FP4_INLINE void to_float16(const float* in, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i++) {
      const uint16_t half = half_of(in[i]);
      memcpy(out + 2 * i, &half, 2);
    }
  }
};

}  // namespace

const Fp4Isa fp4_portable = {"portable",         linear<Portable>,
                             quantize<Portable>, fake_quantize<Portable>,
                             rotate<Portable>,   attend<Portable>};
