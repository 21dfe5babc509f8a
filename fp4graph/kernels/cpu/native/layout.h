// How a packed weight lies in memory, and what its bits mean.
//
// Rows come in panels of 16, the last one padded; a panel is one stream of group tiles along K:
//
//   NVFP4, 16 columns: 128 bytes of codes, 16 of E4M3 scales, one a row   (4.5 bits a weight)
//   MXFP4, 32 columns: 256 bytes of codes, 16 of E8M0 scales              (4.25 bits)
//   FP8,   32 columns: 512 bytes of codes; the scale of a row is in `row_scale`
//
// Codes come 8 columns at a time, 64 bytes: row r owns bytes 4r..4r+3, byte b holding column b in
// its low nibble and column 4+b in its high one. So a 32-bit lane is one row by 8 columns at any
// vector width, which is what dot-product instructions want, and it is only a permutation of
// `qdata` and `scale`.
//
// FP8 codes come 4 columns at a time, 64 bytes: 16 bytes for 4 rows, of which the first 8 hold
// columns 0 and 2 of each row, the last 8 columns 1 and 3. Two halves of those are pairs of 16 bits
// in the order in which E2M1's are decoded.
#pragma once
#include <cstdint>
#include <type_traits>

#include "compiler.h"

namespace {  // everything is compiled once for each instruction set, and must not be merged

constexpr int kPanelRows = 16;
constexpr int kOctBytes = kPanelRows * 4;  // 8 columns of a panel

struct Nvfp4 {
  static constexpr int kGroup = 16;
  static constexpr bool kE4M3 = true;
};

struct Mxfp4 {
  static constexpr int kGroup = 32;
  static constexpr bool kE4M3 = false;
};

struct Fp8 {  // a group is a tile's columns, and has no scale
  static constexpr int kGroup = 32;
};

template <class Format>
constexpr bool kIsFp8 = std::is_same_v<Format, Fp8>;
template <class Format>
constexpr int kScaleOffset = Format::kGroup / 8 * kOctBytes * (kIsFp8<Format> ? 2 : 1);
template <class Format>
constexpr int kTileBytes = kScaleOffset<Format> + (kIsFp8<Format> ? 0 : kPanelRows);

FP4_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
FP4_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FP4_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// The two bytes of E2M1's values as bfloat16, and 2 * value + 12, which fits an unsigned byte.
alignas(16) constexpr uint8_t kHighByte[16] = {0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40,
                                               0x80, 0xBF, 0xBF, 0xBF, 0xC0, 0xC0, 0xC0, 0xC0};
alignas(16) constexpr uint8_t kLowByte[16] = {0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0,
                                              0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0};
alignas(16) constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(16) constexpr uint8_t kTwicePlus12[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                  12, 11, 10, 9,  8,  6,  4,  0};
alignas(64) constexpr float kValues[16] = {0,    .5f,  1,  1.5f,  2,  3,  4,  6,
                                           -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};

// Kernels read E4M3 as the float16 with the same bits one place lower, so 2^8 too small.
constexpr float kE4M3Excess = 256.f;

}  // namespace
