// AVX-512 with BF16: a pair of bfloat16 weights times a pair of bfloat16 activations, summed in
// float32, is exact but for the sum's own rounding. Compiled with -mavx512bf16 and -mavx512vbmi
// besides.
#if defined(__x86_64__)
#include "pairs.h"

namespace {

struct Avx512Bf16 : WithFp8Pairs<Avx512> {
  using Pairs = Avx512Pairs;
  static constexpr int kFewPairRows = 8;
};

}  // namespace

const Fp4Isa fp4_avx512bf16 = {"avx512bf16",         linear<Avx512Bf16>,
                               quantize<Avx512Bf16>, fake_quantize<Avx512Bf16>,
                               rotate<Avx512Bf16>,   attend<Avx512Bf16>};
#endif
