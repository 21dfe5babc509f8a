// The kernels' interface, C++ within the library: buffers in, buffers out, no torch.
#pragma once
#include <cstdint>

enum Fp4Format { FP4_NVFP4 = 0, FP4_MXFP4 = 1, FP4_FP8 = 2 };
enum Fp4Dtype { FP4_FLOAT32 = 0, FP4_BFLOAT16 = 1, FP4_FLOAT16 = 2, FP4_FLOAT64 = 3 };

// Who computes the products: float32, whatever the dtype; or integers of activations that are
// rounded to 8 bits a group, an approximation; or one of these by the rows of x, see `fp4_cross`.
enum Fp4Mode { FP4_EXACT = 0, FP4_INT8 = 1, FP4_AUTO = 2 };

// How an MXFP4 group's scale is picked; see fp4graph/formats/scales.py.
enum Fp4Rule { FP4_FLOOR = 0, FP4_CEIL = 1, FP4_RCEIL = 2, FP4_EVEN = 3 };

// A linear: y = x W^T + bias, W [N, K] in tiles (layout.h). Nothing needs alignment.
struct Fp4Linear {
  const void* x;  // [M, K] contiguous, in `dtype`
  const uint8_t* tiles;
  const float* row_scale;  // [N]
  const void* bias;        // [N] in `dtype`, or null
  void* y;                 // [M, N] in `dtype`
  int64_t M, N, K;
  int format, dtype, mode;
};

// Who attends to what: everybody to all; by bytes, 0 for no; by numbers in `dtype` that are added.
enum Fp4Mask { FP4_MASK_NONE = 0, FP4_MASK_BOOL = 1, FP4_MASK_SUM = 2 };

// Attention of M queries a head over S slots. Heads of queries share those of the cache in runs.
// Strides are in values, and the last dimension has none.
struct Fp4Attention {
  const void *q, *k, *v;  // [B, H, M, D], [B, heads, S, D] twice, in `dtype`
  const void* mask;       // [B, H, M, S] by its strides, the same for all heads if it is of bytes
  void* y;                // [B, M, H, D] contiguous, in `dtype`
  int64_t B, H, heads, M, S, D;
  int64_t q_b, q_h, q_m, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h, mask_m;
  int dtype, mask_kind;
  float scale;
};

// A matrix that is rounded to nearest in groups along K, rotated before in blocks of `rotation`
// columns (rotate.h) unless that is 0.
struct Fp4Matrix {
  const void* x;  // [M, K] contiguous, in `dtype`
  int64_t M, K;
  int format, rule, dtype, rotation;
};

// What each instruction set's file exports.
struct Fp4Isa {
  const char* name;
  // `count` linears of one x: all but weights, N and y are the same. False when memory for scratch
  // ran out.
  bool (*linear)(const Fp4Linear* calls, int64_t count);
  // -> qdata [M, Kp/2], scale [M, Kp/group], per_tensor_scale [1]; returns how many groups hold NaN
  // or Inf, and where any does the outputs mean nothing.
  int64_t (*quantize)(const Fp4Matrix&, uint8_t* qdata, uint8_t* scale, float* per_tensor_scale);
  // Quantise and dequantise -> y [M, K] of the same dtype.
  void (*fake_quantize)(const Fp4Matrix&, void* y);
  // Rotate alone -> y [M, K] of the same dtype.
  void (*rotate)(const Fp4Matrix&, void* y);
  // False when memory for scratch ran out.
  bool (*attend)(const Fp4Attention&);
};

extern const Fp4Isa fp4_portable;
#if defined(__x86_64__)
extern const Fp4Isa fp4_avx2;
extern const Fp4Isa fp4_avx512;
extern const Fp4Isa fp4_avx512bf16;
extern const Fp4Isa fp4_amx;
#elif defined(__aarch64__)
extern const Fp4Isa fp4_neon;
#endif

#define FP4_EXPORT __attribute__((visibility("default")))
extern "C" {
// The instruction sets that this library has and this CPU runs, best first, separated by commas.
FP4_EXPORT const char* fp4_available();
// Use one of them; null for the best. Returns 0, or 1 when it is not available.
FP4_EXPORT int fp4_use(const char* isa);
// The one in use.
FP4_EXPORT const char* fp4_isa();
// Say what FP4_AUTO is for a format and a dtype: FP4_EXACT below rows[0], FP4_INT8 from there on,
// the other again from rows[1] on, and so forth. Before it is called all is exact. Returns 0, or 1
// where `count` is too many.
FP4_EXPORT int fp4_cross(int format, int dtype, const int64_t* rows, int count);
}
// What FP4_AUTO is for M rows.
Fp4Mode fp4_mode(int format, int dtype, int64_t M);
const Fp4Isa& fp4_chosen();
