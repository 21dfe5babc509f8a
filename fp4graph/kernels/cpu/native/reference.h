// The float64 linear, for those who check: speed was not sought.
#pragma once
#include <vector>

#include "tiles.h"

namespace {

// The n-th row of weights as `dequantize` makes it, in float32.
template <class Format>
FP4_INLINE void weights_of(const Fp4Linear& call, int64_t n, double* w) {
  const int64_t groups = (call.K + Format::kGroup - 1) / Format::kGroup;
  const uint8_t* panel = call.tiles + n / kPanelRows * groups * kTileBytes<Format>;
  const int64_t r = n % kPanelRows;
  if constexpr (kIsFp8<Format>) {
    const float scale = call.row_scale[n] / kE4M3Excess;
    for (int64_t k = 0; k < call.K; k++) {
      const uint32_t code = panel[k / 4 * kOctBytes + fp8_place(r, k % 4)];
      w[k] = (code & 128 ? -1.f : 1.f) * decode_e4m3(code & 127) * scale;
    }
  } else {
    const float tensor = Format::kE4M3 ? call.row_scale[n] / kE4M3Excess : call.row_scale[n];
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* tile = panel + g * kTileBytes<Format>;
      const uint32_t code = tile[kScaleOffset<Format> + r];
      const float factor = tensor * (Format::kE4M3 ? decode_e4m3(code) : decode_e8m0(code));
      for (int k = 0; k < Format::kGroup; k++) {
        const uint8_t byte = tile[k / 8 * kOctBytes + r * 4 + k % 4];
        w[g * Format::kGroup + k] = kValues[k % 8 < 4 ? byte & 15 : byte >> 4] * factor;
      }
    }
  }
}

template <class Format>
void linear_float64(const Fp4Linear& call) {
  const int64_t padded = round_up(call.K, Format::kGroup);
  const auto* x = static_cast<const double*>(call.x);
  const auto* bias = static_cast<const double*>(call.bias);
  auto* y = static_cast<double*>(call.y);
  parallel_ranges(call.N, tile_tasks(call.N * call.K), [&](int64_t n0, int64_t n1) {
    std::vector<double> w(padded);
    for (int64_t n = n0; n < n1; n++) {
      weights_of<Format>(call, n, w.data());
      for (int64_t m = 0; m < call.M; m++) {
        double sum = 0;
        for (int64_t k = 0; k < call.K; k++) sum += x[m * call.K + k] * w[k];
        y[m * call.N + n] = sum + (bias != nullptr ? bias[n] : 0);
      }
    }
  });
}

}  // namespace
