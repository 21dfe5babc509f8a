// The hot loops: 16 rows of packed weights against rows of activations.
//
// Few rows of activations are stored in V's order of columns (`reorder` in rows.h); for `multiply`
// they lie as they are, but for bfloat16 pairs, and decoded weights follow. Sums of a row run over
// at most kColumns columns before they are added up, so that their rounding errors stay those of a
// few hundred additions however long the row: `accumulate` adds to what y holds.
#pragma once
#include "isa.h"

namespace {

constexpr int64_t kColumns = 256;

template <Vectors V>
FP4_INLINE void put(float* y, typename V::F sum, bool accumulate) {
  V::store(y, accumulate ? V::add(sum, V::load(y)) : sum);
}

// Codes of 8 columns: loaded, or of FP8 where they are.
template <Vectors V, class Format>
FP4_INLINE auto codes_of(const uint8_t* codes, int oct) {
  if constexpr (kIsFp8<Format>) {
    return codes + oct * 2 * kOctBytes;
  } else {
    return load_oct<V>(codes + oct * kOctBytes);
  }
}

// The scales of a group for kRows rows from r on, or nothing.
template <Vectors V, class Format>
struct Scaling {
  FP4_INLINE Scaling(const uint8_t* tile, int r) {
    if constexpr (!kIsFp8<Format>) {
      V::expand(V::template scales<Format>(tile + kScaleOffset<Format> + r * V::kRows), scale_);
    }
  }
  // The i-th vector of weights times its scale.
  FP4_INLINE typename V::F times(typename V::F w, int i) const {
    if constexpr (kIsFp8<Format>)
      return w;
    else
      return V::mul(w, scale_[i]);
  }
  FP4_INLINE typename V::F add(typename V::F sum, typename V::F to, int i) const {
    if constexpr (kIsFp8<Format>)
      return V::add(to, sum);
    else
      return V::fma(sum, scale_[i], to);
  }

 private:
  typename V::F scale_[V::kVectors];
};

// Weights of one group for kRows rows, decoded one half oct at a time, handed to `use(step, d)`,
// where step counts kStep columns.
template <Vectors V, class Format, bool kInOrder = false, class Use>
FP4_INLINE void decode_group(const TablesOf<V, Format>& tables, const uint8_t* codes, Use use) {
  FP4_UNROLL for (int oct = 0; oct < Format::kGroup / 8; oct++) {
    const auto raw = codes_of<V, Format>(codes, oct);
    FP4_UNROLL for (int half = 0; half < 2; half++) {
      typename V::F d[V::kHalfSteps][V::kVectors];
      if constexpr (kIsFp8<Format>) {
        V::decode_fp8(tables, raw + half * kOctBytes, d);
      } else {
        V::decode(tables, raw, half, d);
      }
      if constexpr (kInOrder && V::kSlots == 2) V::swap_middle(d);
      FP4_UNROLL for (int s = 0; s < V::kHalfSteps; s++) {
        use((oct * 2 + half) * V::kHalfSteps + s, d[s]);
      }
    }
  }
}

// Bytes ahead that codes are fetched to the first cache while kStreams panels are read at a time.
template <int kStreams>
constexpr int kAhead = kStreams == 1 ? 2048 : 4096 / kStreams;

template <Vectors V, class Format, int kStreams = 1>
FP4_INLINE void prefetch_tile(const uint8_t* tile) {
  FP4_UNROLL for (int line = 0; line < kTileBytes<Format>; line += 64) {
    __builtin_prefetch(tile + kAhead<kStreams> + line);
    if constexpr (V::kFarAhead > 0 && kStreams < 4) {
      __builtin_prefetch(tile + V::kFarAhead + line, 0, 2);
    }
  }
}

// acc += a group of one row of activations times the r-th kRows rows of a tile.
template <Vectors V, class Format>
FP4_INLINE void add_group(const TablesOf<V, Format>& tables, const uint8_t* tile, int r,
                          const float* x, typename V::F (&acc)[V::kVectors]) {
  constexpr int kChains = 4 / V::kVectors;  // sums in flight, to hide the FMA's latency
  typename V::F sum[kChains][V::kVectors];
  FP4_UNROLL for (int c = 0; c < kChains; c++) {
    FP4_UNROLL for (int i = 0; i < V::kVectors; i++)
      sum[c][i] = V::zero();
  }
  decode_group<V, Format>(tables, tile + r * V::kRows * 4, [&](int step, const auto& d) FP4_LAMBDA {
    const auto xs = V::broadcast(x + step * V::kStep);
    FP4_UNROLL for (int i = 0; i < V::kVectors; i++) {
      sum[step % kChains][i] = V::fma(d[i], xs, sum[step % kChains][i]);
    }
  });
  const Scaling<V, Format> scale(tile, r);
  FP4_UNROLL for (int i = 0; i < V::kVectors; i++) {
    FP4_UNROLL for (int stride = kChains / 2; stride > 0; stride /= 2) {
      FP4_UNROLL for (int c = 0; c < stride; c++)
        sum[c][i] = V::add(sum[c][i], sum[c + stride][i]);
    }
    acc[i] = scale.add(sum[0][i], acc[i], i);
  }
}

// One row of activations: the scale multiplies a group's sum. kPanels panels lie `stride` bytes
// apart, and y is [kPanels, 16].
template <Vectors V, class Format, int kPanels>
FP4_HOT void gemv(const uint8_t* tiles, int64_t stride, const float* x, int64_t groups, float* y,
                  bool accumulate) {
  const TablesOf<V, Format> tables;
  typename V::F acc[kPanels][kRowVectors<V>][V::kVectors];
  FP4_UNROLL for (int p = 0; p < kPanels; p++) {
    FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
      FP4_UNROLL for (int i = 0; i < V::kVectors; i++)
        acc[p][r][i] = V::zero();
    }
  }
  for (int64_t g = 0; g < groups; g++) {
    FP4_UNROLL for (int p = 0; p < kPanels; p++) {
      const uint8_t* tile = tiles + p * stride;
      prefetch_tile<V, Format, kPanels>(tile);
      FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
        add_group<V, Format>(tables, tile, r, x, acc[p][r]);
      }
    }
    tiles += kTileBytes<Format>;
    x += Format::kGroup;
  }
  FP4_UNROLL for (int p = 0; p < kPanels; p++) {
    FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
      put<V>(y + p * kPanelRows + r * V::kRows, V::finish(acc[p][r]), accumulate);
    }
  }
}

// A few rows: weights are scaled once, then used kM times. x: [kM, stride], y: [kM, 16].
template <Vectors V, class Format, int kM>
FP4_HOT void gemv_rows(const uint8_t* panel, const float* x, int64_t stride, int64_t groups,
                       float* y, bool accumulate) {
  const TablesOf<V, Format> tables;
  for (int r = 0; r < kRowVectors<V>; r++) {
    const uint8_t* tile = panel;
    const float* xg = x;
    typename V::F acc[kM][V::kVectors];
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      FP4_UNROLL for (int i = 0; i < V::kVectors; i++)
        acc[m][i] = V::zero();
    }
    for (int64_t g = 0; g < groups; g++) {
      if (r == 0) prefetch_tile<V, Format>(tile);
      const Scaling<V, Format> scale(tile, r);
      decode_group<V, Format>(tables, tile + r * V::kRows * 4,
                              [&](int step, const auto& d) FP4_LAMBDA {
                                typename V::F w[V::kVectors];
                                FP4_UNROLL for (int i = 0; i < V::kVectors; i++)
                                  w[i] = scale.times(d[i], i);
                                FP4_UNROLL for (int m = 0; m < kM; m++) {
                                  const auto xs = V::broadcast(xg + m * stride + step * V::kStep);
                                  FP4_UNROLL for (int i = 0; i < V::kVectors; i++)
                                    acc[m][i] = V::fma(w[i], xs, acc[m][i]);
                                }
                              });
      tile += kTileBytes<Format>;
      xg += Format::kGroup;
    }
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      put<V>(y + m * kPanelRows + r * V::kRows, V::finish(acc[m]), accumulate);
    }
  }
}

// The same for bfloat16 activations in pairs, weights in pairs too: products are exact in float32.
// x: [kM, stride] in the order of V::Pairs.
template <Vectors V, class Format, int kM>
FP4_HOT void gemv_pairs(const uint8_t* tile, const uint16_t* x, int64_t stride, int64_t groups,
                        float* y, bool accumulate) {
  const TablesOf<typename V::Pairs, Format> tables;
  typename V::F acc[kM];
  FP4_UNROLL for (int m = 0; m < kM; m++)
    acc[m] = V::zero();
  for (int64_t g = 0; g < groups; g++) {
    prefetch_tile<V, Format>(tile);
    constexpr int kChains = kM == 1 ? 4 : kM == 2 ? 2 : 1;  // to hide the product's latency
    typename V::F sum[kM][kChains];
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      FP4_UNROLL for (int c = 0; c < kChains; c++)
        sum[m][c] = V::zero();
    }
    decode_group<typename V::Pairs, Format>(tables, tile, [&](int pair, const auto& w) FP4_LAMBDA {
      FP4_UNROLL for (int m = 0; m < kM; m++) {
        auto& to = sum[m][pair % kChains];
        to = V::Pairs::dot(to, w[0], x + m * stride + pair * 2);
      }
    });
    const Scaling<V, Format> scale(tile, 0);
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      FP4_UNROLL for (int stride = kChains / 2; stride > 0; stride /= 2) {
        FP4_UNROLL for (int c = 0; c < stride; c++)
          sum[m][c] = V::add(sum[m][c], sum[m][c + stride]);
      }
      acc[m] = scale.add(sum[m][0], acc[m], 0);
    }
    tile += kTileBytes<Format>;
    x += Format::kGroup;
  }
  FP4_UNROLL for (int m = 0; m < kM; m++)
    put<V>(y + m * kPanelRows, acc[m], accumulate);
}

// Whether a weight may be so small that products in pairs, whose subnormals are 0, lose bits of it.
template <class Format>
FP4_INLINE bool fades(const uint8_t* tile) {
  if constexpr (std::is_same_v<Format, Mxfp4>) {
    constexpr uint8_t kSmall = 127 - 40;  // 2^-40
    const uint8_t* scale = tile + kScaleOffset<Format>;
    uint8_t least = 255;
    for (int r = 0; r < kPanelRows; r++) least = scale[r] < least ? scale[r] : least;
    if (least >= kSmall) return false;
    for (int at = 0; at < kScaleOffset<Format>; at++) {
      if (tile[at] & 0x77 && scale[at % kOctBytes / 4] < kSmall) return true;
    }
  }
  return false;
}

// Decode `groups` groups of kTilePanels panels, `stride` bytes apart, for `multiply`: w is
// [kRowVectors][groups * kGroup / kStep][kTilePanels][kVectors] vectors. False if that may not be
// exact.
template <Vectors V, class Format>
FP4_HOT bool decode_panels(const uint8_t* tiles, int64_t stride, int64_t groups, float* w) {
  constexpr int kWidth = V::kRows * V::kVectors, kStride = kWidth * V::kTilePanels;
  const TablesOf<V, Format> tables;
  const int64_t row_vector = groups * (Format::kGroup / V::kStep) * kStride;
  bool exact = true;
  for (int p = 0; p < V::kTilePanels; p++) {
    const uint8_t* tile = tiles + p * stride;
    float* at = w + p * kWidth;
    for (int64_t g = 0; g < groups; g++) {
      prefetch_tile<V, Format>(tile);
      if constexpr (V::kFlushes) exact &= !fades<Format>(tile);
      FP4_UNROLL for (int r = 0; r < kRowVectors<V>; r++) {
        const Scaling<V, Format> scale(tile, r);
        float* out = at + r * row_vector;
        decode_group<V, Format, true>(
            tables, tile + r * V::kRows * 4, [&](int step, const auto& d) FP4_LAMBDA {
              FP4_UNROLL for (int i = 0; i < V::kVectors; i++) {
                V::store(out + step * kStride + i * V::kRows, scale.times(d[i], i));
              }
            });
      }
      tile += kTileBytes<Format>;
      at += Format::kGroup / V::kStep * kStride;
    }
  }
  return exact;
}

// Slots that kDepth columns of a row of packed activations take.
template <Vectors V>
constexpr int64_t kSegment = V::kDepth / V::kStep * V::kSlots;

// c [kTilePanels][stride][16] (+)= decoded weights times x, whose kM rows are x_stride apart.
template <Vectors V, int kM>
FP4_HOT void multiply(const float* w, const float* x, int64_t x_stride, int64_t steps, float* c,
                      int64_t stride, bool accumulate) {
  constexpr int kParts = V::kTilePanels * V::kVectors;
  typename V::F acc[kM][V::kTilePanels][V::kVectors];
  FP4_UNROLL for (int m = 0; m < kM; m++) {
    FP4_UNROLL for (int i = 0; i < kParts; i++)
      acc[m][i / V::kVectors][i % V::kVectors] = V::zero();
  }
#pragma GCC unroll 2
  for (int64_t s = 0; s < steps; s++) {
    typename V::F d[kParts];
    FP4_UNROLL for (int i = 0; i < kParts; i++)
      d[i] = V::load(w + i * V::kRows);
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      const auto xs = V::broadcast(x + m * x_stride);
      FP4_UNROLL for (int i = 0; i < kParts; i++) {
        auto& to = acc[m][i / V::kVectors][i % V::kVectors];
        to = V::fma(d[i], xs, to);
      }
    }
    w += kParts * V::kRows;
    x += V::kSlots;
  }
  FP4_UNROLL for (int p = 0; p < V::kTilePanels; p++) {
    FP4_UNROLL for (int m = 0; m < kM; m++) {
      put<V>(c + p * stride + m * kPanelRows, V::finish(acc[m][p]), accumulate);
    }
  }
}

// What a thread multiplies with while a call lasts, for any number of rows up to kBlockRows.
template <Vectors V>
class Multiplier {
 public:
  static constexpr bool kEvenBlocks = true;  // rows are cut into blocks of one size, nearly
  static constexpr int64_t kPassRows = 144;  // at most, that share decoded weights

  template <int kM = V::kBlockRows>
  FP4_INLINE void operator()(int64_t rows, const float* w, const float* x, int64_t x_stride,
                             int64_t steps, float* c, int64_t stride, bool accumulate) {
    if constexpr (kM > 0) {
      if (rows == kM) {
        multiply<V, kM>(w, x, x_stride, steps, c, stride, accumulate);
      } else {
        operator()<kM - 1>(rows, w, x, x_stride, steps, c, stride, accumulate);
      }
    }
  }
};

}  // namespace
