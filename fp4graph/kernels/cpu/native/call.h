// One x and the weights that it meets: their sizes, and the way through their panels.
#pragma once
#include <type_traits>

#include "panel.h"
#include "parallel.h"
#include "rows.h"

namespace {

template <Isa V, class Format>
struct Call {
  Call(const Fp4Linear* calls, int64_t count)
      : call_(*calls),
        calls_(calls),
        count_(count),
        groups_((call_.K + Format::kGroup - 1) / Format::kGroup),
        Kp_(groups_ * Format::kGroup),
        panel_bytes_(groups_ * kTileBytes<Format>) {
    for (int64_t i = 0; i < count; i++) panels_ += panels_of(calls[i]);
    // A team costs microseconds: give each thread 64 KB of weights at least.
    const int64_t work = panels_ * panel_bytes_ * max64(1, call_.M / 4);
    tasks_ = max64(1, min64(fp4_threads(), work / (64 << 10)));
  }

  const void* row(int64_t m) const { return at(call_.x, m * call_.K * dtype_bytes(call_.dtype)); }
  const uint8_t* panel(const Fp4Linear& call, int64_t p) const {
    return call.tiles + p * panel_bytes_;
  }

  static void store(const float* sums, const Fp4Linear& call, int64_t m, int64_t p, float unit) {
    store_row<V>(sums, call, m, p * kPanelRows, min64(kPanelRows, call.N - p * kPanelRows), unit);
  }

  static int64_t panels_of(const Fp4Linear& call) { return (call.N + kPanelRows - 1) / kPanelRows; }

  // Panels [p, end), counted through all weights: `use(call, p, end)` for each weight's own.
  template <class Use>
  void for_weights(int64_t p, int64_t end, Use use) const {
    for (int64_t i = 0; i < count_; i++) {
      const int64_t panels = panels_of(calls_[i]);
      const int64_t first = max64(p, 0), last = min64(end, panels);
      if (first < last) use(calls_[i], first, last);
      p -= panels;
      end -= panels;
    }
  }

  // A row of panels' tiles in pieces of kColumns: `use(tiles, first group, groups, accumulate)`.
  template <class Use>
  FP4_INLINE void for_columns(const uint8_t* tiles, Use use) const {
    constexpr int64_t kStride = kColumns / Format::kGroup;
    if (groups_ == 0) use(tiles, 0, 0, false);
    for (int64_t g = 0; g < groups_; g += kStride) {
      use(tiles + g * kTileBytes<Format>, g, min64(kStride, groups_ - g), g > 0);
    }
  }

  // Panels [p, end) of a weight, kPanels of them at a time: `multiply(count, tiles, first group,
  // groups, sums, accumulate)` leaves a row's sums, which go to `use(panel, sums)`.
  template <int kPanels = V::kStreams, class Multiply, class Use>
  FP4_INLINE void in_streams(const Fp4Linear& call, int64_t p, int64_t end, Multiply multiply,
                             Use use) const {
    for (; p + kPanels <= end; p += kPanels) {
      float sums[kPanels * kPanelRows];
      if constexpr (kPanels > 1) {  // else what follows is where loops fetch from
        for (int i = 0; i < kPanels; i++) {
          const uint8_t* next = panel(call, p + kPanels + i);
          FP4_UNROLL for (int line = 0; line < kAhead<kPanels>; line += 64) {
            __builtin_prefetch(next + line, 0, 2);
          }
        }
      }
      for_columns(
          panel(call, p), [&](const uint8_t* tile, int64_t g, int64_t groups, bool accumulate) {
            multiply(std::integral_constant<int, kPanels>(), tile, g, groups, sums, accumulate);
          });
      for (int i = 0; i < kPanels; i++) use(p + i, sums + i * kPanelRows);
    }
    if constexpr (kPanels > 1) in_streams<kPanels / 2>(call, p, end, multiply, use);
  }

  const Fp4Linear& call_;  // the first, for what all have in common
  const Fp4Linear* calls_;
  int64_t count_;
  int64_t groups_, Kp_, panel_bytes_;
  int64_t panels_ = 0;  // of all weights
  int64_t tasks_ = 1;
};

}  // namespace
