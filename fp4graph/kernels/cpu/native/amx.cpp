// AMX with BF16: tiles of 16 rows by 64 bytes. One instruction multiplies 16 rows of activations
// by 16 rows of weights over 32 columns, as pairs of bfloat16, and sums in float32. A float32
// activation is the sum of three bfloat16 to the last bit, a float16 one of two, so products are
// exact for all.
#if defined(__x86_64__)
#include "pairs.h"

namespace {

// `kSlices` bfloat16 to an activation, the largest first. Blocks of kBlockRows rows lie as tiles
// are read: [kDepth / 32 columns][kSlices][kBlockRows][16 pairs].
template <int kSlices>
struct AmxPairs : Avx512Pairs {
  static constexpr int kFarAhead = Avx512Intel::kFarAhead;
  static constexpr int kTilePanels = 2;
  static constexpr int kBlockRows = 32;
  static constexpr int64_t kDepth = 256;
  static constexpr int kPairs = 16;
  static constexpr int64_t kTile = kBlockRows * kPairs;

  // Cuts bits off, so that what is left has 8 fewer and nothing is rounded.
  static FP4_INLINE void pack_row(const float* in, int64_t columns, float* segment, int64_t m) {
    float* out = segment + m / kBlockRows * kBlockRows * (kDepth / kStep * kSlices) +
                 m % kBlockRows * kPairs;
    for (int64_t k = 0; k < columns; k += 2 * kPairs) {
      F half[2] = {load(in + k), columns - k < 2 * kPairs ? zero() : load(in + k + kPairs)};
      FP4_UNROLL for (int slice = 0; slice < kSlices; slice++) {
        _mm512_storeu_si512(out, to_pairs(half[0], half[1]));
        FP4_UNROLL for (int i = 0; i < 2; i++)
          half[i] = rest(half[i]);
        out += kTile;
      }
    }
  }

 private:
  // What bfloat16 cuts off; of infinities nothing.
  static FP4_INLINE F rest(F x) {
    const I bits = _mm512_castps_si512(x), infinity = _mm512_set1_epi32(0x7F800000);
    const I top = _mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF0000));
    const I magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 infinite = _mm512_cmpeq_epi32_mask(magnitude, infinity);
    return _mm512_mask_blend_ps(infinite, _mm512_sub_ps(x, _mm512_castsi512_ps(top)), zero());
  }
};

template <int kSlices>
constexpr int64_t kSegment<AmxPairs<kSlices>> = AmxPairs<kSlices>::kDepth / 2 * kSlices;

struct Amx : WithFp8Pairs<Avx512Intel> {
  template <int kSlices>
  using Tiles = AmxPairs<kSlices>;
  static constexpr bool kTiles = true;
  static constexpr int kFewRows = 6;
  static constexpr int64_t kTiledOutputs = 768;  // the fewest, of float32

  // vpermb reads 6 bits, the upper two of which are another column's: values lie there four times.
  static FP4_INLINE I int_decode(const IntTables& t, I raw, int half) {
    return _mm512_permutexvar_epi8(half ? _mm512_srli_epi16(raw, 4) : raw, t.values);
  }
};

template <int kSlices>
class Multiplier<AmxPairs<kSlices>> {
 public:
  using W = AmxPairs<kSlices>;
  static constexpr bool kEvenBlocks = false;  // the tiles' sizes are set anew when rows change
  static constexpr int64_t kPassRows = 512;

  ~Multiplier() {
    if (rows_ > 0) _tile_release();
  }

  void operator()(int64_t rows, const float* w, const float* x, int64_t, int64_t steps, float* c,
                  int64_t stride, bool accumulate) {
    const int64_t whole = steps / W::kPairs * W::kPairs;
    if (whole > 0) run(rows, W::kPairs, w, x, whole, c, stride, accumulate);
    if (steps > whole) {
      run(rows, steps - whole, w + whole * kStride, x + whole * W::kBlockRows * kSlices,
          steps - whole, c, stride, accumulate || whole > 0);
    }
  }

 private:
  static constexpr int64_t kStride = W::kTilePanels * kPanelRows;

  FP4_HOT void run(int64_t rows, int64_t depth, const float* w, const float* x, int64_t steps,
                   float* c, int64_t stride, bool accumulate) {
    configure(rows, depth);
    const auto sums = [&](float* to, int64_t panel, bool more) {
      rows > 16 ? sum<true>(depth, w, x, steps, to, panel, more)
                : sum<false>(depth, w, x, steps, to, panel, more);
    };
    if (kSlices < 3 || !accumulate) return sums(c, stride, accumulate);
    // float32 wants few additions to what is already large
    alignas(64) float part[W::kTilePanels][W::kBlockRows * kPanelRows];
    sums(part[0], W::kBlockRows * kPanelRows, false);
    for (int p = 0; p < W::kTilePanels; p++) {
      for (int64_t i = 0; i < rows * kPanelRows; i += kPanelRows) {
        put<W>(c + p * stride + i, W::load(part[p] + i), true);
      }
    }
  }

  // Sums lie in tiles 0 to 3, by row tile and panel; activations in 4 and 5, weights in 6 and 7.
  template <bool kTwo>
  FP4_INLINE void sum(int64_t depth, const float* w, const float* x, int64_t steps, float* c,
                      int64_t stride, bool accumulate) {
    float* second = c + 16 * kPanelRows;
    if (accumulate) {
      _tile_loadd(0, c, kLine);
      _tile_loadd(1, c + stride, kLine);
      if constexpr (kTwo) {
        _tile_loadd(2, second, kLine);
        _tile_loadd(3, second + stride, kLine);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTwo) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int64_t s = 0; s < steps; s += depth) {
      _tile_loadd(6, w, W::kTilePanels * kLine);
      _tile_loadd(7, w + kPanelRows, W::kTilePanels * kLine);
      w += depth * kStride;
      FP4_UNROLL for (int slice = 0; slice < kSlices; slice++) {
        _tile_loadd(4, x, kLine);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwo) {
          _tile_loadd(5, x + W::kTile / 2, kLine);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        x += W::kTile;
      }
    }
    _tile_stored(0, c, kLine);
    _tile_stored(1, c + stride, kLine);
    if constexpr (kTwo) {
      _tile_stored(2, second, kLine);
      _tile_stored(3, second + stride, kLine);
    }
  }

  static constexpr int kLine = kPanelRows * sizeof(float);

  void configure(int64_t rows, int64_t depth) {
    if (rows == rows_ && depth == depth_) return;
    rows_ = rows;
    depth_ = depth;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } sizes;
    const auto set = [&](int tile, int64_t count, int64_t bytes) {
      sizes.rows[tile] = static_cast<uint8_t>(count);
      sizes.row_bytes[tile] = static_cast<uint16_t>(bytes);
    };
    const int64_t first = min64(rows, 16), second = max64(rows - 16, 1);
    for (int tile = 0; tile < 4; tile++) set(tile, tile < 2 ? first : second, kLine);
    set(4, first, depth * 4);
    set(5, second, depth * 4);
    for (int tile = 6; tile < 8; tile++) set(tile, depth, kLine);
    _tile_loadconfig(&sizes);
  }

  int64_t rows_ = 0, depth_ = 0;  // that the tiles are set to
};

}  // namespace

const Fp4Isa fp4_amx = {"amx",       linear<Amx>, quantize<Amx>, fake_quantize<Amx>,
                        rotate<Amx>, attend<Amx>};
#endif
