// What the kernels of a step take besides the pointers to its gradients.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../excess_risk_math.h"
#include "../task_state.h"
#include "element_access.cuh"
#include "launch_config.cuh"
#include "param_chunks.cuh"
#include "state_access.cuh"
#include "task_updates.cuh"

namespace excessmtl::cuda {

template <typename state_t>
struct StepArgs {
  ParamChunks chunks;
  GradScale grad_scale;
  state_t* sq_grad_sum;  // [T, padded P], updated in place, 16-byte aligned
  state_t* grad_mean;    // like sq_grad_sum; not read without momentum
  typename StateAccess<state_t>::Rounding rounding;
  int64_t row_stride;         // padded P
  unsigned* found_nonfinite;  // [T]: not 0 where a gradient of the task, on any rank, is not finite
  double* partials;           // [T, num_chunks], scratch
  unsigned* ticket;           // 0 on entry, 0 again on exit
  // [T]: the raw sums go here and nothing else is updated; nullptr: the whole step.
  double* excess_risk_sum;
  TaskState state;
  TaskOptions task_options;
  ElementOptions<Accumulation<state_t>> element_options;  // inverse_scale is set on the device
  TaskSet present;
  int num_tasks;
  bool finds_nonfinite;  // read on the host: the flags are looked for before the step
};
static_assert(sizeof(StepArgs<double>) <= kArgumentBytes,
              "The pointer tables leave kArgumentBytes for the arguments.");

}  // namespace excessmtl::cuda
