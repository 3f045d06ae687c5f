// Which compilation of the inner loops to run.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace oss::cpu {

// Those that this machine can run, best first.
struct Available {
  const Kernels* list[3];
  int count = 0;

  Available() {
#if defined(OSS_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2())
      list[count++] = &avx512::kernels;
#endif
#if defined(OSS_HAVE_AVX2)
    if (has_avx2()) list[count++] = &avx2::kernels;
#endif
    list[count++] = &plain::kernels;
  }

 private:
#if defined(OSS_HAVE_AVX2)
  static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
};

inline const Kernels& choose_kernels() {
  const Available available;
  const char* wanted = std::getenv("OSS_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return *available.list[0];
  std::string names;
  for (int i = 0; i < available.count; ++i) {
    if (std::string(wanted) == available.list[i]->name) return *available.list[i];
    names += std::string(i == 0 ? "" : ", ") + available.list[i]->name;
  }
  throw std::runtime_error("OSS_CPU_CAPABILITY is '" + std::string(wanted) +
                           "', but this machine and build have: " + names);
}

inline const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace oss::cpu
