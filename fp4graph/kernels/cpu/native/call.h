// One call and its sizes.
#pragma once
#include "panel.h"
#include "parallel.h"
#include "rows.h"

namespace {

template <class V, class Format>
struct Call {
  explicit Call(const Fp4Linear& call)
      : call_(call),
        groups_((call.K + Format::kGroup - 1) / Format::kGroup),
        Kp_(groups_ * Format::kGroup),
        panels_((call.N + kPanelRows - 1) / kPanelRows),
        panel_bytes_(groups_ * kTileBytes<Format>) {
    // A team costs microseconds: give each thread 64 KB of weights at least.
    const int64_t work = panels_ * panel_bytes_ * max64(1, call.M / 4);
    tasks_ = max64(1, min64(fp4_threads(), work / (64 << 10)));
  }

  const void* row(int64_t m) const { return at(call_.x, m * call_.K * dtype_bytes(call_.dtype)); }
  const uint8_t* panel(int64_t p) const { return call_.tiles + p * panel_bytes_; }

  void store(const float* sums, int64_t m, int64_t p, float unit) const {
    store_row<V>(sums, call_, m, p * kPanelRows, min64(kPanelRows, call_.N - p * kPanelRows), unit);
  }

  const Fp4Linear& call_;
  int64_t groups_, Kp_, panels_, panel_bytes_;
  int64_t tasks_ = 1;
};

}  // namespace
