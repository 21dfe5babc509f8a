// Pairs of bfloat16 in 512-bit vectors: weights times activations, exact but for the sums.
#pragma once
#include "avx512.h"

namespace {

// E4M3 over kE4M3Excess as pairs of bfloat16, which hold its subnormals too: both bytes of a value
// by lookups of 7 bits (VBMI), the sign besides.
struct Fp8Pairs {
  using I = __m512i;
  I high[2], low[2];
  Fp8Pairs() {
    alignas(64) uint8_t bytes[2][128];
    for (uint32_t code = 0; code < 128; code++) {
      const uint32_t bits = bits_of(decode_e4m3(code) / kE4M3Excess) >> 16;
      bytes[0][code] = static_cast<uint8_t>(bits);
      bytes[1][code] = static_cast<uint8_t>(bits >> 8);
    }
    for (int i = 0; i < 2; i++) {
      low[i] = _mm512_load_si512(bytes[0] + 64 * i);
      high[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
  }
  // Columns (0, 2), then (1, 3), a dword each row.
  FP4_INLINE void decode(I raw, I (&pairs)[2]) const {
    const I lower = _mm512_permutex2var_epi8(low[0], raw, low[1]);
    const I upper = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], raw, high[1]), raw,
                                              _mm512_set1_epi8(-128), 0xF8);
    pairs[0] = _mm512_unpacklo_epi8(lower, upper);
    pairs[1] = _mm512_unpackhi_epi8(lower, upper);
  }
};

// Where there are such lookups, float32 comes of them by a shift and a mask.
template <class Base>
struct WithFp8Pairs : Base {
  using typename Base::F, typename Base::I;
  using Fp8Tables = Fp8Pairs;
  static FP4_INLINE void decode_fp8(const Fp8Tables& t, const uint8_t* p, F (&d)[4][1]) {
    I pairs[2];
    t.decode(Base::load_codes(p), pairs);
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      d[s][0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[s], 16));
      d[2 + s][0] = _mm512_castsi512_ps(_mm512_and_si512(pairs[s], _mm512_set1_epi32(0xFFFF0000)));
    }
  }
};

// Vectors of pairs: a dword is one row by two columns, in bfloat16. The 16-bit lanes of a dword of
// codes hold columns 0 and 2 in their lowest nibbles, 4 and 6 above, then 1 and 3, then 5 and 7.
struct Avx512Pairs : Avx512 {
  static constexpr int kStep = 2;
  static constexpr int kSlots = 1;
  static constexpr int kHalfSteps = 2;
  static constexpr bool kFlushes = true;

  // bfloat16 of the 16 values, twice: vpermw reads 5 bits, of which the upper one is another
  // column's.
  struct Tables {
    I values;
    Tables() {
      alignas(64) uint16_t both[32];
      for (int i = 0; i < 32; i++) {
        both[i] = static_cast<uint16_t>(kHighByte[i % 16] << 8 | kLowByte[i % 16]);
      }
      values = _mm512_load_si512(both);
    }
  };

  // A dword's nibbles are columns 7 3 6 2 | 5 1 4 0, 16 bits each side. Shifted right, the lowest
  // nibble of either side is
  //   by 0: 2 | 0    by 8: 3 | 1    by 4: 6 | 4    by 12: 7 | 5
  // so pairs come in the order (0, 2), (1, 3), (4, 6), (5, 7).
  static FP4_INLINE I decode_pair(const Tables& t, I raw, int pair) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(raw, pair % 2 * 8 + pair / 2 * 4), t.values);
  }
  static FP4_INLINE void decode(const Tables& t, I raw, int half, F (&d)[2][1]) {
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      d[s][0] = _mm512_castsi512_ps(decode_pair(t, raw, half * 2 + s));
    }
  }
  using Fp8Tables = Fp8Pairs;
  static FP4_INLINE void decode_fp8(const Fp8Tables& t, const uint8_t* p, F (&d)[2][1]) {
    I pairs[2];
    t.decode(load_codes(p), pairs);
    FP4_UNROLL for (int s = 0; s < 2; s++)
      d[s][0] = _mm512_castsi512_ps(pairs[s]);
  }
  // Both of a pair times a row's scale; E2M1 times E4M3 or E8M0 is exact in bfloat16.
  static FP4_INLINE F mul(F pair, F scale) {
    const I bits = _mm512_castps_si512(pair), upper = _mm512_set1_epi32(0xFFFF0000);
    const F low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), scale);
    const F high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(bits, upper)), scale);
    const I moved = _mm512_srli_epi32(_mm512_castps_si512(low), 16);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(upper, _mm512_castps_si512(high), moved, 0xCA));
  }
  static FP4_INLINE F fma(F w, F x, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static FP4_INLINE F dot(F sum, F w, const uint16_t* x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return fma(w, _mm512_castsi512_ps(_mm512_set1_epi32(bits)), sum);
  }
  // 32 columns of float32, cut off to bfloat16, in the order of pairs.
  static FP4_INLINE I to_pairs(F first, F second) {
    alignas(64) static constexpr uint16_t kUpper[32] = {1,  5,  3,  7,  9,  13, 11, 15, 17, 21, 19,
                                                        23, 25, 29, 27, 31, 33, 37, 35, 39, 41, 45,
                                                        43, 47, 49, 53, 51, 55, 57, 61, 59, 63};
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_load_si512(kUpper),
                                     _mm512_castps_si512(second));
  }
  // float32 that hold bfloat16 values -> bfloat16 in the order of pairs; n is a multiple of 16.
  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    for (int64_t k = 0; k < n; k += 32) {
      const I pairs = to_pairs(load(in + k), n - k < 32 ? zero() : load(in + k + 16));
      if (n - k < 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k / 2), _mm512_castsi512_si256(pairs));
      } else {
        _mm512_storeu_si512(out + k / 2, pairs);
      }
    }
  }
  // Row m's columns, of a block of kDepth, to where `multiply` wants them.
  static FP4_INLINE void pack_row(const float* in, int64_t columns, float* segment, int64_t m) {
    reorder_row(in, columns, segment + m * (kDepth / kStep));
  }
};

}  // namespace
