// The ops, on torch's stable ABI: no Python in the way, torch's own threads, one binary for this
// torch and later ones. Schemas and fake implementations stand in Python (kernels/cpu/).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <string>
#include <tuple>
#include <vector>

#include "reference.h"
#include "rotate.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

extern "C" {

void fp4_parallel(int64_t count, void (*task)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) task(index, context);
  });
}

int64_t fp4_threads() { return torch::stable::get_num_threads(); }
}

namespace {

int dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FP4_FLOAT32;
    case ScalarType::BFloat16: return FP4_BFLOAT16;
    case ScalarType::Half: return FP4_FLOAT16;
    case ScalarType::Double: return FP4_FLOAT64;
    default: STD_TORCH_CHECK(false, "activations of a dtype that the kernel does not serve");
  }
}

Tensor plain(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

int64_t group_of(int64_t format) {  // of FP8, a tile's columns
  return format == FP4_NVFP4 ? Nvfp4::kGroup : format == FP4_MXFP4 ? Mxfp4::kGroup : Fp8::kGroup;
}

int64_t tile_of(int64_t format) {
  return format == FP4_NVFP4   ? kTileBytes<Nvfp4>
         : format == FP4_MXFP4 ? kTileBytes<Mxfp4>
                               : kTileBytes<Fp8>;
}

std::vector<int64_t> shape_of(const Tensor& x) {
  std::vector<int64_t> shape(x.dim());
  for (int64_t i = 0; i < x.dim(); i++) shape[i] = x.size(i);
  return shape;
}

int64_t rows_of(const Tensor& x) {
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) M *= x.size(i);
  return M;
}

// One weight's part of a call on x, which is contiguous; y is made here. `bias` may become a copy.
Fp4Linear call_of(const Tensor& x, const Tensor& tiles, const Tensor& row_scale,
                  std::optional<Tensor>& bias, Tensor& y, int format, int mode) {
  auto shape = shape_of(x);
  const int64_t K = shape.back(), N = row_scale.numel();
  const int64_t groups = (K + group_of(format) - 1) / group_of(format);
  // what does not fit would read or write memory that is not ours
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(0) == (N + kPanelRows - 1) / kPanelRows &&
                      tiles.size(1) == groups * tile_of(format) && tiles.is_contiguous() &&
                      row_scale.is_contiguous() && row_scale.scalar_type() == ScalarType::Float,
                  "x [..., ", K, "] does not fit the packed weight");
  if (bias.has_value()) {
    bias = plain(*bias);
    STD_TORCH_CHECK(bias->numel() == N && bias->scalar_type() == x.scalar_type(),
                    "the bias needs one value a row of the weight, in the dtype of x");
  }
  shape.back() = N;
  y = torch::stable::new_empty(x, shape);
  const int64_t M = rows_of(x);
  if (mode == FP4_AUTO) mode = fp4_mode(format, dtype_of(x), M);
  return {x.const_data_ptr(),
          static_cast<const uint8_t*>(tiles.const_data_ptr()),
          static_cast<const float*>(row_scale.const_data_ptr()),
          bias.has_value() ? bias->const_data_ptr() : nullptr,
          y.mutable_data_ptr(),
          M,
          N,
          K,
          format,
          dtype_of(x),
          mode};
}

void run(const Fp4Linear* calls, int64_t count) {
  if (calls->dtype != FP4_FLOAT64) {
    STD_TORCH_CHECK(fp4_chosen().linear(calls, count), "no memory for ", calls->M,
                    " rows of activations");
    return;
  }
  for (const Fp4Linear* call = calls; call < calls + count; call++) {
    call->format == FP4_NVFP4   ? linear_float64<Nvfp4>(*call)
    : call->format == FP4_MXFP4 ? linear_float64<Mxfp4>(*call)
                                : linear_float64<Fp8>(*call);
  }
}

template <int kFormat, int kMode>
Tensor linear(const Tensor& input, const Tensor& tiles, const Tensor& row_scale,
              std::optional<Tensor> bias) {
  STD_TORCH_CHECK(input.dim() > 0, "x needs a dimension");
  const Tensor x = plain(input);
  Tensor y;
  const Fp4Linear call = call_of(x, tiles, row_scale, bias, y, kFormat, kMode);
  run(&call, 1);
  return y;
}

// The same for several weights: each result is that of `linear`, to the bit.
template <int kFormat, int kMode>
std::vector<Tensor> merged(const Tensor& input, std::vector<Tensor> tiles,
                           std::vector<Tensor> row_scales,
                           std::vector<std::optional<Tensor>> biases) {
  const size_t count = tiles.size();
  STD_TORCH_CHECK(input.dim() > 0 && count > 0, "x needs a dimension, and one weight at least");
  STD_TORCH_CHECK(row_scales.size() == count && biases.size() == count, "lists differ in length");
  const Tensor x = plain(input);
  std::vector<Tensor> results(count);
  std::vector<Fp4Linear> calls;
  for (size_t i = 0; i < count; i++) {
    calls.push_back(call_of(x, tiles[i], row_scales[i], biases[i], results[i], kFormat, kMode));
  }
  run(calls.data(), count);
  return results;
}

// Asks for huge pages before memory is first written: a weight is then read a fifth faster. It is
// advice, and what it says of other things on the pages does no harm.
void advise_huge_pages([[maybe_unused]] void* bytes, [[maybe_unused]] int64_t count) {
#if defined(__linux__)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(bytes) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(bytes) + count) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::tuple<Tensor, Tensor> pack_tiles(const Tensor& qdata_in, const Tensor& scale_in,
                                      const Tensor& per_tensor_scale, int64_t format) {
  const Tensor qdata = plain(qdata_in), scale = plain(scale_in);
  const int64_t N = qdata.size(0), groups = scale.size(1);
  STD_TORCH_CHECK(qdata.size(1) * 2 == groups * group_of(format) && scale.size(0) == N,
                  "qdata and scale do not fit");
  Tensor tiles = torch::stable::new_empty(
      qdata, {(N + kPanelRows - 1) / kPanelRows, groups * tile_of(format)});
  advise_huge_pages(tiles.mutable_data_ptr(), tiles.numel());
  Tensor row_scale = torch::stable::new_empty(qdata, {N}, ScalarType::Float);
  const auto run = format == FP4_NVFP4 ? to_tiles<Nvfp4> : to_tiles<Mxfp4>;
  run(static_cast<const uint8_t*>(qdata.const_data_ptr()),
      static_cast<const uint8_t*>(scale.const_data_ptr()),
      *static_cast<const float*>(per_tensor_scale.const_data_ptr()),
      static_cast<uint8_t*>(tiles.mutable_data_ptr()),
      static_cast<float*>(row_scale.mutable_data_ptr()), N, groups);
  return {tiles, row_scale};
}

std::tuple<Tensor, Tensor> unpack_tiles(const Tensor& tiles, int64_t N, int64_t format) {
  const int64_t groups = tiles.size(1) / tile_of(format);
  STD_TORCH_CHECK(tiles.size(0) == (N + kPanelRows - 1) / kPanelRows && tiles.is_contiguous(),
                  "tiles do not fit N");
  Tensor qdata = torch::stable::new_empty(tiles, {N, groups * group_of(format) / 2});
  Tensor scale = torch::stable::new_empty(tiles, {N, groups});
  const auto run = format == FP4_NVFP4 ? from_tiles<Nvfp4> : from_tiles<Mxfp4>;
  run(static_cast<const uint8_t*>(tiles.const_data_ptr()),
      static_cast<uint8_t*>(qdata.mutable_data_ptr()),
      static_cast<uint8_t*>(scale.mutable_data_ptr()), N, groups);
  return {qdata, scale};
}

// -> tiles, row_scale, and [] whether no code is NaN.
std::tuple<Tensor, Tensor, Tensor> pack_fp8(const Tensor& qdata_in, const Tensor& scale_in) {
  const Tensor qdata = plain(qdata_in), scale = plain(scale_in);
  const int64_t N = qdata.size(0), K = qdata.size(1), groups = (K + Fp8::kGroup - 1) / Fp8::kGroup;
  STD_TORCH_CHECK(scale.numel() == N && scale.scalar_type() == ScalarType::Float,
                  "qdata and scale do not fit");
  Tensor tiles = torch::stable::new_empty(
      qdata, {(N + kPanelRows - 1) / kPanelRows, groups * kTileBytes<Fp8>});
  advise_huge_pages(tiles.mutable_data_ptr(), tiles.numel());
  Tensor row_scale = torch::stable::new_empty(scale, {N});
  const auto* factor = static_cast<const float*>(scale.const_data_ptr());
  auto* wide = static_cast<float*>(row_scale.mutable_data_ptr());
  for (int64_t n = 0; n < N; n++) wide[n] = factor[n] * kE4M3Excess;
  Tensor finite = torch::stable::new_empty(qdata, {}, ScalarType::Bool);
  *static_cast<bool*>(finite.mutable_data_ptr()) =
      fp8_to_tiles(static_cast<const uint8_t*>(qdata.const_data_ptr()),
                   static_cast<uint8_t*>(tiles.mutable_data_ptr()), N, K);
  return {tiles, row_scale, finite};
}

Tensor unpack_fp8(const Tensor& tiles, int64_t N, int64_t K) {
  STD_TORCH_CHECK(tiles.dim() == 2 && tiles.size(0) == (N + kPanelRows - 1) / kPanelRows &&
                      tiles.size(1) == (K + Fp8::kGroup - 1) / Fp8::kGroup * kTileBytes<Fp8> &&
                      tiles.is_contiguous(),
                  "tiles do not fit [N, K]");
  Tensor qdata = torch::stable::new_empty(tiles, {N, K});
  fp8_from_tiles(static_cast<const uint8_t*>(tiles.const_data_ptr()),
                 static_cast<uint8_t*>(qdata.mutable_data_ptr()), N, K);
  return qdata;
}

// -> [B, M, H, D]: what transformers wants.
Tensor attend_op(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                 double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "expected [B, heads, tokens, D]");
  const int64_t B = q.size(0), H = q.size(1), M = q.size(2), D = q.size(3);
  const int64_t heads = k.size(1), S = k.size(2);
  STD_TORCH_CHECK(heads > 0 && H % heads == 0 && k.size(0) == B && k.size(3) == D,
                  "k does not fit q");
  for (int i = 0; i < 4; i++) STD_TORCH_CHECK(v.size(i) == k.size(i), "v is not shaped like k");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v differ in dtype");
  const auto rows_of_values = [](const Tensor& x) { return x.stride(3) == 1 ? x : plain(x); };
  const Tensor q_ = rows_of_values(q), k_ = rows_of_values(k), v_ = rows_of_values(v);
  Fp4Attention call{q_.const_data_ptr(),
                    k_.const_data_ptr(),
                    v_.const_data_ptr(),
                    nullptr,
                    nullptr,
                    B,
                    H,
                    heads,
                    M,
                    S,
                    D,
                    q_.stride(0),
                    q_.stride(1),
                    q_.stride(2),
                    k_.stride(0),
                    k_.stride(1),
                    k_.stride(2),
                    v_.stride(0),
                    v_.stride(1),
                    v_.stride(2),
                    0,
                    0,
                    0,
                    dtype_of(q),
                    FP4_MASK_NONE,
                    static_cast<float>(scale)};
  STD_TORCH_CHECK(call.dtype != FP4_FLOAT64, "no attention in float64");
  if (mask.has_value()) {
    const bool is_bool = mask->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(is_bool || mask->scalar_type() == q.scalar_type(), "a mask of another dtype");
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(3) == S, "the mask does not fit k");
    mask = rows_of_values(*mask);
    const auto step = [&](int dim, int64_t size) {
      STD_TORCH_CHECK(mask->size(dim) == 1 || mask->size(dim) == size, "the mask does not fit q");
      return mask->size(dim) == 1 ? int64_t{0} : mask->stride(dim);
    };
    call.mask_b = step(0, B), call.mask_h = step(1, H), call.mask_m = step(2, M);
    STD_TORCH_CHECK(!is_bool || call.mask_h == 0, "a mask of yes and no for each head");
    call.mask = mask->const_data_ptr();
    call.mask_kind = is_bool ? FP4_MASK_BOOL : FP4_MASK_SUM;
  }
  Tensor y = torch::stable::new_empty(q, {B, M, H, D});
  call.y = y.mutable_data_ptr();
  if (y.numel() > 0) STD_TORCH_CHECK(fp4_chosen().attend(call), "no memory for attention");
  return y;
}

Fp4Matrix matrix_of(const Tensor& x, int64_t format, int64_t rule, int64_t rotation = 0) {
  const int64_t K = x.size(x.dim() - 1);
  STD_TORCH_CHECK(
      rotation == 0 || ((rotation == 16 || rotation == 32 || rotation == 64 || rotation == 128) &&
                        K % rotation == 0),
      "no rotation of ", rotation, " for K = ", K);
  return {x.const_data_ptr(),        K == 0 ? 0 : x.numel() / K, K,
          static_cast<int>(format),  static_cast<int>(rule),     dtype_of(x),
          static_cast<int>(rotation)};
}

// -> qdata, scale, per_tensor_scale, and [1] how many groups hold NaN or Inf.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_op(const Tensor& w_in, int64_t format,
                                                       int64_t rule) {
  const Tensor w = plain(w_in);
  STD_TORCH_CHECK(w.dim() == 2 && dtype_of(w) != FP4_FLOAT64, "expected a matrix, not of float64");
  const int64_t N = w.size(0), groups = (w.size(1) + group_of(format) - 1) / group_of(format);
  Tensor qdata = torch::stable::new_empty(w, {N, groups * group_of(format) / 2}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(w, {N, groups}, ScalarType::Byte);
  Tensor per_tensor_scale = torch::stable::new_empty(w, {}, ScalarType::Float);
  Tensor broken = torch::stable::new_empty(w, {}, ScalarType::Long);
  *static_cast<int64_t*>(broken.mutable_data_ptr()) = fp4_chosen().quantize(
      matrix_of(w, format, rule), static_cast<uint8_t*>(qdata.mutable_data_ptr()),
      static_cast<uint8_t*>(scale.mutable_data_ptr()),
      static_cast<float*>(per_tensor_scale.mutable_data_ptr()));
  return {qdata, scale, per_tensor_scale, broken};
}

Tensor rotate_op(const Tensor& x_in, int64_t block) {
  const Tensor x = plain(x_in);
  Tensor y = torch::stable::new_empty(x, shape_of(x));
  const Fp4Matrix in = matrix_of(x, FP4_NVFP4, FP4_FLOOR, block);
  if (in.dtype == FP4_FLOAT64) {
    auto* out = static_cast<double*>(y.mutable_data_ptr());
    memcpy(out, in.x, x.numel() * sizeof(double));
    rotate_row(out, x.numel(), block);
  } else {
    fp4_chosen().rotate(in, y.mutable_data_ptr());
  }
  return y;
}

Tensor fake_quantize_op(const Tensor& x_in, std::string format, int64_t rotation) {
  const bool nvfp4 = format == "nvfp4";
  int rule = FP4_FLOOR;
  if (format == "mxfp4:ceil") rule = FP4_CEIL;
  if (format == "mxfp4:rceil") rule = FP4_RCEIL;
  if (format == "mxfp4:even") rule = FP4_EVEN;
  STD_TORCH_CHECK(nvfp4 || format == "mxfp4" || rule != FP4_FLOOR, "unknown format ", format);
  if (dtype_of(x_in) == FP4_FLOAT64) {
    const Tensor x = rotation ? rotate_op(x_in, rotation) : x_in;
    const Tensor y = fake_quantize_op(torch::stable::to(x, ScalarType::Float), format, 0);
    return torch::stable::to(y, ScalarType::Double);
  }
  const Tensor x = plain(x_in);
  Tensor y = torch::stable::new_empty(x, shape_of(x));
  if (x.numel() > 0) {
    fp4_chosen().fake_quantize(matrix_of(x, nvfp4 ? FP4_NVFP4 : FP4_MXFP4, rule, rotation),
                               y.mutable_data_ptr());
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4graph, CPU, m) {
  m.impl("cpu_nvfp4", TORCH_BOX((&linear<FP4_NVFP4, FP4_EXACT>)));
  m.impl("cpu_mxfp4", TORCH_BOX((&linear<FP4_MXFP4, FP4_EXACT>)));
  m.impl("cpu_fp8", TORCH_BOX((&linear<FP4_FP8, FP4_EXACT>)));
  m.impl("cpu_merged_nvfp4", TORCH_BOX((&merged<FP4_NVFP4, FP4_EXACT>)));
  m.impl("cpu_merged_mxfp4", TORCH_BOX((&merged<FP4_MXFP4, FP4_EXACT>)));
  m.impl("cpu_merged_fp8", TORCH_BOX((&merged<FP4_FP8, FP4_EXACT>)));
  m.impl("cpu_merged_int8_nvfp4", TORCH_BOX((&merged<FP4_NVFP4, FP4_INT8>)));
  m.impl("cpu_merged_int8_mxfp4", TORCH_BOX((&merged<FP4_MXFP4, FP4_INT8>)));
  m.impl("cpu_pack_fp8", TORCH_BOX(&pack_fp8));
  m.impl("cpu_unpack_fp8", TORCH_BOX(&unpack_fp8));
  m.impl("cpu_int8_nvfp4", TORCH_BOX((&linear<FP4_NVFP4, FP4_INT8>)));
  m.impl("cpu_int8_mxfp4", TORCH_BOX((&linear<FP4_MXFP4, FP4_INT8>)));
  m.impl("cpu_auto_nvfp4", TORCH_BOX((&linear<FP4_NVFP4, FP4_AUTO>)));
  m.impl("cpu_auto_mxfp4", TORCH_BOX((&linear<FP4_MXFP4, FP4_AUTO>)));
  m.impl("cpu_merged_auto_nvfp4", TORCH_BOX((&merged<FP4_NVFP4, FP4_AUTO>)));
  m.impl("cpu_merged_auto_mxfp4", TORCH_BOX((&merged<FP4_MXFP4, FP4_AUTO>)));
  m.impl("cpu_attend", TORCH_BOX(&attend_op));
  m.impl("cpu_pack_tiles", TORCH_BOX(&pack_tiles));
  m.impl("cpu_unpack_tiles", TORCH_BOX(&unpack_tiles));
  m.impl("cpu_quantize", TORCH_BOX(&quantize_op));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_op));
  m.impl("rotate", TORCH_BOX(&rotate_op));
}
