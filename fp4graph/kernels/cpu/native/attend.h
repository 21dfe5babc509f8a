// Attention of few queries over a cache: y = softmax(q k^T scale + mask) v, sums in float32.
#pragma once
#include <atomic>
#include <limits>

#include "isa.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace {

// e^x of x <= 0, within 2 units of the last place; below e^-87 it is 0. Coefficients: Cephes, expf.
FP4_INLINE float exp_of(float x) {
  constexpr float kWhole = 12582912.f;  // adding it rounds: its last bits are then the integer
  const float within = x < -87.f ? -87.f : x;
  const float shifted = within * 1.44269504f + kWhole, n = shifted - kWhole;
  const float r = (within - n * .693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r * r + r) + 1.f;
  return x < -87.f ? 0.f : y * float_of((bits_of(shifted) + 127) << 23);
}

// A run of slots of one head of the cache and the G heads of queries that share it. What a task
// leaves, of its slots: for each of the G heads the largest score, the sum of exponentials over it,
// and the sum of values.
template <Isa V>
class Attend {
 public:
  explicit Attend(const Fp4Attention& in)
      : in_(in), G_(in.H / in.heads), Dp_(round_up(in.D, kPad)), stride_(2 + Dp_) {
    const int64_t rows = in.B * in.heads * in.M;
    const int64_t wanted = (fp4_threads() + rows - 1) / rows;
    runs_ = max64(1, min64(wanted, in.S / kLeastSlots));
    tasks_ = rows * runs_;
  }

  bool run() {
    float *parts, *y;
    if (!carve(shared_scratch, [&](Carver& c) {
          parts = c.take<float>(tasks_ * G_ * stride_);
          y = c.take<float>(Dp_);
        })) {
      return false;
    }
    std::atomic<bool> failed{false};
    const int64_t bytes = in_.B * in_.heads * in_.S * in_.D * 2 * dtype_bytes(in_.dtype);
    const int64_t threads = min64(fp4_threads(), max64(1, bytes / kTaskBytes));
    parallel_ranges(tasks_, threads, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        if (!one_run(task, parts + task * G_ * stride_)) failed = true;
      }
    });
    if (failed) return false;
    for (int64_t row = 0; row < in_.B * in_.heads * in_.M; row++) {
      for (int64_t g = 0; g < G_; g++) {
        join(row, g, parts + (row * runs_ * G_ + g) * stride_, y);
      }
    }
    return true;
  }

 private:
  static constexpr int64_t kPad = 16, kLeastSlots = 128, kTaskBytes = 32 << 10;
  static constexpr int kLanes = sizeof(typename V::F) / sizeof(float);

  FP4_HOT bool one_run(int64_t task, float* part) const {
    const int64_t row = task / runs_, run = task % runs_;
    const int64_t m = row % in_.M, head = row / in_.M % in_.heads, b = row / in_.M / in_.heads;
    const int64_t s0 = in_.S * run / runs_, slots = in_.S * (run + 1) / runs_ - s0;
    const int64_t padded = round_up(slots, kPad);
    float *q, *wide, *scores;
    if (!carve(own_scratch, [&](Carver& c) {
          q = c.take<float>(G_ * Dp_);
          wide = c.take<float>(Dp_);
          scores = c.take<float>(G_ * padded);
        })) {
      return false;
    }
    const int64_t size = dtype_bytes(in_.dtype);
    for (int64_t i = in_.D; i < Dp_; i++) wide[i] = 0;
    for (int64_t g = 0; g < G_; g++) {
      const int64_t from = b * in_.q_b + (head * G_ + g) * in_.q_h + m * in_.q_m;
      float* to = q + g * Dp_;
      to_floats<V>(at(in_.q, from * size), in_.dtype, in_.D, to);
      for (int64_t i = 0; i < in_.D; i++) to[i] *= in_.scale;
      for (int64_t i = in_.D; i < Dp_; i++) to[i] = 0;
    }
    for (int64_t i = 0; i < slots; i++) {
      if (is_masked(b, head * G_, m, s0 + i)) {
        for (int64_t g = 0; g < G_; g++) scores[g * padded + i] = kNothing;
        continue;
      }
      const int64_t from = b * in_.k_b + head * in_.k_h + (s0 + i) * in_.k_s;
      to_floats<V>(at(in_.k, from * size), in_.dtype, in_.D, wide);
      for (int64_t g = 0; g < G_; g++) scores[g * padded + i] = dot(q + g * Dp_, wide);
    }
    for (int64_t g = 0; g < G_; g++) {
      float* of = scores + g * padded;
      for (int64_t i = slots; i < padded; i++) of[i] = kNothing;
      add_mask(b, head * G_ + g, m, s0, slots, of);
      weigh(of, padded, part + g * stride_);
      for (int64_t d = 0; d < Dp_; d++) part[g * stride_ + 2 + d] = 0;
    }
    for (int64_t i = 0; i < slots; i++) {
      if (is_masked(b, head * G_, m, s0 + i)) continue;
      const int64_t from = b * in_.v_b + head * in_.v_h + (s0 + i) * in_.v_s;
      to_floats<V>(at(in_.v, from * size), in_.dtype, in_.D, wide);
      for (int64_t g = 0; g < G_; g++) {
        const auto weight = V::splat(scores[g * padded + i]);
        float* sum = part + g * stride_ + 2;
        for (int64_t d = 0; d < Dp_; d += kLanes) {
          V::store(sum + d, V::fma(weight, V::load(wide + d), V::load(sum + d)));
        }
      }
    }
    return true;
  }

  // A slot that no head of queries attends to: the mask of yes and no is the same for all heads.
  FP4_INLINE bool is_masked(int64_t b, int64_t head, int64_t m, int64_t s) const {
    if (in_.mask_kind != FP4_MASK_BOOL) return false;
    return at(in_.mask, b * in_.mask_b + head * in_.mask_h + m * in_.mask_m + s)[0] == 0;
  }

  void add_mask(int64_t b, int64_t head, int64_t m, int64_t s0, int64_t slots, float* of) const {
    if (in_.mask_kind != FP4_MASK_SUM) return;
    const int64_t from = b * in_.mask_b + head * in_.mask_h + m * in_.mask_m + s0;
    for (int64_t i = 0; i < slots; i++) {
      float more;
      const int64_t size = dtype_bytes(in_.dtype);
      to_floats<V>(at(in_.mask, (from + i) * size), in_.dtype, 1, &more);
      of[i] += more;
    }
  }

  FP4_INLINE float dot(const float* a, const float* b) const {
    auto sum = V::mul(V::load(a), V::load(b));
    for (int64_t d = kLanes; d < Dp_; d += kLanes)
      sum = V::fma(V::load(a + d), V::load(b + d), sum);
    float lanes[kLanes];
    V::store(lanes, sum);
    FP4_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

  // Scores become exponentials over the largest; that and their sum stand first in `part`.
  static void weigh(float* of, int64_t n, float* part) {
    float most[kPad], sum[kPad] = {};
    for (int i = 0; i < kPad; i++) most[i] = kNothing;
    for (int64_t i = 0; i < n; i += kPad) {
      for (int j = 0; j < kPad; j++) most[j] = of[i + j] > most[j] ? of[i + j] : most[j];
    }
    for (int half = kPad / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; i++) most[i] = most[i + half] > most[i] ? most[i + half] : most[i];
    }
    const float base = most[0] == kNothing ? 0.f : most[0];
    for (int64_t i = 0; i < n; i += kPad) {
      for (int j = 0; j < kPad; j++) {
        of[i + j] = exp_of(of[i + j] - base);
        sum[j] += of[i + j];
      }
    }
    for (int half = kPad / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    }
    part[0] = most[0];
    part[1] = sum[0];
  }

  // The runs of one head of queries -> y. Where nothing was attended to it is 0.
  void join(int64_t row, int64_t g, const float* part, float* y) const {
    const int64_t m = row % in_.M, head = row / in_.M % in_.heads, b = row / in_.M / in_.heads;
    const int64_t next = G_ * stride_;
    float most = kNothing, total = 0;
    for (int64_t r = 0; r < runs_; r++) most = part[r * next] > most ? part[r * next] : most;
    for (int64_t d = 0; d < in_.D; d++) y[d] = 0;
    for (int64_t r = 0; r < runs_; r++) {
      const float* of = part + r * next;
      const float factor = of[0] == kNothing ? 0.f : exp_of(of[0] - most);
      if (of[0] == kNothing && of[1] == 0) continue;
      total += of[1] * factor;
      for (int64_t d = 0; d < in_.D; d++) y[d] += of[2 + d] * factor;
    }
    for (int64_t d = 0; d < in_.D; d++) y[d] = total == 0 ? 0.f : y[d] / total;
    const int64_t place = ((b * in_.M + m) * in_.H + head * G_ + g) * in_.D;
    from_floats<V>(y, in_.dtype, in_.D, at(in_.y, place * dtype_bytes(in_.dtype)));
  }

  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const Fp4Attention& in_;
  int64_t G_, Dp_, stride_;
  int64_t runs_ = 1, tasks_ = 1;
};

template <Isa V>
bool attend(const Fp4Attention& in) {
  return Attend<V>(in).run();
}

}  // namespace
