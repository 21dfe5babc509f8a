// The Walsh-Hadamard transform of blocks of a row, over the root of their size: the sums of
// fp4graph/formats/rotation.py in their order, hence its bits. Needs -ffp-contract=off.
#pragma once
#include <cmath>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace {

template <class T>
using Eight __attribute__((vector_size(8 * sizeof(T)))) = T;

// Each lane with the one `kHalf` away: a + b in the first of the two, a - b in the second.
template <int kHalf, class T>
FP4_INLINE Eight<T> add_and_subtract(Eight<T> x) {
  Eight<T> other, sign;
  FP4_UNROLL for (int i = 0; i < 8; i++) {
    other[i] = x[i ^ kHalf];
    sign[i] = i & kHalf ? T(-1) : T(1);
  }
  return other + sign * x;
}

template <int kBlock, class T>
FP4_INLINE void rotate_block(T* x) {
  constexpr int kEights = kBlock / 8;
  Eight<T> v[kEights];
  memcpy(v, x, sizeof v);
  FP4_UNROLL for (int i = 0; i < kEights; i++) {
    v[i] = add_and_subtract<4, T>(add_and_subtract<2, T>(add_and_subtract<1, T>(v[i])));
  }
  FP4_UNROLL for (int half = 1; half < kEights; half *= 2) {
    FP4_UNROLL for (int i = 0; i < kEights; i++) {
      if (i & half) continue;
      const Eight<T> a = v[i], b = v[i + half];
      v[i] = a + b;
      v[i + half] = a - b;
    }
  }
  const T unit = static_cast<T>(1 / std::sqrt(static_cast<double>(kBlock)));
  FP4_UNROLL for (int i = 0; i < kEights; i++)
    v[i] *= unit;
  memcpy(x, v, sizeof v);
}

template <int kBlock, class T>
FP4_HOT void rotate_blocks(T* x, int64_t n) {
  for (int64_t k = 0; k < n; k += kBlock) rotate_block<kBlock>(x + k);
}

// n is a multiple of the block: 16, 32, 64 or 128, or 0 for no rotation.
template <class T>
FP4_INLINE void rotate_row(T* x, int64_t n, int64_t block) {
  switch (block) {
    case 0: return;
    case 16: return rotate_blocks<16>(x, n);
    case 32: return rotate_blocks<32>(x, n);
    case 64: return rotate_blocks<64>(x, n);
    default: return rotate_blocks<128>(x, n);
  }
}

constexpr int64_t kTaskBytes = 64 << 10;

FP4_INLINE int64_t tasks_for(const Fp4Matrix& in) {
  return max64(1, min64(fp4_threads(), in.M * in.K * dtype_bytes(in.dtype) / kTaskBytes));
}

FP4_INLINE float rounded(float x, int dtype) {
  if (dtype == FP4_FLOAT32) return x;
  return dtype == FP4_BFLOAT16 ? float_of(static_cast<uint32_t>(bfloat16_of(x)) << 16)
                               : float_of_half(half_of(x));
}

// A row of a matrix; if rotated, then rounded to the matrix' dtype again.
template <class V>
FP4_INLINE void rotated_row(const Fp4Matrix& in, int64_t m, float* row) {
  to_floats<V>(at(in.x, m * in.K * dtype_bytes(in.dtype)), in.dtype, in.K, row);
  if (in.rotation == 0) return;
  rotate_row(row, in.K, in.rotation);
  for (int64_t k = 0; k < in.K; k++) row[k] = rounded(row[k], in.dtype);
}

template <class V>
void rotate(const Fp4Matrix& in, void* y) {
  parallel_ranges(in.M, tasks_for(in), [&](int64_t m0, int64_t m1) {
    std::vector<float> row(in.K);
    for (int64_t m = m0; m < m1; m++) {
      rotated_row<V>(in, m, row.data());
      from_floats<V>(row.data(), in.dtype, in.K, at(y, m * in.K * dtype_bytes(in.dtype)));
    }
  });
}

}  // namespace
