// The CPU loops for AVX2 with FMA and F16C. The target is set here and not by a compiler flag, so that CMake and the ninja build
// share one set of flags. The pragma comes first: templates take the target in force where the file ends.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>
#define ISA_AVX2 1
#include "element_loops.inc"
#endif

#include "element_loops.h"

namespace excessmtl::cpu {

const Capability* avx2_capability() {
#if defined(ISA_AVX2)
  static constexpr Capability capability = {
      "avx2",           &kFloatStateLoops, &kDoubleStateLoops, &kBFloat16StateLoops,
      &kFloatFoldLoops, &kDoubleFoldLoops};
  return &capability;
#else
  return nullptr;
#endif
}

}  // namespace excessmtl::cpu

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
