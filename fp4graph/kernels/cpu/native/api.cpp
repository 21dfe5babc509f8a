// What needs no torch and no instruction set: which one is in use.
#include <atomic>
#include <cstring>
#include <string>

#include "fp4.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)
bool has_tiles() {  // and may use them: Linux wants to be asked
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & kBf16 && d & kTile &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Fp4Isa* const* available() {  // best first, null at the end
  static const Fp4Isa* found[6] = {};
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  const bool bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  // On Intel vdpbf16ps is slower than two conversions and FMAs: bench/results, Emerald Rapids.
  const bool slow = __builtin_cpu_is("intel");
  if (bf16 && has_tiles()) found[n++] = &fp4_amx;
  if (bf16 && !slow) found[n++] = &fp4_avx512bf16;
  if (avx512) found[n++] = &fp4_avx512;
  if (bf16 && slow) found[n++] = &fp4_avx512bf16;
  if (avx2) found[n++] = &fp4_avx2;
#elif defined(__aarch64__)
  found[n++] = &fp4_neon;  // part of the architecture
#endif
  found[n++] = &fp4_portable;
  return found;
}

const Fp4Isa* const* const isas = available();
std::atomic<const Fp4Isa*> chosen{isas[0]};

constexpr int kFormats = FP4_FP8 + 1, kDtypes = FP4_FLOAT64 + 1, kCrossings = 8;
std::atomic<int64_t> crossings[kFormats][kDtypes][kCrossings];  // 0 for none

}  // namespace

Fp4Mode fp4_mode(int format, int dtype, int64_t M) {
  int passed = 0;
  for (const auto& rows : crossings[format][dtype]) {
    const int64_t from = rows.load(std::memory_order_relaxed);
    if (from == 0 || M < from) break;
    passed++;
  }
  return passed % 2 ? FP4_INT8 : FP4_EXACT;
}

const Fp4Isa& fp4_chosen() { return *chosen.load(std::memory_order_relaxed); }

extern "C" {

const char* fp4_available() {
  static const std::string names = [] {
    std::string text;
    for (auto each = isas; *each != nullptr; each++) {
      text += (text.empty() ? "" : ",") + std::string((*each)->name);
    }
    return text;
  }();
  return names.c_str();
}

int fp4_use(const char* name) {
  for (auto each = isas; *each != nullptr; each++) {
    if (name == nullptr || strcmp(name, (*each)->name) == 0) {
      chosen = *each;
      return 0;
    }
  }
  return 1;
}

const char* fp4_isa() { return fp4_chosen().name; }

int fp4_cross(int format, int dtype, const int64_t* rows, int count) {
  if (count > kCrossings) return 1;
  for (int i = 0; i < kCrossings; i++) crossings[format][dtype][i] = i < count ? rows[i] : 0;
  return 0;
}
}
