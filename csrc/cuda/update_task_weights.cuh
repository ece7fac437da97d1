// The kernel of update_task_weights_: the end of a step on its own, for streaming and for sums over ranks.
#pragma once

#include <cuda_runtime.h>

#include "../excess_risk_math.h"
#include "block_shared.cuh"
#include "launch_config.cuh"
#include "task_updates.cuh"

namespace excessmtl::cuda {

struct WeightsShared {
  double warp_values[kWarps];
};

// Moves the weights of the given tasks and counts the step; counts it as skipped where one of them is flagged.
//
// Grid: one block, which may use every register (the bound of 1; without it the compiler spills some). Traffic: a few numbers per task. Determinism: sums over tasks in a fixed order.
__global__ void __launch_bounds__(kThreads, 1)
    update_task_weights_kernel(const __grid_constant__ TaskSet tasks, int num_tasks,
                               const __grid_constant__ TaskState state,
                               const __grid_constant__ TaskOptions options) {
  WeightsShared& shared = block_shared<WeightsShared>();
  bool found = false;
  for (int task = static_cast<int>(threadIdx.x); task < num_tasks; task += kThreads) {
    found |= tasks.contains(task) && state.found_nonfinite[task];
  }
  if (__syncthreads_or(found) == 0) {
    update_task_weights(tasks, num_tasks, shared.warp_values, state, options);
  } else if (threadIdx.x == 0) {
    *state.num_skipped_steps += 1;
  }
}

}  // namespace excessmtl::cuda
