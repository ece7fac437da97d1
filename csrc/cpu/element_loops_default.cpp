// The CPU loops for every machine: SSE2 on x86-64, NEON on ARM through the compiler's own vectorisation.
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "element_loops.inc"

namespace excessmtl::cpu {

const Capability* default_capability() {
  static constexpr Capability capability = {"default",          &kFloatStateLoops,
                                            &kDoubleStateLoops, &kBFloat16StateLoops,
                                            &kFloatFoldLoops,   &kDoubleFoldLoops};
  return &capability;
}

}  // namespace excessmtl::cpu
