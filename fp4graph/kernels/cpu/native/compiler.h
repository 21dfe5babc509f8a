// What the code asks of compilers: GCC and Clang.
#pragma once

#define FP4_INLINE inline __attribute__((always_inline))
#define FP4_LAMBDA __attribute__((always_inline))
#define FP4_HOT __attribute__((noinline))  // a symbol of its own: tests read its machine code
#define FP4_UNROLL _Pragma("GCC unroll 16")
