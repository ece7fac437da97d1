// update_task_risks_ and update_task_weights_ on CUDA: one block each.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "update_task_weights.cuh"

namespace excessmtl::cuda {
namespace {

void update_task_risks_op(Tensor excess_risk_sum, std::vector<int64_t> tasks, Tensor excess_risk,
                          Tensor relative_excess_risk, Tensor baseline_excess_risk,
                          Tensor num_steps, Tensor num_task_steps, Tensor found_nonfinite,
                          double gradient_momentum, int64_t num_warmup_steps, bool relative,
                          double raw_risk_scale) {
  const int64_t num_tasks = excess_risk.numel();
  check_task_risks(excess_risk_sum, tasks, excess_risk, relative_excess_risk, baseline_excess_risk,
                   num_steps, num_task_steps, found_nonfinite, gradient_momentum, num_warmup_steps,
                   raw_risk_scale);
  if (tasks.empty()) {
    return;
  }
  const LaunchScope scope(excess_risk);
  TaskState state = {};
  state.excess_risk = excess_risk.mutable_data_ptr<double>();
  state.relative_excess_risk = relative_excess_risk.mutable_data_ptr<double>();
  state.baseline_excess_risk = baseline_excess_risk.mutable_data_ptr<double>();
  state.num_steps = const_cast<int64_t*>(num_steps.const_data_ptr<int64_t>());  // only read
  state.num_task_steps = num_task_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = found_nonfinite.mutable_data_ptr<bool>();
  const TaskOptions options = {
      gradient_momentum, num_warmup_steps, relative, raw_risk_scale, 0.0, 0.0, 1.0};
  check_cuda(launch(update_task_risks_kernel, dim3(1), kThreads, scope.stream,
                    excess_risk_sum.const_data_ptr<double>(), task_set(tasks),
                    static_cast<int>(num_tasks), state, options),
             "The launch of update_task_risks_");
}

void update_task_weights_op(std::vector<int64_t> tasks, Tensor relative_excess_risk,
                            Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                            Tensor num_skipped_steps, Tensor found_nonfinite,
                            double robust_step_size, int64_t num_warmup_steps, double min_weight,
                            double weight_total) {
  const int64_t num_tasks = task_weights.numel();
  check_task_weights(tasks, relative_excess_risk, log_task_weights, task_weights, num_steps,
                     num_skipped_steps, found_nonfinite, robust_step_size, num_warmup_steps,
                     min_weight, weight_total);
  if (tasks.empty()) {
    return;
  }
  const LaunchScope scope(task_weights);
  TaskState state = {};
  // Only read.
  state.relative_excess_risk = const_cast<double*>(relative_excess_risk.const_data_ptr<double>());
  state.log_task_weights = log_task_weights.mutable_data_ptr<double>();
  state.task_weights = task_weights.mutable_data_ptr<double>();
  state.num_steps = num_steps.mutable_data_ptr<int64_t>();
  state.num_skipped_steps = num_skipped_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = const_cast<bool*>(found_nonfinite.const_data_ptr<bool>());  // only read
  const TaskOptions options = {0.0,        num_warmup_steps, true, 1.0, robust_step_size,
                               min_weight, weight_total};
  check_cuda(launch(update_task_weights_kernel, dim3(1), kThreads, scope.stream, task_set(tasks),
                    static_cast<int>(num_tasks), state, options),
             "The launch of update_task_weights_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("update_task_risks_", TORCH_BOX(&update_task_risks_op));
  m.impl("update_task_weights_", TORCH_BOX(&update_task_weights_op));
}

}  // namespace excessmtl::cuda
