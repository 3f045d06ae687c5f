// The inner loops, compiled once per instruction set with -DOSS_CPU_CAPABILITY=<name>. The fused
// multiply-adds are written out, so -ffp-contract=off; NaN and inf are honoured, so never
// -ffast-math. Beside that, the flags
//
//     plain    none: SSE2, NEON, or whatever the compiler's baseline has
//     avx2     -mavx2 -mfma -mf16c
//     avx512   -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl

#include "cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace oss::cpu::OSS_CPU_CAPABILITY {

// clang-format off: each needs the ones before.
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/loops.h"
// clang-format on

#define OSS_STRING(name) #name
#define OSS_NAME(name) OSS_STRING(name)

const Kernels kernels = {OSS_NAME(OSS_CPU_CAPABILITY), cost, advance};

}  // namespace oss::cpu::OSS_CPU_CAPABILITY
