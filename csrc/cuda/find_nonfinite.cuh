// The first phase of a step: which tasks have a gradient that is not finite. A step with any writes no state.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "block_shared.cuh"
#include "element_access.cuh"
#include "launch_config.cuh"
#include "param_chunks.cuh"
#include "pointer_table.cuh"
#include "step_args.cuh"

namespace excessmtl::cuda {

// kGradsChange: the same launch writes to gradients later, which the read-only path must not have seen before.
template <bool kGradsChange, typename T>
__device__ __forceinline__ T load_grad(const T* address) {
  if constexpr (kGradsChange) {
    return __ldcg(address);
  } else {
    return __ldg(address);
  }
}

// Whether this thread's part of one slice holds a gradient whose square is not finite.
template <typename grad_t, bool kGradsChange, int kStride>
__device__ __forceinline__ bool finds_nonfinite_in_slice(
    const grad_t* __restrict__ grad, int numel, int index,
    typename GradVector<grad_t>::acc_t inverse_scale) {
  using acc_t = typename GradVector<grad_t>::acc_t;
  using vector_t = typename GradVector<grad_t>::vector_t;
  constexpr int kWidth = GradVector<grad_t>::kWidth;
  constexpr int kBatch = kVectorsInFlight;
  bool found = false;
  const auto look_at = [&](const vector_t& vector) {
    acc_t grads[kWidth];
    GradVector<grad_t>::unpack(vector, grads);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      found |= !has_finite_square(grads[k], inverse_scale);
    }
  };
  int done = 0;
  if (is_aligned_for<vector_t>(grad)) {
    const auto* vectors = reinterpret_cast<const vector_t*>(grad);
    const int num_vectors = numel / kWidth;
    int at = index;
    for (; at + (kBatch - 1) * kStride < num_vectors; at += kBatch * kStride) {
      vector_t loaded[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        loaded[k] = load_grad<kGradsChange>(vectors + at + k * kStride);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        look_at(loaded[k]);
      }
    }
#pragma unroll 1  // fewer vectors than a batch are left
    for (; at < num_vectors; at += kStride) {
      look_at(load_grad<kGradsChange>(vectors + at));
    }
    done = num_vectors * kWidth;
  }
  // The last elements, or all of them where the gradient is not aligned.
  for (int at = done + index; at < numel; at += kStride) {
    found |= !has_finite_square(GradVector<grad_t>::widen(load_grad<kGradsChange>(grad + at)),
                                inverse_scale);
  }
  return found;
}

// This block's chunks of its task. Flags are set and never cleared, so the order of the blocks does not matter.
template <typename grad_t, typename state_t, bool kGradsChange, int kCapacity>
__device__ __forceinline__ void find_nonfinite_in_chunks(const StepArgs<state_t>& args,
                                                         const PointerTable<kCapacity>& grads) {
  const int task = static_cast<int>(blockIdx.y);
  if (!args.present.contains(task)) {
    return;
  }
  const auto inverse_scale =
      static_cast<typename GradVector<grad_t>::acc_t>(1.0 / args.grad_scale.value());
  const int64_t first_tensor = task * args.chunks.num_tensors;
  bool found = false;
  for (int64_t chunk = blockIdx.x; chunk < args.chunks.num_chunks; chunk += gridDim.x) {
    args.chunks.visit_slices(chunk, [&](const Slice& slice, auto workers) {
      const auto* grad = static_cast<const grad_t*>(grads[first_tensor + slice.segment]);
      if (grad != nullptr) {
        found |= finds_nonfinite_in_slice<grad_t, kGradsChange, decltype(workers)::stride>(
            grad + slice.in_segment, slice.numel, workers.index, inverse_scale);
      }
    });
  }
  if (__syncthreads_or(found) != 0 && threadIdx.x == 0) {
    atomicOr(args.found_nonfinite + task, 1U);
  }
}

// Whether any task of the step is flagged; in every thread of the block.
template <typename state_t>
__device__ __forceinline__ bool any_nonfinite(const StepArgs<state_t>& args) {
  bool found = false;
  for (int task = static_cast<int>(threadIdx.x); task < args.num_tasks; task += kThreads) {
    // From L2: another SM may have set it in this launch.
    found |= __ldcg(args.found_nonfinite + task) != 0;
  }
  return __syncthreads_or(found) != 0;
}

// Sets args.found_nonfinite, which is 0 on entry.
//
// Grid:     that of fused_step_kernel, which follows.
// Traffic:  every gradient read once: 4 bytes per float32 element.
template <typename grad_t, typename state_t, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<Accumulation<state_t>>)
    find_nonfinite_kernel(const __grid_constant__ StepArgs<state_t> args,
                          const __grid_constant__ PointerTable<kCapacity> grads) {
  args.chunks.check(args.row_stride);
  find_nonfinite_in_chunks<grad_t, state_t, false>(args, grads);
}

}  // namespace excessmtl::cuda
