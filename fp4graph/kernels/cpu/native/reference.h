// The float64 linear, for those who check: speed was not sought.
#pragma once
#include <vector>

#include "tiles.h"

namespace {

// Weights as `dequantize` makes them, in float32, then a float64 sum.
template <class Format>
void linear_float64(const Fp4Linear& call) {
  const int64_t groups = (call.K + Format::kGroup - 1) / Format::kGroup;
  const auto* x = static_cast<const double*>(call.x);
  const auto* bias = static_cast<const double*>(call.bias);
  auto* y = static_cast<double*>(call.y);
  parallel_ranges(call.N, tile_tasks(call.N * call.K), [&](int64_t n0, int64_t n1) {
    std::vector<double> w(groups * Format::kGroup);
    for (int64_t n = n0; n < n1; n++) {
      const uint8_t* panel = call.tiles + n / kPanelRows * groups * kTileBytes<Format>;
      const int64_t r = n % kPanelRows;
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
      for (int64_t m = 0; m < call.M; m++) {
        double sum = 0;
        for (int64_t k = 0; k < call.K; k++) sum += x[m * call.K + k] * w[k];
        y[m * call.N + n] = sum + (bias != nullptr ? bias[n] : 0);
      }
    }
  });
}

}  // namespace
