// AVX2, FMA and F16C: 256-bit vectors, 16 registers. Compiled with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#include <immintrin.h>

#include "codec.h"
#include "fp4.h"
#include "linear.h"

namespace {

struct Avx2 : IsaDefaults {
  using F = __m256;
  using I = __m256i;
  static constexpr int kRows = 8;
  // E2M1 becomes bfloat16 by two byte lookups; a pair of neighbours in a 32-bit lane is split
  // into two float32 by a shift and a mask. Hence pairs, and the order 0 2 1 3 of columns.
  static constexpr int kStep = 2;
  static constexpr int kSlots = 2;
  static constexpr int kVectors = 2;
  static constexpr int kHalfSteps = 2;
  static constexpr int kFewRows = 4;
  static constexpr int kTilePanels = 1;
  static constexpr int kBlockRows = 6;
  static constexpr int64_t kDepth = 256;
  static constexpr int32_t kOffset = 12;  // maddubs wants one side unsigned

  static FP4_INLINE I twice(const void* bytes16) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(bytes16)));
  }

  struct Tables {
    I high = twice(kHighByte), low = twice(kLowByte);
    I nibble = _mm256_set1_epi8(15), odd = _mm256_set1_epi32(0xFFFF0000);
  };
  struct IntTables {
    I values = twice(kTwicePlus12);
    I nibble = _mm256_set1_epi8(15);
  };

  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    reorder<Avx2>(in, n, out);
  }
  static FP4_INLINE F zero() { return _mm256_setzero_ps(); }
  static FP4_INLINE F splat(float x) { return _mm256_set1_ps(x); }
  static FP4_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static FP4_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static FP4_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static FP4_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static FP4_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static FP4_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static FP4_INLINE I load_codes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  }
  static FP4_INLINE F broadcast(const float* x) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
  }

  static FP4_INLINE I nibbles(I raw, int half, I mask) {
    return _mm256_and_si256(half ? _mm256_srli_epi16(raw, 4) : raw, mask);
  }
  // Half an oct of two rows of each 128 bits, a nibble a column (column 0 lowest):
  //   index      3 2 1 0 of row 0, then rows 1, 2, 3
  //   low, high  3 2 1 0 ...: the two bytes of each column's bfloat16
  //   a, b       3 2 1 0 ...: 16 bits a column; a has rows 0 and 1, b rows 2 and 3
  //   d[0]       . 2 . 0 ...: shifted up, a float32 in each 32-bit lane is column 0 or 2
  //   d[1]       3 . 1 . ...: masked, it is column 1 or 3
  // so a lane of a row meets columns (0, 2), then (1, 3): activations lie in that order.
  static FP4_INLINE void decode(const Tables& t, I raw, int half, F (&d)[2][2]) {
    const I index = nibbles(raw, half, t.nibble);
    const I high = _mm256_shuffle_epi8(t.high, index), low = _mm256_shuffle_epi8(t.low, index);
    const I a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    d[0][0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    d[0][1] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    d[1][0] = _mm256_castsi256_ps(_mm256_and_si256(a, t.odd));
    d[1][1] = _mm256_castsi256_ps(_mm256_and_si256(b, t.odd));
  }

  // The same lanes from FP8, as float16 with the bits one place lower.
  struct Fp8Tables {
    I rows = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    I kept = _mm256_set1_epi16(static_cast<int16_t>(0xBFFF));
  };
  static FP4_INLINE void decode_fp8(const Fp8Tables& t, const uint8_t* p, F (&d)[2][2]) {
    const I bytes = _mm256_permutevar8x32_epi32(load_codes(p), t.rows);
    const __m128i half[2] = {_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)};
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      const I wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(half[s]), 7);
      const I bits = _mm256_and_si256(wide, t.kept);
      d[s][0] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
      d[s][1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
    }
  }

  static FP4_INLINE void swap_middle(F (&d)[2][2]) {
    FP4_UNROLL for (int i = 0; i < 2; i++) {
      const F even = d[0][i], odd = d[1][i];
      d[0][i] = _mm256_blend_ps(even, _mm256_moveldup_ps(odd), 0xAA);
      d[1][i] = _mm256_blend_ps(_mm256_movehdup_ps(even), odd, 0xAA);
    }
  }

  template <class Format>
  static FP4_INLINE F scales(const uint8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    if constexpr (Format::kE4M3) {
      return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 7));
    } else {
      const I bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
      return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x00400000)));
    }
  }
  static FP4_INLINE void expand(F s, F (&out)[2]) {
    out[0] = _mm256_unpacklo_ps(s, s);
    out[1] = _mm256_unpackhi_ps(s, s);
  }
  static FP4_INLINE F finish(const F (&acc)[2]) { return _mm256_hadd_ps(acc[0], acc[1]); }

  static FP4_INLINE I int_decode(const IntTables& t, I raw, int half) {
    return _mm256_shuffle_epi8(t.values, nibbles(raw, half, t.nibble));
  }
  static FP4_INLINE I quad(const int8_t* x) {
    int32_t bytes;
    memcpy(&bytes, x, 4);
    return _mm256_set1_epi32(bytes);
  }
  // A maddubs lane is at most 2 * 24 * 128, four of them fit 16 bits.
  template <int kParts>
  static FP4_INLINE I dot(const I (&codes)[kParts], const int8_t* x, int32_t offset) {
    I sum = _mm256_set1_epi32(-offset);
    FP4_UNROLL for (int p = 0; p < kParts; p += 4) {
      const I a = _mm256_add_epi16(_mm256_maddubs_epi16(codes[p], quad(x + 4 * p)),
                                   _mm256_maddubs_epi16(codes[p + 1], quad(x + 4 * p + 4)));
      const I b = _mm256_add_epi16(_mm256_maddubs_epi16(codes[p + 2], quad(x + 4 * p + 8)),
                                   _mm256_maddubs_epi16(codes[p + 3], quad(x + 4 * p + 12)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1)));
    }
    return sum;
  }

  static FP4_INLINE void from_float16(const uint8_t* in, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      store(out + i,
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * i))));
    }
    for (; i < n; i++) {
      uint16_t half;
      memcpy(&half, in + 2 * i, 2);
      out[i] = _cvtsh_ss(half);
    }
  }
  static FP4_INLINE void to_float16(const float* in, int64_t n, uint8_t* out) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i),
                       _mm256_cvtps_ph(load(in + i), _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++) {
      const uint16_t half = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
      memcpy(out + 2 * i, &half, 2);
    }
  }
};

}  // namespace

const Fp4Isa fp4_avx2 = {"avx2",       linear<Avx2>, quantize<Avx2>, fake_quantize<Avx2>,
                         rotate<Avx2>, attend<Avx2>};
#endif
