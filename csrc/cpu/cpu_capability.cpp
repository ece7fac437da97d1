// cpu_capability, and the choice behind it: which instruction set the CPU loops use.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "element_loops.h"

namespace excessmtl::cpu {

const Capability& capability() {
  static const Capability* const chosen = [] {
    const Capability* candidates[] = {avx512_capability(), avx2_capability(), default_capability()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool supported[] = {
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("fma"),
        // GCC 12 cannot ask for F16C, but every processor with AVX2 has it.
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), true};
#else
    const bool supported[] = {false, false, true};
#endif
    const char* wanted = std::getenv("EXCESSMTL_CPU_CAPABILITY");
    int first = 0;
    for (int k = 0; wanted != nullptr && k < 3; ++k) {
      if (candidates[k] != nullptr && std::strcmp(wanted, candidates[k]->name) == 0) {
        first = k;
      }
    }
    for (int k = first; k < 3; ++k) {
      if (candidates[k] != nullptr && supported[k]) {
        return candidates[k];
      }
    }
    return default_capability();
  }();
  return *chosen;
}

namespace {

std::string cpu_capability() { return capability().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace excessmtl::cpu
