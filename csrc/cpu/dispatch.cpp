// Which level runs: the highest that this machine (CPU and operating system) has, or the one that was asked for.
#include <atomic>
#include <cstring>
#if defined(QKERNELS_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace qk {

extern const Level level_portable, level_avx2, level_avx512vnni, level_avx512bf16, level_amx;  // those of them that this build has

namespace {

struct Entry {
  const Level* level;
  bool (*here)();
};

bool always() { return true; }

// __builtin_cpu_supports asks CPUID and, through XGETBV, whether the operating system saves the registers.
#ifdef QKERNELS_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}
#endif
#ifdef QKERNELS_EMULATE  // csrc/emulated: every machine has these
constexpr auto has_avx512vnni = always, has_avx512bf16 = always, has_amx = always;
#elif defined(QKERNELS_X86)
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }

#ifdef __linux__
// Tiles take 8 KiB a thread: Linux saves them for a process that has asked, which holds for all its threads, once for ever.
bool has_amx() {
  constexpr unsigned NEEDED = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & NEEDED) != NEEDED) return false;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}
#endif
#endif

const Entry LEVELS[] = {
#if (defined(QKERNELS_X86) && defined(__linux__)) || defined(QKERNELS_EMULATE)
    {&level_amx, has_amx},
#endif
#if defined(QKERNELS_X86) || defined(QKERNELS_EMULATE)
    {&level_avx512bf16, has_avx512bf16},
    {&level_avx512vnni, has_avx512vnni},
#endif
#ifdef QKERNELS_X86
    {&level_avx2, has_avx2},
#endif
    {&level_portable, always},
};

std::atomic<const Level*> chosen{nullptr};

}  // namespace

bool set_level(const char* name) {
  for (const Entry& e : LEVELS)
    if ((*name == 0 || std::strcmp(name, e.level->name) == 0) && e.here()) {
      chosen = e.level;
      return true;
    }
  return false;
}

bool has_level(const char* name) {
  for (const Entry& e : LEVELS)
    if (std::strcmp(name, e.level->name) == 0) return e.here();
  return false;
}

bool pairs_pay() {
#ifdef QKERNELS_EMULATE
  return best_level() != &level_amx;
#elif defined(QKERNELS_X86)
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
#else
  return false;
#endif
}

const Level* best_level() {
  if (chosen.load(std::memory_order_relaxed) == nullptr) set_level("");
  return chosen.load(std::memory_order_relaxed);
}

}  // namespace qk
