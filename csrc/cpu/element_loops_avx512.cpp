// The CPU loops for AVX-512. The target is set here and not by a compiler flag, so that CMake and the ninja build
// share one set of flags. The pragma comes first: templates take the target in force where the file ends.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#include <immintrin.h>
#define ISA_AVX512 1
#include "element_loops.inc"
#endif

#include "element_loops.h"

namespace excessmtl::cpu {

const Capability* avx512_capability() {
#if defined(ISA_AVX512)
  static constexpr Capability capability = {"avx512",           &kFloatStateLoops,
                                            &kDoubleStateLoops, &kBFloat16StateLoops,
                                            &kFloatFoldLoops,   &kDoubleFoldLoops};
  return &capability;
#else
  return nullptr;
#endif
}

}  // namespace excessmtl::cpu

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute pop
#endif
