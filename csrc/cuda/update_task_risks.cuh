// The kernel of update_task_risks_: part of a step's end on its own, for streaming and for sums over ranks.
#pragma once

#include <cuda_runtime.h>

#include "../excess_risk_math.h"
#include "launch_config.cuh"
#include "task_updates.cuh"

namespace excessmtl::cuda {

// Commits the risks of the given tasks, or only flags those whose sum is not finite.
//
// Grid: one block, which may use every register (the bound of 1). Traffic: a few numbers per task. Determinism: tasks do not meet.
__global__ void __launch_bounds__(kThreads, 1)
    update_task_risks_kernel(const double* excess_risk_sum, const __grid_constant__ TaskSet tasks,
                             int num_tasks, const __grid_constant__ TaskState state,
                             const __grid_constant__ TaskOptions options) {
  const auto sum_of = [&](int task) { return excess_risk_sum[task]; };
  update_task_risks(sum_of, tasks, num_tasks, false, state, options);
}

}  // namespace excessmtl::cuda
