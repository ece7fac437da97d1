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
#include "state_access.cuh"

namespace excessmtl::cuda {

template <typename state_t>
struct CombineArgs {
  ParamChunks chunks;
  GradScale grad_scale;         // for the repair only: outputs keep the scale
  const double* task_weights;   // [T]
  const bool* found_nonfinite;  // [T]
  state_t* sq_grad_sum;         // [T, padded P]; nullptr: nothing to repair
  state_t* grad_mean;           // like sq_grad_sum; not read without momentum
  typename StateAccess<state_t>::Rounding rounding;
  int64_t row_stride;                                     // padded P
  ElementOptions<Accumulation<state_t>> element_options;  // inverse_scale is set on the device
  int num_tasks;
  bool has_outputs;
  bool accumulate;
};
static_assert(sizeof(CombineArgs<double>) <= kArgumentBytes,
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

// This thread's part of one slice after a non-finite step: takes the gradients out of the state again and leaves NaN in the
// output. Element by element, since the output may be a gradient: it is overwritten when every task has been repaired. Rare, so
// it is written for clarity.
template <typename grad_t, typename state_t, int kStride, int kCapacity>
__device__ __forceinline__ void repair_slice(const CombineColumn<grad_t, kCapacity>& column,
                                             int index, const CombineArgs<state_t>& args,
                                             const ElementOptions<Accumulation<state_t>>& options) {
  using State = StateAccess<state_t>;
  using acc_t = Accumulation<state_t>;
  const bool has_momentum = options.momentum > acc_t(0);
  for (int at = index; at < column.slice.numel; at += kStride) {
    for (int task = 0; args.sq_grad_sum != nullptr && task < column.num_tasks; ++task) {
      const grad_t* data = column.grad(task);
      if (data == nullptr) {
        continue;
      }
      const acc_t grad = GradVector<grad_t>::widen(__ldcg(data + at));
      const int64_t position = task * args.row_stride + column.slice.position + at;
      const RoundingKey key = State::row_key(args.rounding, task, RoundingUse::kRepair);
      const uint32_t word = State::word_at(slice_rounding(key, column.slice.position), at);
      acc_t sum = State::widen(__ldcg(args.sq_grad_sum + position));
      acc_t mean = acc_t(0);
      if (has_momentum) {
        mean = State::widen(__ldcg(args.grad_mean + position));
        repair_state<ScalarMath<acc_t>, true>(grad, sum, mean, options);
        __stcg(args.grad_mean + position, State::narrow(mean, word, RandomHalf::kGradMean));
      } else {
        repair_state<ScalarMath<acc_t>, false>(grad, sum, mean, options);
      }
      __stcg(args.sq_grad_sum + position, State::narrow(sum, word, RandomHalf::kSqGradSum));
    }
    if (args.has_outputs && column.output() != nullptr) {
      __stcg(column.output() + at, GradVector<grad_t>::narrow(acc_t(NAN)));
    }
  }
}

// This block's chunks of the weighted sum, or of the repair.
template <typename grad_t, typename state_t, int kCapacity>
__device__ __forceinline__ void combine_chunks(const CombineArgs<state_t>& args,
                                               const PointerTable<kCapacity>& tensors,
                                               Accumulation<state_t>* task_weights,
                                               int64_t first_chunk, int64_t chunk_step) {
  using acc_t = Accumulation<state_t>;
  bool found = false;
  for (int task = static_cast<int>(threadIdx.x); task < args.num_tasks; task += kThreads) {
    task_weights[task] = static_cast<acc_t>(__ldcg(args.task_weights + task));
    found |= __ldcg(reinterpret_cast<const unsigned char*>(args.found_nonfinite) + task) != 0;
  }
  const bool repairs = __syncthreads_or(found) != 0;  // also: the weights are in place
  if (!repairs && !args.has_outputs) {
    return;
  }
  ElementOptions<acc_t> options = args.element_options;
  options.inverse_scale = static_cast<acc_t>(1.0 / args.grad_scale.value());
  for (int64_t chunk = first_chunk; chunk < args.chunks.num_chunks; chunk += chunk_step) {
    args.chunks.visit_slices(chunk, [&](const Slice& slice, auto workers) {
      constexpr int kStride = decltype(workers)::stride;
      const CombineColumn<grad_t, kCapacity> column = {tensors, args.chunks.num_tensors,
                                                       args.num_tasks, slice};
      if (repairs) {
        repair_slice<grad_t, state_t, kStride>(column, workers.index, args, options);
      } else {
        combine_slice<grad_t, acc_t, kStride>(column, workers.index, task_weights, args.accumulate);
      }
    });
  }
}

// outputs (+)= sum_i task_weights_i task_grads_i (He et al. 2024, Algorithm 1); after a non-finite step: repairs sq_grad_sum and
// grad_mean and fills the outputs with NaN. Which of the two is read on the device.
//
// Grid:         grid_of() for one task: x = walks over the chunks; block = kThreads threads.
// Traffic:      every gradient read once, every output written once (and read once when accumulating).
// Determinism:  each element is summed by one thread in task order.
// Precondition: an output is a gradient of the same parameter, or overlaps none.
template <typename grad_t, typename state_t, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<Accumulation<state_t>>)
    combine_kernel(const __grid_constant__ CombineArgs<state_t> args,
                   const __grid_constant__ PointerTable<kCapacity> tensors) {
  using Shared = CombineShared<Accumulation<state_t>>;
  Shared& shared = block_shared<Shared>();
  args.chunks.check(args.row_stride);
  combine_chunks<grad_t, state_t>(args, tensors, shared.task_weights, blockIdx.x, gridDim.x);
}

}  // namespace excessmtl::cuda
