// Shared memory of a block, as one object of a plain type.
#pragma once

#include <cuda_runtime.h>

namespace excessmtl::cuda {

// Call it once per kernel and type. Its content is undefined on entry. In the tests' host build the shim owns the memory: there
// several blocks live in one thread of the operating system, so a static variable would be shared by all of them.
template <typename Shared>
__device__ __forceinline__ Shared& block_shared() {
#if defined(__CUDACC__)
  __shared__ Shared shared;
  return shared;
#else
  return simt::block_shared<Shared>();
#endif
}

}  // namespace excessmtl::cuda
