// Sums and maxima over a warp and over a block, always in the same order: equal inputs give equal bits.
#pragma once

#include <cuda_runtime.h>

#include "launch_config.cuh"

namespace excessmtl::cuda {

constexpr unsigned kFullWarp = 0xffffffffU;

struct Sum {
  static __device__ __forceinline__ double identity() { return 0.0; }
  static __device__ __forceinline__ double join(double a, double b) { return a + b; }
};

struct Max {
  static __device__ __forceinline__ double identity() { return -HUGE_VAL; }
  static __device__ __forceinline__ double join(double a, double b) { return a > b ? a : b; }
};

// The same value in every lane. Called by whole warps.
template <class Operation>
__device__ __forceinline__ double warp_reduce(double value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = Operation::join(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// The same value in every thread. Called by whole blocks; warp_values: kWarps numbers of shared memory, free again on return
// only after the next barrier, which the next call brings itself.
template <class Operation>
__device__ __forceinline__ double block_reduce(double value, double* warp_values) {
  value = warp_reduce<Operation>(value);
  __syncthreads();  // another warp may still read warp_values of the call before
  if (threadIdx.x % kWarpSize == 0) {
    warp_values[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  double result = Operation::identity();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    result = Operation::join(result, warp_values[warp]);
  }
  return result;
}

}  // namespace excessmtl::cuda
