// y = x W^T + bias of one x: which strategy serves how many rows of which dtype.
#pragma once
#include "attend.h"
#include "few_rows.h"
#include "integer_rows.h"
#include "many_rows.h"

namespace {

template <Isa V, class Format>
class Linear {
 public:
  Linear(const Fp4Linear* calls, int64_t count) : call_(*calls), calls_(calls), count_(count) {}

  bool run() const {
    if constexpr (!kIsFp8<Format>) {
      if (call_.mode == FP4_INT8 && !exact_is_faster()) return with<Int8Rows<V, Format>>();
    }
    if constexpr (V::kSplits && !kIsFp8<Format>) {
      if (call_.M == 1 && call_.dtype != FP4_FLOAT32) return with<DigitRow<V, Format>>();
    }
    if constexpr (V::kFewPairRows > 0) {
      if (call_.dtype == FP4_BFLOAT16) {
        return call_.M <= V::kFewPairRows ? with<PairRows<V, Format>>() : many<typename V::Pairs>();
      }
    }
    if (call_.M <= V::kFewRows) return with<FewRows<V, Format>>();
    if constexpr (V::kTiles) {
      if (call_.dtype == FP4_BFLOAT16) return many<typename V::template Tiles<1>>();
      if (call_.dtype == FP4_FLOAT16) return many<typename V::template Tiles<2>>();
      // few outputs do not repay that activations are packed, which V reads where they are
      if (call_.N >= V::kTiledOutputs) return many<typename V::template Tiles<3>>();
    }
    return many<V>();
  }

 private:
  template <class Strategy>
  bool with() const {
    return Strategy(calls_, count_).run();
  }

  template <Vectors W>
  bool many() const {
    return with<ManyRows<V, Format, W>>();
  }

  // Than activations of 8 bits, which tiles do not multiply here.
  bool exact_is_faster() const {
    if constexpr (V::kTiles) {
      if (call_.dtype != FP4_FLOAT32) return call_.M >= 16;
      return call_.M >= 32 && call_.N >= V::kTiledOutputs;
    }
    return false;
  }

  const Fp4Linear& call_;
  const Fp4Linear* calls_;
  int64_t count_;
};

// So many rows at a time that scratch stays small; weights are decoded anew for fewer.
constexpr int64_t kCallRows = 2048;

// Rows up to which what serves them does not depend on N, so that weights can be taken together.
template <Isa V>
constexpr int64_t kTogether =
    V::kFewPairRows > 0 && V::kFewPairRows < V::kFewRows ? V::kFewPairRows : V::kFewRows;

template <Isa V>
bool run_linears(const Fp4Linear* calls, int64_t count) {
  switch (calls->format) {
    case FP4_NVFP4: return Linear<V, Nvfp4>(calls, count).run();
    case FP4_MXFP4: return Linear<V, Mxfp4>(calls, count).run();
    default: return Linear<V, Fp8>(calls, count).run();
  }
}

template <Isa V>
bool one_linear(const Fp4Linear& call) {
  if (call.N == 0) return true;
  for (int64_t m = 0; m < call.M; m += kCallRows) {
    Fp4Linear part = call;
    part.x = at(call.x, m * call.K * dtype_bytes(call.dtype));
    part.y = at(call.y, m * call.N * dtype_bytes(call.dtype));
    part.M = min64(kCallRows, call.M - m);
    if (!run_linears<V>(&part, 1)) return false;
  }
  return true;
}

template <Isa V>
bool linear(const Fp4Linear* calls, int64_t count) {
  if (count > 1 && calls->M > 0 && calls->M <= kTogether<V>) return run_linears<V>(calls, count);
  for (int64_t i = 0; i < count; i++) {
    if (!one_linear<V>(calls[i])) return false;
  }
  return true;
}

}  // namespace
