// AVX-512 with BF16: a pair of bfloat16 weights times a pair of bfloat16 activations, summed in
// float32, is exact but for the sum's own rounding. Compiled with -mavx512bf16 besides.
#if defined(__x86_64__)
#include "avx512.h"

namespace {

// Vectors of pairs: a dword is one row by two columns, in bfloat16. The 16-bit lanes of a dword of
// codes hold columns 0 and 2 in their lowest nibbles, 4 and 6 above, then 1 and 3, then 5 and 7.
struct Avx512Pairs : Avx512 {
  static constexpr int kStep = 2;
  static constexpr int kSlots = 1;
  static constexpr int kHalfSteps = 2;

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

  // Pairs in order: (0, 2), (1, 3), (4, 6), (5, 7).
  static FP4_INLINE I decode_pair(const Tables& t, I raw, int pair) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(raw, pair % 2 * 8 + pair / 2 * 4), t.values);
  }
  static FP4_INLINE void decode(const Tables& t, I raw, int half, F (&d)[2][1]) {
    FP4_UNROLL for (int s = 0; s < 2; s++) {
      d[s][0] = _mm512_castsi512_ps(decode_pair(t, raw, half * 2 + s));
    }
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
  static FP4_INLINE F dot(F sum, I w, const uint16_t* x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return fma(_mm512_castsi512_ps(w), _mm512_castsi512_ps(_mm512_set1_epi32(bits)), sum);
  }
  // float32 that hold bfloat16 values -> bfloat16 in the order of pairs.
  static FP4_INLINE void reorder_row(const float* in, int64_t n, float* out) {
    constexpr int kOrder[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    for (int64_t k = 0; k < n; k += 8) {
      uint16_t pairs[8];
      for (int i = 0; i < 8; i++) pairs[i] = bits_of(in[k + kOrder[i]]) >> 16;
      memcpy(reinterpret_cast<uint16_t*>(out) + k, pairs, sizeof pairs);
    }
  }
};

struct Avx512Bf16 : Avx512 {
  using Pairs = Avx512Pairs;
  static constexpr int kFewPairRows = 8;
};

}  // namespace

const Fp4Isa fp4_avx512bf16 = {"avx512bf16", linear<Avx512Bf16>, quantize<Avx512Bf16>,
                               fake_quantize<Avx512Bf16>, rotate<Avx512Bf16>, fma_roof<Avx512Bf16>,
                               read_roof<Avx512Bf16>};
#endif
