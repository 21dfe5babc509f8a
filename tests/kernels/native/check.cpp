// The kernels without torch: random linears on every instruction set that runs here, in buffers
// with guard bytes, against a float64 sum; rounding on each against the portable one, bit for bit.
// Built with sanitizers, and for other processors under an emulator (Makefile).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tiles.h"

extern "C" {

void fp4_parallel(int64_t count, void (*task)(int64_t, void*), void* context) {
  std::vector<std::thread> team;
  for (int64_t i = 0; i < count; i++) team.emplace_back(task, i, context);
  for (auto& each : team) each.join();
}

int64_t fp4_threads() { return 3; }
}

namespace {

int passed = 0, failed = 0;

void expect(bool right, const std::string& what) {
  right ? passed++ : failed++;
  if (!right) printf("FAILED %s\n", what.c_str());
}

// Memory of exactly so many bytes, off alignment, with bytes on both sides that nobody may touch.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int fill = 0x5A)
      : bytes_(bytes), memory_(bytes + 2 * kGuard, fill) {
    for (int i = 0; i < kGuard; i++) memory_[i] = memory_[kGuard + bytes + i] = kMark;
  }
  uint8_t* data() { return memory_.data() + kGuard; }
  bool whole() const {
    for (int i = 0; i < kGuard; i++) {
      if (memory_[i] != kMark || memory_[kGuard + bytes_ + i] != kMark) return false;
    }
    return true;
  }

 private:
  static constexpr int kGuard = 67;
  static constexpr uint8_t kMark = 0xA5;
  int64_t bytes_;
  std::vector<uint8_t> memory_;
};

std::mt19937 random_bits(7);
float normal() { return std::normal_distribution<float>()(random_bits); }

double decode_scale(int format, int code) {
  if (format == FP4_MXFP4) return std::ldexp(1., code - 127);
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent == 0 ? mantissa / 512. : std::ldexp(1 + mantissa / 8., exponent - 7);
}

void put(uint8_t* to, int64_t i, int dtype, float value) {
  if (dtype == FP4_FLOAT32) return (void)memcpy(to + 4 * i, &value, 4);
  const uint16_t bits = dtype == FP4_FLOAT16 ? half_of(value) : bfloat16_of(value);
  memcpy(to + 2 * i, &bits, 2);
}

float get(const uint8_t* from, int64_t i, int dtype) {
  float value;
  if (dtype == FP4_FLOAT32) return memcpy(&value, from + 4 * i, 4), value;
  uint16_t bits;
  memcpy(&bits, from + 2 * i, 2);
  return dtype == FP4_FLOAT16 ? float_of_half(bits) : float_of(static_cast<uint32_t>(bits) << 16);
}

// Ordinary sizes; or subnormal weights, with activations that make up for some of it; or a large
// activation in each row, whose weights are 0.
enum class Sizes { kOrdinary, kSubnormal, kUneven };

void check_linear(const Fp4Isa& isa, int format, int dtype, int mode, int64_t M, int64_t N,
                  int64_t K, Sizes sizes = Sizes::kOrdinary) {
  const bool subnormal = sizes == Sizes::kSubnormal;
  const int64_t group = format == FP4_NVFP4 ? 16 : 32, groups = (K + group - 1) / group;
  const int64_t tile = format == FP4_NVFP4 ? kTileBytes<Nvfp4> : kTileBytes<Mxfp4>;
  Buffer qdata(N * groups * group / 2), scale(N * groups), row_scale(N * 4);
  Buffer tiles((N + 15) / 16 * groups * tile), x(M * K * dtype_bytes(dtype)),
      y(M * N * dtype_bytes(dtype)), bias(N * dtype_bytes(dtype));
  for (int64_t i = 0; i < N * groups * group / 2; i++) qdata.data()[i] = random_bits() & 0xFF;
  for (int64_t i = 0; i < N * groups; i++) {
    scale.data()[i] = format == FP4_NVFP4 ? random_bits() % 127 : 117 + random_bits() % 20;
    if (subnormal) scale.data()[i] = random_bits() % 2;
  }
  const float size_of_x = subnormal ? 0x1p80f : 1.f;
  for (int64_t i = 0; i < M * K; i++) put(x.data(), i, dtype, normal() * size_of_x);
  if (sizes == Sizes::kUneven) {
    for (int64_t m = 0; m < M; m++) put(x.data(), m * K + K / 2, dtype, 60000.f);
    for (int64_t n = 0; n < N; n++) qdata.data()[(n * groups * group + K / 2) / 2] = 0;
  }
  for (int64_t i = 0; i < N; i++) put(bias.data(), i, dtype, subnormal ? 0.f : normal());
  const float tensor = format == FP4_NVFP4 ? .01f : 1.f;
  auto* factors = reinterpret_cast<float*>(row_scale.data());
  std::vector<float> aligned(N);
  const auto pack = format == FP4_NVFP4 ? to_tiles<Nvfp4> : to_tiles<Mxfp4>;
  pack(qdata.data(), scale.data(), tensor, tiles.data(), aligned.data(), N, groups);
  memcpy(factors, aligned.data(), N * 4);
  Buffer back(N * groups * group / 2), back_scale(N * groups);
  const auto unpack = format == FP4_NVFP4 ? from_tiles<Nvfp4> : from_tiles<Mxfp4>;
  unpack(tiles.data(), back.data(), back_scale.data(), N, groups);
  const Fp4Linear call{x.data(), tiles.data(), aligned.data(), bias.data(), y.data(), M, N,
                       K,        format,       dtype,          mode};
  const bool ran = isa.linear(&call, 1);
  double error = 0, size = 0;  // of all addends: few sums may be small by chance
  const double rounding = dtype == FP4_FLOAT32 ? 0 : dtype == FP4_BFLOAT16 ? 0x1p-8 : 0x1p-11;
  bool close = true;
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      double sum = get(bias.data(), n, dtype), all = std::fabs(sum);
      size += sum * sum;
      for (int64_t k = 0; k < K; k++) {
        const uint8_t byte = qdata.data()[n * groups * group / 2 + k / 2];
        const double w = kValues[k % 2 ? byte >> 4 : byte & 15] * tensor *
                         decode_scale(format, scale.data()[n * groups + k / group]);
        sum += w * get(x.data(), m * K + k, dtype);
        all += std::fabs(w * get(x.data(), m * K + k, dtype));
        size += std::pow(w * get(x.data(), m * K + k, dtype), 2);
      }
      const double off = get(y.data(), m * N + n, dtype) - sum;
      error += off * off;
      const double least = subnormal ? 0 : 1e-7;
      close &= std::fabs(off) <= 1e-6 * all + rounding * std::fabs(sum) + least;
    }
  }
  if (mode == FP4_INT8)
    close = std::sqrt(error) <= 1.5e-2 * std::sqrt(size) + rounding * std::sqrt(size);
  const bool whole = qdata.whole() && scale.whole() && tiles.whole() && x.whole() && y.whole() &&
                     bias.whole() && back.whole() && back_scale.whole();
  const bool same = memcmp(back.data(), qdata.data(), N * groups * group / 2) == 0 &&
                    memcmp(back_scale.data(), scale.data(), N * groups) == 0;
  char what[160];
  snprintf(what, sizeof what,
           "%s format %d dtype %d mode %d M %ld N %ld K %ld: ran %d close %d whole %d same %d",
           isa.name, format, dtype, mode, (long)M, (long)N, (long)K, ran, close, whole, same);
  expect(ran && close && whole && same, what);
}

// FP8 codes of all kinds but NaN, with a scale a row.
void check_fp8(const Fp4Isa& isa, int dtype, int64_t M, int64_t N, int64_t K) {
  const int64_t bytes = (K + Fp8::kGroup - 1) / Fp8::kGroup * kTileBytes<Fp8>;
  Buffer qdata(N * K), back(N * K), tiles((N + kPanelRows - 1) / kPanelRows * bytes);
  Buffer x(M * K * dtype_bytes(dtype)), y(M * N * dtype_bytes(dtype));
  for (int64_t i = 0; i < N * K; i++) {
    const uint32_t code = random_bits() & 0xFF;
    qdata.data()[i] = (code & 127) == 127 ? 0 : code;
  }
  for (int64_t i = 0; i < M * K; i++) put(x.data(), i, dtype, normal() / 64);
  std::vector<float> scale(N), wide(N);
  for (int64_t n = 0; n < N; n++) wide[n] = (scale[n] = .01f + n * .001f) * kE4M3Excess;
  const bool finite = fp8_to_tiles(qdata.data(), tiles.data(), N, K);
  fp8_from_tiles(tiles.data(), back.data(), N, K);
  const Fp4Linear call{x.data(), tiles.data(), wide.data(), nullptr,  y.data(), M, N,
                       K,        FP4_FP8,      dtype,       FP4_EXACT};
  bool close = isa.linear(&call, 1);
  const double rounding = dtype == FP4_FLOAT32 ? 0 : dtype == FP4_BFLOAT16 ? 0x1p-8 : 0x1p-11;
  for (int64_t m = 0; m < M; m++) {
    for (int64_t n = 0; n < N; n++) {
      double sum = 0, all = 0;
      for (int64_t k = 0; k < K; k++) {
        const uint8_t code = qdata.data()[n * K + k];
        const double w = decode_scale(FP4_NVFP4, code & 127) * scale[n] * (code & 128 ? -1 : 1);
        sum += w * get(x.data(), m * K + k, dtype);
        all += std::fabs(w * get(x.data(), m * K + k, dtype));
      }
      const double off = std::fabs(get(y.data(), m * N + n, dtype) - sum);
      close &= off <= 1e-6 * all + rounding * std::fabs(sum) + 1e-7;
    }
  }
  const bool whole = qdata.whole() && back.whole() && tiles.whole() && x.whole() && y.whole();
  const bool same = memcmp(back.data(), qdata.data(), N * K) == 0;
  char what[160];
  snprintf(what, sizeof what, "%s FP8 dtype %d M %ld N %ld K %ld: close %d whole %d same %d",
           isa.name, dtype, (long)M, (long)N, (long)K, close, whole, same);
  expect(finite && close && whole && same, what);
}

// Weights of one x in a call: the results of each alone, to the bit.
void check_together(const Fp4Isa& isa, int format, int dtype, int mode, int64_t M, int64_t K) {
  constexpr int64_t kSizes[] = {37, 0, 1600, 16};
  const int64_t group = format == FP4_NVFP4 ? 16 : 32, groups = (K + group - 1) / group;
  const int64_t tile = format == FP4_NVFP4 ? kTileBytes<Nvfp4> : kTileBytes<Mxfp4>;
  const auto pack = format == FP4_NVFP4 ? to_tiles<Nvfp4> : to_tiles<Mxfp4>;
  Buffer x(M * K * dtype_bytes(dtype));
  for (int64_t i = 0; i < M * K; i++) put(x.data(), i, dtype, normal());
  std::vector<Buffer> tiles, alone, together;
  std::vector<std::vector<float>> row_scales;
  std::vector<Fp4Linear> calls;
  bool same = true;
  for (int64_t N : kSizes) {
    Buffer qdata(N * groups * group / 2), scale(N * groups);
    for (int64_t i = 0; i < N * groups * group / 2; i++) qdata.data()[i] = random_bits() & 0xFF;
    for (int64_t i = 0; i < N * groups; i++) scale.data()[i] = 100 + random_bits() % 20;
    tiles.emplace_back((N + 15) / 16 * groups * tile);
    row_scales.emplace_back(N);
    pack(qdata.data(), scale.data(), .01f, tiles.back().data(), row_scales.back().data(), N,
         groups);
    alone.emplace_back(M * N * dtype_bytes(dtype));
    together.emplace_back(M * N * dtype_bytes(dtype));
  }
  for (size_t i = 0; i < std::size(kSizes); i++) {
    Fp4Linear call{x.data(),
                   tiles[i].data(),
                   row_scales[i].data(),
                   nullptr,
                   alone[i].data(),
                   M,
                   kSizes[i],
                   K,
                   format,
                   dtype,
                   mode};
    same &= isa.linear(&call, 1);
    call.y = together[i].data();
    calls.push_back(call);
  }
  same &= isa.linear(calls.data(), calls.size());
  for (size_t i = 0; i < calls.size(); i++) {
    same &= together[i].whole() && x.whole() &&
            memcmp(alone[i].data(), together[i].data(), M * kSizes[i] * dtype_bytes(dtype)) == 0;
  }
  char what[120];
  snprintf(what, sizeof what, "%s together: format %d dtype %d mode %d M %ld K %ld", isa.name,
           format, dtype, mode, (long)M, (long)K);
  expect(same, what);
}

// Attention against a float64 one: heads of queries that share, a mask of bytes or of numbers.
void check_attend(const Fp4Isa& isa, int dtype, int kind, int64_t M, int64_t S, int64_t D) {
  constexpr int64_t kBatch = 2, kHeads = 2, kShare = 3, H = kHeads * kShare;
  const int64_t size = dtype_bytes(dtype), cache = kBatch * kHeads * S * D;
  Buffer q(kBatch * H * M * D * size), k(cache * size), v(cache * size), y(q);
  Buffer mask(kBatch * M * S * (kind == FP4_MASK_SUM ? size : 1));
  for (int64_t i = 0; i < kBatch * H * M * D; i++) put(q.data(), i, dtype, 2 * normal());
  for (int64_t i = 0; i < cache; i++) put(k.data(), i, dtype, normal());
  for (int64_t i = 0; i < cache; i++) put(v.data(), i, dtype, normal());
  std::vector<double> more(kBatch * M * S);
  for (int64_t i = 0; i < kBatch * M * S; i++) {
    const bool seen = i % S == 0 || random_bits() % 3 > 0;
    if (kind == FP4_MASK_BOOL) mask.data()[i] = seen;
    if (kind == FP4_MASK_SUM) put(mask.data(), i, dtype, seen ? .5f : -1000.f);
    more[i] = kind == FP4_MASK_NONE || seen ? (kind == FP4_MASK_SUM) * .5 : -1000;
  }
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const Fp4Attention call{q.data(),    k.data(), v.data(),
                          mask.data(), y.data(), kBatch,
                          H,           kHeads,   M,
                          S,           D,        H * M * D,
                          M * D,       D,        kHeads * S * D,
                          S * D,       D,        kHeads * S * D,
                          S * D,       D,        M * S,
                          0,           S,        dtype,
                          kind,        scale};
  bool close = isa.attend(call);
  const double rounding = dtype == FP4_FLOAT32 ? 0 : dtype == FP4_BFLOAT16 ? 0x1p-8 : 0x1p-11;
  std::vector<double> weight(S);
  for (int64_t row = 0; row < kBatch * H * M; row++) {
    const int64_t m = row % M, h = row / M % H, b = row / M / H;
    const int64_t head = (b * kHeads + h / kShare) * S * D;
    double total = 0;
    for (int64_t s = 0; s < S; s++) {
      double score = 0;
      for (int64_t d = 0; d < D; d++) {
        score += get(q.data(), row * D + d, dtype) * get(k.data(), head + s * D + d, dtype);
      }
      total += weight[s] = std::exp(score * scale + more[(b * M + m) * S + s]);
    }
    for (int64_t d = 0; d < D; d++) {
      double sum = 0, all = 0;
      for (int64_t s = 0; s < S; s++) {
        sum += weight[s] / total * get(v.data(), head + s * D + d, dtype);
        all += weight[s] / total * std::fabs(get(v.data(), head + s * D + d, dtype));
      }
      const double off = get(y.data(), ((b * M + m) * H + h) * D + d, dtype) - sum;
      close &= std::fabs(off) <= 4e-6 * all + rounding * std::fabs(sum) + 1e-7;
    }
  }
  const bool whole = q.whole() && k.whole() && v.whole() && mask.whole() && y.whole();
  char what[120];
  snprintf(what, sizeof what, "%s attention: dtype %d mask %d M %ld S %ld D %ld: close %d whole %d",
           isa.name, dtype, kind, (long)M, (long)S, (long)D, close, whole);
  expect(close && whole, what);
}

void check_rounding(const Fp4Isa& isa, int format, int rule, int dtype, int64_t M, int64_t K,
                    int rotation) {
  const int64_t group = format == FP4_NVFP4 ? 16 : 32, groups = (K + group - 1) / group;
  Buffer x(M * K * dtype_bytes(dtype)), y[2] = {x, x}, turned[2] = {x, x};
  Buffer qdata[2] = {Buffer(M * groups * group / 2, 1), Buffer(M * groups * group / 2, 2)};
  Buffer scale[2] = {Buffer(M * groups, 1), Buffer(M * groups, 2)};
  for (int64_t i = 0; i < M * K; i++)
    put(x.data(), i, dtype, normal() * std::exp2f(random_bits() % 9));
  const Fp4Matrix in{x.data(), M, K, format, rule, dtype, rotation};
  float tensor[2];
  const Fp4Isa* both[2] = {&isa, &fp4_portable};
  bool whole = true;
  for (int i = 0; i < 2; i++) {
    both[i]->quantize(in, qdata[i].data(), scale[i].data(), &tensor[i]);
    both[i]->fake_quantize(in, y[i].data());
    both[i]->rotate(in, turned[i].data());
    whole &= qdata[i].whole() && scale[i].whole() && y[i].whole() && turned[i].whole() && x.whole();
  }
  const bool same = memcmp(qdata[0].data(), qdata[1].data(), M * groups * group / 2) == 0 &&
                    memcmp(scale[0].data(), scale[1].data(), M * groups) == 0 &&
                    memcmp(y[0].data(), y[1].data(), M * K * dtype_bytes(dtype)) == 0 &&
                    memcmp(turned[0].data(), turned[1].data(), M * K * dtype_bytes(dtype)) == 0 &&
                    tensor[0] == tensor[1];
  expect(same && whole, std::string(isa.name) + " rounding");
}

// What runs here; under an emulator FP4_EMULATED names what it emulates.
std::vector<const Fp4Isa*> to_check() {
#ifdef FP4_EMULATED
  return {FP4_EMULATED};
#else
  std::vector<const Fp4Isa*> found;
  const std::string names = fp4_available();
  for (size_t from = 0; from < names.size();) {
    const size_t to = std::min(names.find(',', from), names.size());
    fp4_use(names.substr(from, to - from).c_str());
    found.push_back(&fp4_chosen());
    from = to + 1;
  }
  return found;
#endif
}

}  // namespace

int main() {
  for (const Fp4Isa* isa : to_check()) {
    for (int dtype : {FP4_FLOAT32, FP4_BFLOAT16, FP4_FLOAT16}) {
      for (int64_t M : {0, 1, 2, 3, 5, 8, 9, 13, 31, 150}) {
        check_fp8(*isa, dtype, M, 1 + random_bits() % 70, 1 + random_bits() % 600);
      }
      check_fp8(*isa, dtype, 1, 237, 90);
      for (int mask : {FP4_MASK_NONE, FP4_MASK_BOOL, FP4_MASK_SUM}) {
        check_attend(*isa, dtype, mask, 1, 1 + random_bits() % 20, 1 + random_bits() % 40);
        check_attend(*isa, dtype, mask, 1, 700, 64);  // several runs a head
        check_attend(*isa, dtype, mask, 3, 45, 80);
      }
      check_fp8(*isa, dtype, 3, 16, 0);
    }
    check_fp8(*isa, FP4_FLOAT32, 40, 800, 100);
    for (int format : {FP4_NVFP4, FP4_MXFP4}) {
      check_linear(*isa, format, FP4_FLOAT32, FP4_EXACT, 40, 800, 100);  // outputs enough for tiles
      for (int dtype : {FP4_FLOAT32, FP4_BFLOAT16}) {
        if (format == FP4_MXFP4) {
          check_linear(*isa, format, dtype, FP4_EXACT, 20, 800, 64, Sizes::kSubnormal);
        }
      }
      for (int dtype : {FP4_FLOAT32, FP4_BFLOAT16, FP4_FLOAT16}) {
        for (int64_t M : {0, 1, 2, 3, 5, 8, 9, 13, 31, 150}) {
          const int64_t N = 1 + random_bits() % 70, K = 1 + random_bits() % 600;
          for (int mode : {FP4_EXACT, FP4_INT8}) {
            check_linear(*isa, format, dtype, mode, M, N, K);
            check_together(*isa, format, dtype, mode, M, K);
          }
        }
        check_linear(*isa, format, dtype, FP4_EXACT, 3, 16, 0);
        check_linear(*isa, format, dtype, FP4_EXACT, 1, 20, 2100, Sizes::kUneven);
        check_linear(*isa, format, dtype, FP4_EXACT, 1, 237, 90);    // 8 + 4 + 2 + 1 panels
        check_linear(*isa, format, dtype, FP4_EXACT, 2060, 20, 40);  // more than one call's rows
        for (int rule = 0; rule < (format == FP4_MXFP4 ? 4 : 1); rule++) {
          const int64_t M = 1 + random_bits() % 40;
          check_rounding(*isa, format, rule, dtype, M, 1 + random_bits() % 300, 0);
          for (int rotation : {16, 32, 64, 128}) {
            const int64_t K = rotation * (1 + random_bits() % 3);
            check_rounding(*isa, format, rule, dtype, M, K, rotation);
          }
        }
      }
    }
    printf("%s\n", isa->name);
  }
  printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
