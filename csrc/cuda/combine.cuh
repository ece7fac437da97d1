// The kernel of combine_.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "block_shared.cuh"
#include "element_access.cuh"
#include "launch_config.cuh"
#include "param_chunks.cuh"
#include "pointer_table.cuh"

namespace excessmtl::cuda {

struct CombineArgs {
  ParamChunks chunks;
  const double* task_weights;   // [T]
  const bool* found_nonfinite;  // [T]
  int64_t row_stride;           // padded P
  int num_tasks;
  bool has_outputs;
  bool accumulate;
};
static_assert(sizeof(CombineArgs) <= kArgumentBytes,
              "The pointer tables leave kArgumentBytes for the arguments.");

template <typename acc_t>
struct CombineShared {
  acc_t task_weights[kMaxTasks];
};

// The T gradients and the output of one parameter, from the same element on.
template <typename grad_t, int kCapacity>
struct CombineColumn {
  const PointerTable<kCapacity>& tensors;  // T x L gradients, then L outputs
  int64_t num_tensors;
  int num_tasks;
  Slice slice;

  // nullptr where the task has no gradient for this parameter.
  __device__ __forceinline__ const grad_t* grad(int task) const {
    const auto* data = static_cast<const grad_t*>(tensors[task * num_tensors + slice.segment]);
    return data != nullptr ? data + slice.in_segment : nullptr;
  }
  // nullptr where no output is wanted for this parameter.
  __device__ __forceinline__ grad_t* output() const {
    const auto* data = static_cast<const grad_t*>(tensors[num_tasks * num_tensors + slice.segment]);
    return data != nullptr ? const_cast<grad_t*>(data) + slice.in_segment : nullptr;
  }
};

// This thread's part of one slice of the weighted sum. An output may be one of the gradients, so gradients are read as memory
// that changes (never through the read-only path), and each element is read by the thread that then writes it.
template <typename grad_t, typename acc_t, int kStride, int kCapacity>
__device__ __forceinline__ void combine_slice(const CombineColumn<grad_t, kCapacity>& column,
                                              int index, const acc_t* task_weights,
                                              bool accumulate) {
  using vector_t = typename GradVector<grad_t>::vector_t;
  constexpr int kWidth = GradVector<grad_t>::kWidth;
  // With 8 blocks per SM, 64 KiB in flight even where the loop over tasks waits for each load.
  constexpr int kBatch = 2;
  const int num_tasks = column.num_tasks;
  const int numel = column.slice.numel;
  grad_t* const output = column.output();
  if (output == nullptr) {
    return;
  }
  bool is_aligned = is_aligned_for<vector_t>(output);
  for (int task = 0; task < num_tasks; ++task) {
    is_aligned = is_aligned && is_aligned_for<vector_t>(column.grad(task));  // nullptr is aligned
  }
  int done = 0;
  if (is_aligned) {
    const int num_vectors = numel / kWidth;
    auto* output_vectors = reinterpret_cast<vector_t*>(output);
    for (int first = index; first < num_vectors; first += kBatch * kStride) {
      acc_t sums[kBatch][kWidth] = {};
      for (int task = 0; task < num_tasks; ++task) {
        const auto* grad_vectors = reinterpret_cast<const vector_t*>(column.grad(task));
        if (grad_vectors == nullptr) {
          continue;
        }
        vector_t loaded[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (first + k * kStride < num_vectors) {
            loaded[k] = __ldcg(grad_vectors + first + k * kStride);
          }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (first + k * kStride < num_vectors) {
            acc_t grad[kWidth];
            GradVector<grad_t>::unpack(loaded[k], grad);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              sums[k][j] += task_weights[task] * grad[j];
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int at = first + k * kStride;
        if (at < num_vectors) {
          if (accumulate) {
            acc_t old[kWidth];
            GradVector<grad_t>::unpack(__ldcg(output_vectors + at), old);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              sums[k][j] += old[j];
            }
          }
          __stcg(output_vectors + at, GradVector<grad_t>::pack(sums[k]));
        }
      }
    }
    done = num_vectors * kWidth;
  }
  for (int at = done + index; at < numel; at += kStride) {
    acc_t sum = acc_t(0);
    for (int task = 0; task < num_tasks; ++task) {
      const grad_t* grad = column.grad(task);
      if (grad != nullptr) {
        sum += task_weights[task] * GradVector<grad_t>::widen(__ldcg(grad + at));
      }
    }
    if (accumulate) {
      sum += GradVector<grad_t>::widen(__ldcg(output + at));
    }
    __stcg(output + at, GradVector<grad_t>::narrow(sum));
  }
}

// This thread's part of one slice after a non-finite step: NaN.
template <typename grad_t, typename acc_t, int kStride, int kCapacity>
__device__ __forceinline__ void fill_slice(const CombineColumn<grad_t, kCapacity>& column,
                                           int index) {
  grad_t* const output = column.output();
  if (output == nullptr) {
    return;
  }
  for (int at = index; at < column.slice.numel; at += kStride) {
    __stcg(output + at, GradVector<grad_t>::narrow(acc_t(NAN)));
  }
}

// This block's chunks of the weighted sum, or of NaN.
template <typename grad_t, typename acc_t, int kCapacity>
__device__ __forceinline__ void combine_chunks(const CombineArgs& args,
                                               const PointerTable<kCapacity>& tensors,
                                               acc_t* task_weights, int64_t first_chunk,
                                               int64_t chunk_step) {
  bool found = false;
  for (int task = static_cast<int>(threadIdx.x); task < args.num_tasks; task += kThreads) {
    task_weights[task] = static_cast<acc_t>(__ldcg(args.task_weights + task));
    found |= __ldcg(reinterpret_cast<const unsigned char*>(args.found_nonfinite) + task) != 0;
  }
  const bool counts = __syncthreads_or(found) == 0;  // also: the weights are in place
  if (!args.has_outputs) {
    return;
  }
  for (int64_t chunk = first_chunk; chunk < args.chunks.num_chunks; chunk += chunk_step) {
    args.chunks.visit_slices(chunk, [&](const Slice& slice, auto workers) {
      constexpr int kStride = decltype(workers)::stride;
      const CombineColumn<grad_t, kCapacity> column = {tensors, args.chunks.num_tensors,
                                                       args.num_tasks, slice};
      if (counts) {
        combine_slice<grad_t, acc_t, kStride>(column, workers.index, task_weights, args.accumulate);
      } else {
        fill_slice<grad_t, acc_t, kStride>(column, workers.index);
      }
    });
  }
}

// outputs (+)= sum_i task_weights_i task_grads_i (He et al. 2024, Algorithm 1); after a non-finite step: NaN. Which of the two
// is read on the device.
//
// Grid:         grid_of() for one task: x = walks over the chunks; block = kThreads threads.
// Traffic:      every gradient read once, every output written once (and read once when accumulating).
// Determinism:  each element is summed by one thread in task order.
// Precondition: an output is a gradient of the same parameter, or overlaps none.
template <typename grad_t, typename acc_t, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<acc_t>)
    combine_kernel(const __grid_constant__ CombineArgs args,
                   const __grid_constant__ PointerTable<kCapacity> tensors) {
  CombineShared<acc_t>& shared = block_shared<CombineShared<acc_t>>();
  args.chunks.check(args.row_stride);
  combine_chunks<grad_t>(args, tensors, shared.task_weights, blockIdx.x, gridDim.x);
}

}  // namespace excessmtl::cuda
