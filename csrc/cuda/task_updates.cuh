// The per-task half of a step, by one block: raw sums -> risks and baselines -> log-weights and weights.
//
// Thread i owns tasks i and i + kThreads, so a task's numbers pass from one function to the next without a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "../task_state.h"
#include "block_sum.cuh"
#include "launch_config.cuh"

namespace excessmtl::cuda {

// The tasks that take part, a bit each.
struct TaskSet {
  uint32_t words[kMaxTasks / 32];

  __host__ __device__ __forceinline__ bool contains(int task) const {
    return (words[task / 32] >> (task % 32) & 1U) != 0;
  }
  __host__ __device__ __forceinline__ void insert(int task) {
    words[task / 32] |= 1U << (task % 32);
  }
};

// Commits risk, baseline and count of the tasks in the set, or only flags those whose sum is not finite. True, in every thread,
// when all sums are finite. sum_of(task): the raw sum; clears_other_flags: the flags of the tasks not in the set become false.
template <class SumOf>
__device__ __forceinline__ bool update_task_risks(const SumOf& sum_of, const TaskSet& tasks,
                                                  int num_tasks, bool clears_other_flags,
                                                  const TaskState& state,
                                                  const TaskOptions& options) {
  bool found = false;
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    if (tasks.contains(task)) {
      const bool is_finite = fabs(sum_of(task)) <= LargestFinite<double>::value;
      state.found_nonfinite[task] = !is_finite;
      found |= !is_finite;
    } else if (clears_other_flags) {
      state.found_nonfinite[task] = false;
    }
  }
  if (__syncthreads_or(found) != 0) {
    return false;
  }
  const int64_t num_steps = *state.num_steps;
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    if (tasks.contains(task)) {
      const TaskRisk risk = updated_task_risk(sum_of(task), state.baseline_excess_risk[task],
                                              num_steps, state.num_task_steps[task], options);
      state.excess_risk[task] = risk.excess_risk;
      state.relative_excess_risk[task] = risk.relative_excess_risk;
      state.baseline_excess_risk[task] = risk.baseline_excess_risk;
      state.num_task_steps[task] = risk.num_task_steps;
    }
  }
  return true;
}

// log sum exp of value(task) over the tasks in the set, in every thread.
template <class Value>
__device__ __forceinline__ double log_sum_exp(const TaskSet& tasks, int num_tasks,
                                              double* warp_values, const Value& value) {
  double largest = Max::identity();
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    largest = tasks.contains(task) ? Max::join(largest, value(task)) : largest;
  }
  largest = block_reduce<Max>(largest, warp_values);
  double sum = 0.0;
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    sum += tasks.contains(task) ? exp(value(task) - largest) : 0.0;
  }
  return largest + log(block_reduce<Sum>(sum, warp_values));
}

// Moves the weights of the tasks in the set, which share the mass they had; the others keep theirs. Counts the step.
// warp_values: kWarps numbers of shared memory.
__device__ __forceinline__ void update_task_weights(const TaskSet& tasks, int num_tasks,
                                                    double* warp_values, const TaskState& state,
                                                    const TaskOptions& options) {
  const int64_t num_steps = *state.num_steps;
  if (num_steps >= options.num_warmup_steps) {
    const auto before = [&](int task) { return state.log_task_weights[task]; };
    const auto moved = [&](int task) {
      return moved_log_weight(state.log_task_weights[task], state.relative_excess_risk[task],
                              num_steps, options);
    };
    const double log_mass = log_sum_exp(tasks, num_tasks, warp_values, before);
    const double log_total = log_sum_exp(tasks, num_tasks, warp_values, moved);
    for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
      if (tasks.contains(task)) {
        state.log_task_weights[task] = (moved(task) - log_total) + log_mass;
      }
    }
  }
  double largest = Max::identity();
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    largest = Max::join(largest, state.log_task_weights[task]);
  }
  largest = block_reduce<Max>(largest, warp_values);
  double total = 0.0;
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    total += exp(state.log_task_weights[task] - largest);
  }
  total = block_reduce<Sum>(total, warp_values);
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    state.task_weights[task] =
        scaled_task_weight(exp(state.log_task_weights[task] - largest) / total, num_tasks, options);
  }
  if (threadIdx.x == 0) {
    // The reductions above held a barrier after every thread's read.
    *state.num_steps = num_steps + 1;
  }
}

}  // namespace excessmtl::cuda
