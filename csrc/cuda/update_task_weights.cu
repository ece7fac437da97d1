// update_task_weights_ on CUDA: one block.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "../op_arguments.h"
#include "launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "update_task_weights.cuh"

namespace excessmtl::cuda {
namespace {

void update_task_weights_of(const TaskWeightsCall& call) {
  if (call.tasks.empty()) {
    return;
  }
  const LaunchScope scope(call.task_weights);
  check_cuda(
      launch(update_task_weights_kernel, dim3(1), kThreads, scope.stream, task_set(call.tasks),
             static_cast<int>(call.num_tasks()), call.state, call.options),
      "The launch of update_task_weights_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("update_task_weights_", TORCH_BOX(&update_task_weights_entry<&update_task_weights_of>));
}

}  // namespace excessmtl::cuda
