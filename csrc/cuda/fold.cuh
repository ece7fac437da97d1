// The kernels of fold_.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "element_access.cuh"
#include "launch_config.cuh"
#include "param_chunks.cuh"
#include "pointer_table.cuh"

namespace excessmtl::cuda {

template <typename acc_t>
struct FoldArgs {
  ParamChunks chunks;
  const double* log_weight;       // of the task whose gradients these are
  const double* running_log_max;  // the largest log-weight before this task
  acc_t* running_sum;             // [padded P], 16-byte aligned
  int64_t padded_numel;
};

// This thread's part of one slice; grad nullptr: the task has no gradient there, but the sum is rescaled all the same.
template <typename grad_t, typename acc_t, int kStride>
__device__ __forceinline__ void fold_slice(const grad_t* __restrict__ grad,
                                           acc_t* __restrict__ running_sum, int numel, int index,
                                           acc_t keep, acc_t add) {
  using grad_vector_t = typename GradVector<grad_t>::vector_t;
  using state_vector_t = typename StateVector<acc_t>::vector_t;
  constexpr int kWidth = StateVector<acc_t>::kWidth;
  int done = 0;
  if (grad != nullptr && is_aligned_for<grad_vector_t>(grad)) {
    const auto* grad_vectors = reinterpret_cast<const grad_vector_t*>(grad);
    auto* sum_vectors = reinterpret_cast<state_vector_t*>(running_sum);
    const int num_vectors = numel / kWidth;
#pragma unroll 4
    for (int at = index; at < num_vectors; at += kStride) {
      acc_t grads[kWidth];
      acc_t sums[kWidth];
      GradVector<grad_t>::unpack(__ldg(grad_vectors + at), grads);
      StateVector<acc_t>::unpack(__ldcg(sum_vectors + at), sums);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        sums[k] = sums[k] * keep + grads[k] * add;
      }
      __stcg(sum_vectors + at, StateVector<acc_t>::pack(sums));
    }
    done = num_vectors * kWidth;
  }
  for (int at = done + index; at < numel; at += kStride) {
    const acc_t sum = __ldcg(running_sum + at) * keep;
    __stcg(running_sum + at,
           grad != nullptr ? sum + GradVector<grad_t>::widen(__ldg(grad + at)) * add : sum);
  }
}

// running_sum <- keep * running_sum + add * grad, keep and add from the two log-weights (streaming combine).
//
// Grid:         grid_of() for one task: x = walks over the chunks; block = kThreads threads.
// Traffic:      gradient read once, running_sum read once and written once.
// Determinism:  elements do not meet.
// Precondition: running_log_max is still the old one: update_log_max_kernel follows on the same stream.
template <typename grad_t, typename acc_t, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<acc_t>)
    fold_kernel(const __grid_constant__ FoldArgs<acc_t> args,
                const __grid_constant__ PointerTable<kCapacity> grads) {
  args.chunks.check(args.padded_numel);
  const FoldFactors factors = fold_factors(__ldg(args.log_weight), __ldg(args.running_log_max));
  const acc_t keep = static_cast<acc_t>(factors.keep);
  const acc_t add = static_cast<acc_t>(factors.add);
  for (int64_t chunk = blockIdx.x; chunk < args.chunks.num_chunks; chunk += gridDim.x) {
    args.chunks.visit_slices(chunk, [&](const Slice& slice, auto workers) {
      const auto* data = static_cast<const grad_t*>(grads[slice.segment]);
      fold_slice<grad_t, acc_t, decltype(workers)::stride>(
          data != nullptr ? data + slice.in_segment : nullptr, args.running_sum + slice.position,
          slice.numel, workers.index, keep, add);
    });
  }
}

// Moves the largest log-weight on, after every block of fold_kernel has read the old one.
//
// Grid: one thread.
__global__ void update_log_max_kernel(const double* log_weight, double* running_log_max) {
  *running_log_max = fold_factors(*log_weight, *running_log_max).log_max;
}

}  // namespace excessmtl::cuda
