// AVX-512 (F, BW, VL, VNNI): 512-bit vectors, 32 registers. A dword is one of 16 rows, so that its
// nibbles index a table of 16 values after a shift, without a mask: vpermps reads 4 bits.
#pragma once
#include <immintrin.h>

#include "fp4.h"
#ifndef FP4_VECTOR_REGISTER  // as where tests emulate the instructions
#define FP4_VECTOR_REGISTER "v"
#endif
#include "codec.h"
#include "linear.h"

namespace {

struct Avx512 : IsaDefaults {
  using F = __m512;
  using I = __m512i;
  static constexpr int kRows = 16;
  static constexpr int kStep = 1;
  static constexpr int kSlots = 1;
  static constexpr int kVectors = 1;
  static constexpr int kHalfSteps = 4;
  static constexpr int kFewRows = 8;
  static constexpr int kTilePanels = 2;
  static constexpr int kBlockRows = 12;
  static constexpr int64_t kDepth = 128;
  static constexpr int32_t kOffset = 12;  // vpdpbusd wants one side unsigned

  struct Tables {
    F values = _mm512_load_ps(kValues);
  };
  struct IntTables {
    I values =
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(kTwicePlus12)));
    I nibble = _mm512_set1_epi8(15);
  };

  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    reorder<Avx512>(in, n, out);
  }
  static FP4_INLINE F zero() { return _mm512_setzero_ps(); }
  static FP4_INLINE F splat(float x) { return _mm512_set1_ps(x); }
  static FP4_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static FP4_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static FP4_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static FP4_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static FP4_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static FP4_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static FP4_INLINE I load_codes(const uint8_t* p) {
    I codes = _mm512_loadu_si512(p);
    // else every shift reads memory again, mostly across a line
    asm("" : "+" FP4_VECTOR_REGISTER(codes));
    return codes;
  }
  static FP4_INLINE F broadcast(const float* x) { return _mm512_set1_ps(*x); }

  // A dword is one row, its nibbles columns 7 3 6 2 5 1 4 0 from the top. Shifted right by 8 s, or
  // by 4 more for the upper half, its lowest nibble is column s, or 4 + s: what vpermps looks up.
  static FP4_INLINE void decode(const Tables& t, I raw, int half, F (&d)[4][1]) {
    FP4_UNROLL for (int s = 0; s < 4; s++) {
      d[s][0] = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 8 * s + 4 * half), t.values);
    }
  }
  // Bytes of 4 rows to one column after the other, then columns of all rows side by side.
  struct Fp8Tables {
    I columns =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    I rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  };
  // As float16 with the bits one place lower: columns 0 and 2, then 1 and 3.
  static FP4_INLINE void decode_fp8(const Fp8Tables& t, const uint8_t* p, F (&d)[4][1]) {
    const I bytes = _mm512_permutexvar_epi32(t.rows, _mm512_shuffle_epi8(load_codes(p), t.columns));
    const __m256i half[2] = {_mm512_castsi512_si256(bytes), _mm512_extracti64x4_epi64(bytes, 1)};
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      const I wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(half[s]), 7);
      const I bits = _mm512_and_si512(wide, _mm512_set1_epi16(static_cast<int16_t>(0xBFFF)));
      d[s][0] = _mm512_cvtph_ps(_mm512_castsi512_si256(bits));
      d[2 + s][0] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    }
  }
  template <class Format>
  static FP4_INLINE F scales(const uint8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (Format::kE4M3) {
      return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7));
    } else {
      const I bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
      return _mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(0x00400000)));
    }
  }
  static FP4_INLINE void expand(F s, F (&out)[1]) { out[0] = s; }
  static FP4_INLINE F finish(const F (&acc)[1]) { return acc[0]; }

  static FP4_INLINE I int_decode(const IntTables& t, I raw, int half) {
    return _mm512_shuffle_epi8(t.values,
                               _mm512_and_si512(half ? _mm512_srli_epi16(raw, 4) : raw, t.nibble));
  }
  template <int kParts>
  static FP4_INLINE I dot(const I (&codes)[kParts], const int8_t* x, int32_t offset) {
    I sum[2] = {_mm512_set1_epi32(-offset), _mm512_setzero_si512()};
    FP4_UNROLL for (int p = 0; p < kParts; p++) {
      int32_t bytes;
      memcpy(&bytes, x + 4 * p, 4);
      sum[p % 2] = _mm512_dpbusd_epi32(sum[p % 2], codes[p], _mm512_set1_epi32(bytes));
    }
    return _mm512_add_epi32(sum[0], sum[1]);
  }
  static FP4_INLINE I next_digit(I sum, I digit) {
    return _mm512_add_epi32(_mm512_slli_epi32(sum, 8), digit);
  }

  static FP4_INLINE void from_float16(const uint8_t* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFF;
      const __m256i half = _mm256_maskz_loadu_epi16(mask, in + 2 * i);
      _mm512_mask_storeu_ps(out + i, mask, _mm512_cvtph_ps(half));
    }
  }
  static FP4_INLINE void to_float16(const float* in, int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = n - i < 16 ? (1u << (n - i)) - 1 : 0xFFFF;
      const F x = _mm512_maskz_loadu_ps(mask, in + i);
      _mm256_mask_storeu_epi16(out + 2 * i, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    }
  }
};

// As Intel's CPUs want it.
struct Avx512Intel : Avx512 {
  static constexpr int kStreams = 8;  // prefetchers stop at each page: the others go on meanwhile
  static constexpr int kFarAhead = 16384;
  static constexpr bool kSplits = true;

  // Each column's nibbles in the lowest byte of a dword: shifts and lookups share two ports, loads
  // have ports of their own.
  struct Columns {
    I at[4];
  };
  static FP4_INLINE Columns load_oct(const uint8_t* p) {
    Columns codes;
    FP4_UNROLL for (int s = 0; s < 4; s++)
      codes.at[s] = load_codes(p + s);
    return codes;
  }
  static FP4_INLINE void decode(const Tables& t, const Columns& codes, int half, F (&d)[4][1]) {
    FP4_UNROLL for (int s = 0; s < 4; s++) {
      const I index = half ? _mm512_srli_epi32(codes.at[s], 4) : codes.at[s];
      d[s][0] = _mm512_permutexvar_ps(index, t.values);
    }
  }

  // 16 activations as whole numbers, in three digits `stride` bytes apart, and what they sum up to.
  // Returns a bit for each activation that is no whole number of units, which is taken for 0.
  static FP4_INLINE uint32_t split(const float* x, float inverse, float unit, int8_t* digits,
                                   int stride, int32_t& sum) {
    const F all = load(x);
    I rest = _mm512_cvttps_epi32(mul(all, splat(inverse)));
    const __mmask16 whole = _mm512_cmp_ps_mask(mul(to_float(rest), splat(unit)), all, _CMP_EQ_OQ);
    rest = _mm512_maskz_mov_epi32(whole, rest);
    sum += _mm512_reduce_add_epi32(rest);
    FP4_UNROLL for (int d = 2; d >= 0; d--) {
      const I digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + d * stride),
                       _mm512_cvtsepi32_epi8(digit));
    }
    return static_cast<uint16_t>(~whole);
  }
};

}  // namespace
