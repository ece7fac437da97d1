// The kernel of fused_step_ and accumulate_excess_risk_.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "block_shared.cuh"
#include "block_sum.cuh"
#include "element_access.cuh"
#include "find_nonfinite.cuh"
#include "launch_config.cuh"
#include "param_chunks.cuh"
#include "pointer_table.cuh"
#include "state_access.cuh"
#include "step_args.cuh"
#include "task_updates.cuh"

namespace excessmtl::cuda {

struct StepShared {
  double warp_values[kWarps];
  double part_sums[kMaxTasks];
  bool is_last;
};

// Adds one vector of gradients to the state in registers and returns its share of the excess risk. at: its first element in the
// slice.
template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum>
__device__ __forceinline__ Accumulation<state_t> accumulate_vector(
    const typename GradVector<grad_t>::vector_t& grad_vector,
    typename StateAccess<state_t>::vector_t& sum_vector,
    typename StateAccess<state_t>::vector_t& mean_vector, int at, const SliceRounding& rounding,
    const ElementOptions<Accumulation<state_t>>& options) {
  using State = StateAccess<state_t>;
  using acc_t = Accumulation<state_t>;
  constexpr int kWidth = State::kWidth;
  acc_t grad[kWidth];
  acc_t sum[kWidth];
  acc_t mean[kWidth] = {};
  GradVector<grad_t>::unpack(grad_vector, grad);
  State::unpack(sum_vector, sum);
  if constexpr (kMomentum) {
    State::unpack(mean_vector, mean);
  }
  acc_t risk = acc_t(0);
  uint32_t words[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    risk += accumulate_excess_risk<ScalarMath<acc_t>, kSqrtFisher, kMomentum>(grad[k], sum[k],
                                                                              mean[k], options);
    words[k] = State::word_at(rounding, at + k);
  }
  sum_vector = State::pack_state(sum, words, RandomHalf::kSqGradSum);
  if constexpr (kMomentum) {
    mean_vector = State::pack_state(mean, words, RandomHalf::kGradMean);
  }
  return risk;
}

// This thread's part of one slice. The state is read once and written once, so it streams past the caches and leaves them to
// the gradients, which combine_ reads again.
template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum, bool kGradsChange,
          int kStride>
__device__ __forceinline__ Accumulation<state_t> accumulate_slice(
    const grad_t* __restrict__ grad, state_t* __restrict__ sq_grad_sum,
    state_t* __restrict__ grad_mean, int numel, int index, const SliceRounding& rounding,
    const ElementOptions<Accumulation<state_t>>& options) {
  using State = StateAccess<state_t>;
  using acc_t = Accumulation<state_t>;
  using grad_vector_t = typename GradVector<grad_t>::vector_t;
  using state_vector_t = typename State::vector_t;
  constexpr int kWidth = State::kWidth;
  constexpr int kBatch = kVectorsInFlight;
  acc_t risk = acc_t(0);
  int done = 0;
  if (is_aligned_for<grad_vector_t>(grad)) {
    const auto* grad_vectors = reinterpret_cast<const grad_vector_t*>(grad);
    auto* sum_vectors = reinterpret_cast<state_vector_t*>(sq_grad_sum);
    auto* mean_vectors = reinterpret_cast<state_vector_t*>(grad_mean);
    const int num_vectors = numel / kWidth;
    int at = index;
    for (; at + (kBatch - 1) * kStride < num_vectors; at += kBatch * kStride) {
      grad_vector_t grads[kBatch];
      state_vector_t sums[kBatch];
      state_vector_t means[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        grads[k] = load_grad<kGradsChange>(grad_vectors + at + k * kStride);
        sums[k] = __ldcs(sum_vectors + at + k * kStride);
        if constexpr (kMomentum) {
          means[k] = __ldcs(mean_vectors + at + k * kStride);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        risk += accumulate_vector<grad_t, state_t, kSqrtFisher, kMomentum>(
            grads[k], sums[k], means[k], (at + k * kStride) * kWidth, rounding, options);
        __stcs(sum_vectors + at + k * kStride, sums[k]);
        if constexpr (kMomentum) {
          __stcs(mean_vectors + at + k * kStride, means[k]);
        }
      }
    }
#pragma unroll 1  // fewer vectors than a batch are left
    for (; at < num_vectors; at += kStride) {
      state_vector_t sum = __ldcs(sum_vectors + at);
      state_vector_t mean;
      if constexpr (kMomentum) {
        mean = __ldcs(mean_vectors + at);
      }
      risk += accumulate_vector<grad_t, state_t, kSqrtFisher, kMomentum>(
          load_grad<kGradsChange>(grad_vectors + at), sum, mean, at * kWidth, rounding, options);
      __stcs(sum_vectors + at, sum);
      if constexpr (kMomentum) {
        __stcs(mean_vectors + at, mean);
      }
    }
    done = num_vectors * kWidth;
  }
  // The last elements, or all of them where the gradient is not aligned.
  for (int at = done + index; at < numel; at += kStride) {
    acc_t sum = State::widen(__ldcs(sq_grad_sum + at));
    acc_t mean = acc_t(0);
    if constexpr (kMomentum) {
      mean = State::widen(__ldcs(grad_mean + at));
    }
    risk += accumulate_excess_risk<ScalarMath<acc_t>, kSqrtFisher, kMomentum>(
        GradVector<grad_t>::widen(load_grad<kGradsChange>(grad + at)), sum, mean, options);
    const uint32_t word = State::word_at(rounding, at);
    __stcs(sq_grad_sum + at, State::narrow(sum, word, RandomHalf::kSqGradSum));
    if constexpr (kMomentum) {
      __stcs(grad_mean + at, State::narrow(mean, word, RandomHalf::kGradMean));
    }
  }
  return risk;
}

// This block's chunks of its task: state updated, one partial per chunk written by thread 0.
template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum, bool kGradsChange,
          int kCapacity>
__device__ __forceinline__ void accumulate_chunks(const StepArgs<state_t>& args,
                                                  const PointerTable<kCapacity>& grads,
                                                  double* warp_values) {
  using acc_t = Accumulation<state_t>;
  const int task = static_cast<int>(blockIdx.y);
  if (!args.present.contains(task)) {
    return;
  }
  ElementOptions<acc_t> options = args.element_options;
  options.inverse_scale = static_cast<acc_t>(1.0 / args.grad_scale.value());
  const int64_t first_tensor = task * args.chunks.num_tensors;
  const int64_t row = task * args.row_stride;
  const RoundingKey key = StateAccess<state_t>::row_key(args.rounding, task);
  for (int64_t chunk = blockIdx.x; chunk < args.chunks.num_chunks; chunk += gridDim.x) {
    acc_t risk = acc_t(0);
    args.chunks.visit_slices(chunk, [&](const Slice& slice, auto workers) {
      const auto* grad = static_cast<const grad_t*>(grads[first_tensor + slice.segment]);
      if (grad == nullptr) {
        return;
      }
      const int64_t at = row + slice.position;
      risk += accumulate_slice<grad_t, state_t, kSqrtFisher, kMomentum, kGradsChange,
                               decltype(workers)::stride>(
          grad + slice.in_segment, args.sq_grad_sum + at, kMomentum ? args.grad_mean + at : nullptr,
          slice.numel, workers.index, slice_rounding(key, slice.position), options);
    });
    const double partial = block_reduce<Sum>(static_cast<double>(risk), warp_values);
    if (threadIdx.x == 0) {
      __stcg(args.partials + task * args.chunks.num_chunks + chunk, partial);
    }
  }
}

// True in every thread of exactly one block of the grid: the last to come here. What thread 0 of any block wrote before is
// visible to all threads of that block after.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, bool& shared_verdict) {
  if (threadIdx.x == 0) {
    const unsigned last = gridDim.x * gridDim.y - 1;
    // Release: this block's partials come before its ticket.
    __threadfence();
    // Wraps to 0: ready for the next launch.
    const unsigned ticket_number = atomicInc(ticket, last);
    // Acquire: before the barrier that lets the block read on.
    __threadfence();
    shared_verdict = ticket_number == last;
  }
  __syncthreads();
  return shared_verdict;
}

// Warps that share one task's partials: with few tasks several, so that long sums do not wait for a single warp.
__device__ __forceinline__ int warps_per_task(int num_tasks) {
  return num_tasks < kWarps ? kWarps / num_tasks : 1;
}

// Adds the partials of every present task, in an order that depends on their number and on T only, into
// part_sums [T, warps_per_task].
__device__ __forceinline__ void sum_partials(const double* partials, int64_t num_chunks,
                                             const TaskSet& present, int num_tasks,
                                             double* part_sums) {
  const int parts = warps_per_task(num_tasks);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for (int item = static_cast<int>(threadIdx.x) / kWarpSize; item < num_tasks * parts;
       item += kWarps) {
    const int task = item / parts;
    if (!present.contains(task)) {
      continue;
    }
    const double* const row = partials + task * num_chunks;
    double sum = 0.0;
#pragma unroll 4
    for (int64_t chunk = item % parts * kWarpSize + lane; chunk < num_chunks;
         chunk += parts * kWarpSize) {
      // From L2: another SM wrote it, and this one's L1 could hold an older value.
      sum += __ldcg(row + chunk);
    }
    sum = warp_reduce<Sum>(sum);
    if (lane == 0) {
      part_sums[item] = sum;
    }
  }
  __syncthreads();
}

// The last block's work: sums, then either hands them out or completes the step. is_finite: no task is flagged; otherwise there are
// no partials, and the sums say which is.
template <typename state_t>
__device__ __forceinline__ void finish_step(const StepArgs<state_t>& args, bool is_finite,
                                            StepShared& shared) {
  if (is_finite) {
    sum_partials(args.partials, args.chunks.num_chunks, args.present, args.num_tasks,
                 shared.part_sums);
  }
  const int parts = warps_per_task(args.num_tasks);
  const auto sum_of = [&](int task) {
    if (!is_finite) {
      return __ldcg(args.found_nonfinite + task) != 0 ? static_cast<double>(NAN) : 0.0;
    }
    double sum = 0.0;
    for (int part = 0; part < parts; ++part) {
      sum += shared.part_sums[task * parts + part];
    }
    return sum;
  };
  if (args.excess_risk_sum != nullptr) {
    for (int task = static_cast<int>(threadIdx.x); task < args.num_tasks; task += kThreads) {
      if (args.present.contains(task)) {
        args.excess_risk_sum[task] = sum_of(task);
      }
    }
  } else if (update_task_risks(sum_of, args.present, args.num_tasks, true, args.state,
                               args.task_options)) {
    update_task_weights(args.present, args.num_tasks, shared.warp_values, args.state,
                        args.task_options);
  } else if (threadIdx.x == 0) {
    *args.state.num_skipped_steps += 1;
  }
}

// Both phases of a step after its flags are known.
template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum, bool kGradsChange,
          int kCapacity>
__device__ __forceinline__ void run_step(const StepArgs<state_t>& args,
                                         const PointerTable<kCapacity>& grads, StepShared& shared) {
  const bool is_finite = !any_nonfinite(args);
  if (is_finite) {
    accumulate_chunks<grad_t, state_t, kSqrtFisher, kMomentum, kGradsChange>(args, grads,
                                                                             shared.warp_values);
  }
  if (is_last_block(args.ticket, shared.is_last)) {
    finish_step(args, is_finite, shared);
  }
}

// Accumulates the Fisher diagonal (and the gradient mean) and the excess risk of every present task, then updates baselines and
// weights, in one launch (He et al. 2024, Eqs. 6, 7, 9).
//
// Grid:         grid_of(): x = walks over the chunks, y = task; block = kThreads threads.
// Traffic:      per element: gradient read once; sq_grad_sum (and grad_mean) read once and written once: 12 (20) bytes for float32,
//               8 (12) with bfloat16 state; before it find_nonfinite_kernel reads the gradient.
// Determinism:  no floating-point atomics. One partial per chunk and task, float64, each thread's share in acc_t; the last block
//               to take a ticket adds them in a fixed order: equal inputs of equal alignment give equal bits on any grid.
// Not finite:   writes no state where a task is flagged in args.found_nonfinite.
// Precondition: *ticket == 0; it is 0 again on exit. At least one task is present, and there is at least one chunk.
template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm<Accumulation<state_t>, kMomentum>)
    fused_step_kernel(const __grid_constant__ StepArgs<state_t> args,
                      const __grid_constant__ PointerTable<kCapacity> grads) {
  StepShared& shared = block_shared<StepShared>();
  args.chunks.check(args.row_stride);
  run_step<grad_t, state_t, kSqrtFisher, kMomentum, false>(args, grads, shared);
}

}  // namespace excessmtl::cuda
