// Compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni and what AVX2 takes.
#if defined(__x86_64__)
#include "avx512.h"

const Fp4Isa fp4_avx512 = {"avx512",         linear<Avx512Intel>,
                           quantize<Avx512>, fake_quantize<Avx512>,
                           rotate<Avx512>,   attend<Avx512>};
#endif
