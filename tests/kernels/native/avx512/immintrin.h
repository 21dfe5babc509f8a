// AVX-512 and AMX on processors that have none, by Debian's libsimde-dev, and what it lacks of what the
// kernels use. vdpbf16ps as Intel describes it: pairs from the upper one, subnormals are zeros.
// tdpbf16ps so too: even and odd columns are summed apart, then their sum is added.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>

using __mmask16 = simde__mmask16;

namespace emulated {

template <class To, class From>
To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
struct Lanes {
  T lane[64 / sizeof(T)];
};

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  auto sums = bits<Lanes<float>>(sum);
  const auto as = bits<Lanes<uint32_t>>(a), bs = bits<Lanes<uint32_t>>(b);
  for (int i = 0; i < 16; i++) {
    for (const int shift : {0, 16}) {
      const auto value = [&](uint32_t pair) {
        return flushed(bits<float>(pair << shift & 0xFFFF0000));
      };
      const float before = flushed(sums.lane[i]);
      sums.lane[i] = flushed(std::fma(value(as.lane[i]), value(bs.lane[i]), before));
    }
  }
  return bits<__m512>(sums);
}

inline __m512 cvtepi32_ps(__m512i x) {
  const auto in = bits<Lanes<int32_t>>(x);
  Lanes<float> out;
  for (int i = 0; i < 16; i++) out.lane[i] = static_cast<float>(in.lane[i]);
  return bits<__m512>(out);
}

// Numbers out of int32's range give its least, as the processor does.
inline __m512i cvttps_epi32(__m512 x) {
  const auto in = bits<Lanes<float>>(x);
  Lanes<int32_t> out;
  for (int i = 0; i < 16; i++) {
    out.lane[i] = std::fabs(in.lane[i]) < 0x1p31f ? static_cast<int32_t>(in.lane[i]) : INT32_MIN;
  }
  return bits<__m512i>(out);
}

inline __m512i srai_epi32(__m512i x, int shift) {
  auto lanes = bits<Lanes<int32_t>>(x);
  for (int32_t& lane : lanes.lane) lane >>= shift;
  return bits<__m512i>(lanes);
}

inline int32_t reduce_add_epi32(__m512i x) {
  uint32_t sum = 0;
  for (const uint32_t lane : bits<Lanes<uint32_t>>(x).lane) sum += lane;
  return static_cast<int32_t>(sum);
}

inline __m512i cvtepu8_epi32(__m128i x) {
  uint8_t in[16];
  memcpy(in, &x, sizeof in);
  Lanes<uint32_t> out;
  for (int i = 0; i < 16; i++) out.lane[i] = in[i];
  return bits<__m512i>(out);
}

inline __m512 cvtph_ps(__m256i x) {
  __m128i half[2];
  memcpy(half, &x, sizeof half);
  __m256 both[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  return bits<__m512>(both);
}

inline __m256i cvtps_ph(__m512 x) {
  const auto halves = bits<std::array<__m256, 2>>(x);
  __m128i both[2];
  for (int i = 0; i < 2; i++) both[i] = _mm256_cvtps_ph(halves[i], _MM_FROUND_TO_NEAREST_INT);
  return bits<__m256i>(both);
}

template <class Vector, class T>
Vector masked_load(uint32_t mask, const void* from) {
  T out[sizeof(Vector) / sizeof(T)] = {};
  for (size_t i = 0; i < std::size(out); i++) {
    if (mask >> i & 1) memcpy(&out[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  return bits<Vector>(out);
}

template <class T, class Vector>
void masked_store(void* to, uint32_t mask, Vector x) {
  T in[sizeof(Vector) / sizeof(T)];
  memcpy(in, &x, sizeof in);
  for (size_t i = 0; i < std::size(in); i++) {
    if (mask >> i & 1) memcpy(static_cast<char*>(to) + i * sizeof(T), &in[i], sizeof(T));
  }
}

struct Tiles {
  struct Sizes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } sizes;
  alignas(64) uint8_t data[8][16][64];
};

inline thread_local Tiles tiles;
inline const Tiles::Sizes nothing = {};

inline void tile_loadconfig(const void* from) {
  memset(&tiles, 0, sizeof tiles);
  memcpy(&tiles.sizes, from, sizeof tiles.sizes);
}

inline void tile_zero(int tile) { memset(tiles.data[tile], 0, sizeof tiles.data[tile]); }

inline void tile_loadd(int tile, const void* from, int64_t stride) {
  tile_zero(tile);
  for (int row = 0; row < tiles.sizes.rows[tile]; row++) {
    memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride,
           tiles.sizes.row_bytes[tile]);
  }
}

inline void tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles.sizes.rows[tile]; row++) {
    memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row],
           tiles.sizes.row_bytes[tile]);
  }
}

inline void tile_dpbf16ps(int sum, int a, int b) {
  const auto lane = [](int tile, int row, int at) -> uint32_t& {
    return reinterpret_cast<uint32_t&>(tiles.data[tile][row][at * 4]);
  };
  // what the processor would refuse
  const auto& [palette, start, reserved, row_bytes, rows] = tiles.sizes;
  if (palette != 1 || rows[sum] != rows[a] || row_bytes[a] != rows[b] * 4 ||
      row_bytes[sum] != row_bytes[b]) {
    abort();
  }
  for (int m = 0; m < rows[sum]; m++) {
    for (int n = 0; n < row_bytes[sum] / 4; n++) {
      float half[2] = {};
      for (int k = 0; k < rows[b]; k++) {
        for (int i = 0; i < 2; i++) {
          const auto value = [&](uint32_t pair) {
            return flushed(bits<float>(pair << (16 - 16 * i) & 0xFFFF0000));
          };
          half[i] = flushed(std::fma(value(lane(a, m, k)), value(lane(b, k, n)), half[i]));
        }
      }
      const float before = flushed(bits<float>(lane(sum, m, n)));
      lane(sum, m, n) = bits<uint32_t>(flushed(before + flushed(half[0] + half[1])));
    }
  }
}

}  // namespace emulated

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sum, a, b) emulated::dpbf16(sum, a, b)
#define _mm512_cvtepi32_ps(x) emulated::cvtepi32_ps(x)
#define _mm512_cvttps_epi32(x) emulated::cvttps_epi32(x)
#define _mm512_srai_epi32(x, shift) emulated::srai_epi32(x, shift)
#define _mm512_reduce_add_epi32(x) emulated::reduce_add_epi32(x)
#define _mm512_cvtepu8_epi32(x) emulated::cvtepu8_epi32(x)
#define _mm512_cvtph_ps(x) emulated::cvtph_ps(x)
#define _mm512_cvtps_ph(x, rounding) emulated::cvtps_ph(x)
#define _mm512_maskz_loadu_ps(mask, p) (emulated::masked_load<__m512, float>(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (emulated::masked_load<__m256i, uint16_t>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, x) emulated::masked_store<float>(p, mask, x)
#define _mm256_mask_storeu_epi16(p, mask, x) emulated::masked_store<uint16_t>(p, mask, x)
#define _tile_loadconfig(from) emulated::tile_loadconfig(from)
#define _tile_release() emulated::tile_loadconfig(&emulated::nothing)
#define _tile_zero(tile) emulated::tile_zero(tile)
#define _tile_loadd(tile, from, stride) emulated::tile_loadd(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::tile_stored(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated::tile_dpbf16ps(sum, a, b)
