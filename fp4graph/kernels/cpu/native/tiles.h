// qdata and scale to tiles and back: nothing here is hot.
#pragma once
#include <cstring>
#include <limits>

#include "codec.h"

namespace {

// The nibbles of 4 columns, 4 bits apart, to 8 bits apart.
FP4_INLINE uint32_t spread(uint32_t nibbles) {
  const uint32_t pairs = (nibbles | nibbles << 8) & 0x00FF00FF;
  return (pairs | pairs << 4) & 0x0F0F0F0F;
}

FP4_INLINE uint32_t gather(uint32_t spread_nibbles) {
  const uint32_t pairs = (spread_nibbles | spread_nibbles >> 4) & 0x00FF00FF;
  return (pairs | pairs >> 8) & 0xFFFF;
}

FP4_INLINE int64_t tile_tasks(int64_t bytes) {
  return max64(1, min64(fp4_threads(), bytes / kTaskBytes));
}

template <class Format>
void to_tiles(const uint8_t* qdata, const uint8_t* scale, float per_tensor_scale, uint8_t* tiles,
              float* row_scale, int64_t N, int64_t groups) {
  constexpr int kHalf = Format::kGroup / 2;
  constexpr uint8_t kNan = Format::kE4M3 ? 0x7F : 0xFF;
  constexpr uint8_t kMask = Format::kE4M3 ? 0x7F : 0xFF;  // NVFP4 ignores the sign of a scale
  const auto pack = [&](int64_t p) {
    uint8_t* panel = tiles + p * groups * kTileBytes<Format>;
    for (int64_t r = 0; r < kPanelRows; r++) {
      const int64_t n = p * kPanelRows + r;
      bool broken = false;
      for (int64_t g = 0; g < groups; g++) {
        uint8_t* tile = panel + g * kTileBytes<Format>;
        for (int oct = 0; oct < Format::kGroup / 8; oct++) {
          uint32_t codes = 0;
          if (n < N) memcpy(&codes, qdata + (n * groups + g) * kHalf + oct * 4, 4);
          const uint32_t lane = spread(codes & 0xFFFF) | spread(codes >> 16) << 4;
          memcpy(tile + oct * kOctBytes + r * 4, &lane, 4);
        }
        const uint8_t s = n < N ? scale[n * groups + g] & kMask : 0;
        broken |= s == kNan;
        tile[kScaleOffset<Format> + r] = s;
      }
      // One NaN scale makes every product with the row NaN, so the row's factor can carry it.
      const float factor = Format::kE4M3 ? per_tensor_scale * kE4M3Excess : 1.f;
      if (n < N) row_scale[n] = broken ? std::numeric_limits<float>::quiet_NaN() : factor;
    }
  };
  const int64_t panels = (N + kPanelRows - 1) / kPanelRows;
  parallel_ranges(panels, tile_tasks(N * groups * kHalf), [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; p++) pack(p);
  });
}

// The sign bits of E4M3 scales, which mean nothing, are lost.
template <class Format>
void from_tiles(const uint8_t* tiles, uint8_t* qdata, uint8_t* scale, int64_t N, int64_t groups) {
  constexpr int kHalf = Format::kGroup / 2;
  const auto unpack = [&](int64_t n) {
    const uint8_t* panel = tiles + n / kPanelRows * groups * kTileBytes<Format>;
    const int64_t r = n % kPanelRows;
    for (int64_t g = 0; g < groups; g++) {
      const uint8_t* tile = panel + g * kTileBytes<Format>;
      for (int oct = 0; oct < Format::kGroup / 8; oct++) {
        uint32_t lane;
        memcpy(&lane, tile + oct * kOctBytes + r * 4, 4);
        const uint32_t codes = gather(lane & 0x0F0F0F0F) | gather(lane >> 4 & 0x0F0F0F0F) << 16;
        memcpy(qdata + (n * groups + g) * kHalf + oct * 4, &codes, 4);
      }
      scale[n * groups + g] = tile[kScaleOffset<Format> + r];
    }
  };
  parallel_ranges(N, tile_tasks(N * groups * kHalf), [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++) unpack(n);
  });
}

// Where a code of FP8 lies in the 64 bytes of 4 columns: see layout.h.
FP4_INLINE int64_t fp8_place(int64_t r, int64_t k) {
  return r / 4 * 16 + k % 2 * 8 + r % 4 * 2 + k / 2;
}

// Codes [N, K] to tiles; false if one of them is NaN.
FP4_INLINE bool fp8_to_tiles(const uint8_t* qdata, uint8_t* tiles, int64_t N, int64_t K) {
  const int64_t bytes = (K + Fp8::kGroup - 1) / Fp8::kGroup * kTileBytes<Fp8>;
  const int64_t panels = (N + kPanelRows - 1) / kPanelRows;
  std::atomic<bool> finite{true};
  parallel_ranges(panels, tile_tasks(N * K), [&](int64_t p0, int64_t p1) {
    memset(tiles + p0 * bytes, 0, (p1 - p0) * bytes);
    bool here = true;
    for (int64_t n = p0 * kPanelRows; n < min64(N, p1 * kPanelRows); n++) {
      uint8_t* panel = tiles + n / kPanelRows * bytes;
      for (int64_t k = 0; k < K; k++) {
        const uint8_t code = qdata[n * K + k];
        here &= (code & 127) != 127;
        panel[k / 4 * kOctBytes + fp8_place(n % kPanelRows, k % 4)] = code;
      }
    }
    if (!here) finite = false;
  });
  return finite;
}

FP4_INLINE void fp8_from_tiles(const uint8_t* tiles, uint8_t* qdata, int64_t N, int64_t K) {
  const int64_t bytes = (K + Fp8::kGroup - 1) / Fp8::kGroup * kTileBytes<Fp8>;
  parallel_ranges(N, tile_tasks(N * K), [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++) {
      const uint8_t* panel = tiles + n / kPanelRows * bytes;
      for (int64_t k = 0; k < K; k++) {
        qdata[n * K + k] = panel[k / 4 * kOctBytes + fp8_place(n % kPanelRows, k % 4)];
      }
    }
  });
}

}  // namespace
