// AVX-512 with BF16: a pair of bfloat16 weights times a pair of bfloat16 activations, summed in
// float32, is exact but for the sum's own rounding. Compiled with -mavx512bf16 besides.
#if defined(__x86_64__)
#include "avx512.h"

namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr int kFewPairRows = 8;

  // bfloat16 of the 16 values, twice: vpermw reads 5 bits, of which the upper one is another
  // column's.
  struct PairTables {
    I values;
    PairTables() {
      alignas(64) uint16_t both[32];
      for (int i = 0; i < 32; i++) {
        both[i] = static_cast<uint16_t>(kHighByte[i % 16] << 8 | kLowByte[i % 16]);
      }
      values = _mm512_load_si512(both);
    }
  };

  // The 16-bit lanes of a dword hold columns 0 and 2 in their lowest nibbles, then 4 and 6, 1 and
  // 3, 5 and 7: pair 0 is (0, 2), 1 is (4, 6), 2 is (1, 3), 3 is (5, 7).
  static FP4_INLINE I decode_pair(const PairTables& t, I raw, int pair) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(raw, 4 * pair), t.values);
  }
  static FP4_INLINE F dot_pair(F sum, I w, const uint16_t* x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits)));
  }
  // float32 that hold bfloat16 values -> bfloat16 in the order of pairs.
  static FP4_INLINE void to_pairs(const float* in, int64_t n, uint16_t* out) {
    constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    for (int64_t k = 0; k < n; k += 8) {
      for (int i = 0; i < 8; i++) out[k + i] = bits_of(in[k + kOrder[i]]) >> 16;
    }
  }
};

}  // namespace

const Fp4Isa fp4_avx512bf16 = {"avx512bf16", linear<Avx512Bf16>, quantize<Avx512Bf16>,
                               fake_quantize<Avx512Bf16>, fma_roof<Avx512Bf16>, read_roof<Avx512Bf16>};
#endif
