// Which level runs: the highest that this machine (CPU and operating system) has, or the one that was asked for.
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace qk {

extern const Level level_portable, level_avx2, level_avx512vnni;  // those of them that this build has

namespace {

struct Entry {
  const Level* level;
  bool (*here)();
};

// __builtin_cpu_supports asks CPUID and, through XGETBV, whether the operating system saves the registers.
const Entry LEVELS[] = {
#ifdef QKERNELS_EMULATE  // csrc/emulated: every machine has these
    {&level_avx512vnni, [] { return true; }},
#elif defined(QKERNELS_X86)
    {&level_avx512vnni,
     [] {
       return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2"));
     }},
#endif
#ifdef QKERNELS_X86
    {&level_avx2, [] { return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")); }},
#endif
    {&level_portable, [] { return true; }},
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

const Level* best_level() {
  if (chosen.load(std::memory_order_relaxed) == nullptr) set_level("");
  return chosen.load(std::memory_order_relaxed);
}

}  // namespace qk
