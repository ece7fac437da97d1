// fused_step_ and accumulate_excess_risk_ on CUDA: arguments in, one launch out. Never waits for the device.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "fused_step_launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "step_phases.h"

namespace excessmtl::cuda {

static_assert(kMaxTasks == excessmtl::kMaxTasks,
              "The kernels and the argument checks agree on the number of tasks.");

namespace {

// One launch for all present tasks. excess_risk_sum nullptr: the whole step, on `state`.
template <typename state_t>
void launch_step(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                 const Tensor& grad_mean, const RoundingSource& rounding, const Tensor& ticket,
                 double* excess_risk_sum, const TaskState& state, const TaskOptions& task_options,
                 bool sqrt_fisher, double eps) {
  const bool has_momentum = task_options.momentum > 0.0;
  CommonType common;
  common.add_state(sq_grad_sum.scalar_type());
  add_types(common, grads);
  const GradType type = launch_type(common, sq_grad_sum);
  convert_grads(grads, type);
  std::optional<Tensor> partials;
  auto args = make_step_args<state_t>(grads, plan, sq_grad_sum, grad_mean, rounding, ticket, eps,
                                      task_options.momentum, partials);
  args.excess_risk_sum = excess_risk_sum;
  args.state = state;
  args.task_options = task_options;
  const LaunchScope& scope = plan.scope;
  const DevicePointers pointers(grads.data, sq_grad_sum, scope);
  const dim3 grid = grid_of(args.chunks.num_chunks, grads.num_tasks(), scope.num_sms);
  const auto launch_as = [&](auto launch) {
    return launch(sqrt_fisher, has_momentum, grid, scope.stream, args, pointers.get());
  };
  cudaError_t status = cudaErrorInvalidValue;
  if constexpr (sizeof(state_t) == sizeof(double)) {
    status = launch_as(launch_fused_step<double, double>);
  } else if (type == kFloat32) {
    status = launch_as(launch_fused_step<float, state_t>);
  } else if (type == kBFloat16) {
    status = launch_as(launch_fused_step<__nv_bfloat16, state_t>);
  } else if constexpr (sizeof(state_t) == sizeof(float)) {
    status = launch_as(launch_fused_step<__half, float>);
  }
  check_step_launch(status, args.ticket, scope, "The launch of the fused step");
}

template <class... Args>
void launch_step_for_state(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                           Args&&... args) {
  switch (sq_grad_sum.scalar_type()) {
    case ScalarType::Double:
      return launch_step<double>(grads, plan, sq_grad_sum, std::forward<Args>(args)...);
    case ScalarType::BFloat16:
      return launch_step<BFloat16Bits>(grads, plan, sq_grad_sum, std::forward<Args>(args)...);
    default:
      return launch_step<float>(grads, plan, sq_grad_sum, std::forward<Args>(args)...);
  }
}

void accumulate_excess_risk_op(std::vector<Tensor> task_grads, Tensor param_numels,
                               Tensor chunk_map, std::optional<Tensor> grad_scale,
                               Tensor sq_grad_sum, Tensor grad_mean, Tensor excess_risk_sum,
                               Tensor ticket, bool sqrt_fisher, double eps,
                               double gradient_momentum, std::optional<Tensor> num_steps,
                               std::optional<Tensor> num_skipped_steps, int64_t rounding_seed,
                               int64_t first_task) {
  const ParamLayout layout = read_param_layout(param_numels);
  const RoundingSource rounding = {rounding_seed, std::move(num_steps),
                                   std::move(num_skipped_steps), first_task};
  TaskGrads grads =
      read_accumulation(std::move(task_grads), layout, chunk_map, grad_scale, sq_grad_sum,
                        grad_mean, excess_risk_sum, ticket, eps, gradient_momentum, rounding);
  check_state_for_launch(sq_grad_sum, grad_mean);
  const LaunchScope scope(sq_grad_sum);
  if (!grads.any_present()) {
    return;
  }
  TaskOptions task_options = {};
  task_options.momentum = gradient_momentum;
  launch_step_for_state(grads, {layout, chunk_map, grad_scale, scope}, sq_grad_sum, grad_mean,
                        rounding, ticket, excess_risk_sum.mutable_data_ptr<double>(), TaskState{},
                        task_options, sqrt_fisher, eps);
}

void fused_step_op(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
                   std::optional<Tensor> grad_scale, Tensor sq_grad_sum, Tensor grad_mean,
                   Tensor excess_risk, Tensor relative_excess_risk, Tensor baseline_excess_risk,
                   Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                   Tensor num_task_steps, Tensor num_skipped_steps, Tensor found_nonfinite,
                   Tensor ticket, bool sqrt_fisher, double eps, double gradient_momentum,
                   double robust_step_size, int64_t num_warmup_steps, bool relative,
                   double min_weight, double weight_total, int64_t rounding_seed) {
  const ParamLayout layout = read_param_layout(param_numels);
  const StepTensors state = {
      sq_grad_sum,          grad_mean,         excess_risk,     relative_excess_risk,
      baseline_excess_risk, log_task_weights,  task_weights,    num_steps,
      num_task_steps,       num_skipped_steps, found_nonfinite, ticket};
  const StepChoices choices = {sqrt_fisher,      eps,      gradient_momentum, robust_step_size,
                               num_warmup_steps, relative, min_weight,        weight_total,
                               rounding_seed};
  TaskGrads grads =
      read_step(std::move(task_grads), {}, layout, chunk_map, grad_scale, state, choices);
  check_state_for_launch(sq_grad_sum, grad_mean);
  const LaunchScope scope(sq_grad_sum);
  run_fused_step(grads, {layout, chunk_map, grad_scale, scope}, state, choices);
}

}  // namespace

void check_state_for_launch(const Tensor& sq_grad_sum, const Tensor& grad_mean) {
  check_state_alignment(sq_grad_sum, "sq_grad_sum");
  check_state_alignment(grad_mean, "grad_mean");
}

void run_fused_step(TaskGrads& grads, const StepPlan& plan, const StepTensors& state,
                    const StepChoices& choices) {
  const auto task_state = state.task_state<TaskState>();
  if (!grads.any_present()) {
    // Nothing happened, so nothing was found; no kernel for that.
    check_cuda(cudaMemsetAsync(task_state.found_nonfinite, 0, grads.num_tasks() * sizeof(bool),
                               plan.scope.stream),
               "cudaMemsetAsync");
    return;
  }
  launch_step_for_state(grads, plan, state.sq_grad_sum, state.grad_mean,
                        state.rounding(choices.rounding_seed), state.ticket, nullptr, task_state,
                        choices.task_options(plan.layout), choices.sqrt_fisher, choices.eps);
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fused_step_", TORCH_BOX(&fused_step_op));
  m.impl("accumulate_excess_risk_", TORCH_BOX(&accumulate_excess_risk_op));
}

}  // namespace excessmtl::cuda
