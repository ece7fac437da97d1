// fused_step_combine_ on CUDA: one cooperative launch where it helps and fits, else the launches of the two ops.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "fused_step_combine_launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "step_phases.h"

namespace excessmtl::cuda {
namespace {

template <typename grad_t, typename acc_t>
cudaError_t launch_both_as(TaskGrads& grads, const StepPlan& plan, const StepTensors& state,
                           const StepChoices& choices, const std::vector<Tensor>& outputs,
                           bool accumulate) {
  std::optional<Tensor> partials;
  StepCombineArgs<acc_t> args = {};
  args.step = make_step_args<acc_t>(grads, plan, state.sq_grad_sum, state.grad_mean, {},
                                    state.ticket, choices.eps, choices.gradient_momentum, partials);
  args.step.state = state.task_state<TaskState>();
  args.step.task_options = choices.task_options(plan.layout);
  args.combine = make_combine_args<acc_t>(plan,
                                          {state.task_weights,
                                           state.found_nonfinite,
                                           state.sq_grad_sum,
                                           state.grad_mean,
                                           choices.gradient_momentum,
                                           {}},
                                          !outputs.empty(), accumulate);
  std::vector<const void*> pointers = grads.data;
  for (const Tensor& output : outputs) {
    pointers.push_back(output.numel() > 0 ? output.mutable_data_ptr() : nullptr);
  }
  const LaunchScope& scope = plan.scope;
  const cudaError_t status = launch_fused_step_combine<grad_t, acc_t>(
      choices.sqrt_fisher, choices.gradient_momentum > 0.0, scope.num_sms, scope.stream, args,
      {pointers.data(), static_cast<int64_t>(pointers.size()), nullptr});
  if (status != cudaErrorCooperativeLaunchTooLarge) {
    check_step_launch(status, args.step.ticket, scope, "The launch of fused_step_combine_");
  }
  return status;
}

// The type of a launch of both phases, where one launch can do both and is the better choice; see fits_one_launch(). Outputs of
// another type than the gradients need a kernel of their own, bfloat16 state too, longer tables of pointers more than kSmallTable.
std::optional<GradType> one_launch_type(const TaskGrads& grads, const StepPlan& plan,
                                        const StepTensors& state,
                                        const std::vector<Tensor>& outputs) {
  if (state.sq_grad_sum.scalar_type() == ScalarType::BFloat16) {
    return std::nullopt;
  }
  CommonType common;
  common.add_state(state.sq_grad_sum.scalar_type());
  add_types(common, grads);
  for (const Tensor& output : outputs) {
    if (output.numel() > 0 && grad_type_of(output) != common.get()) {
      return std::nullopt;
    }
  }
  const int64_t grad_bytes = grads.num_tasks() * plan.layout.num_params * kGradBytes[common.get()];
  const bool is_better = grads.any_present() &&
                         static_cast<int64_t>(grads.data.size() + outputs.size()) <= kSmallTable &&
                         plan.scope.can_launch_cooperatively() &&
                         fits_one_launch(grad_bytes, plan.scope.l2_bytes());
  return is_better ? std::optional(common.get()) : std::nullopt;
}

// True: both phases are on their way. False: nothing has happened.
bool launch_both(TaskGrads& grads, const StepPlan& plan, const StepTensors& state,
                 const StepChoices& choices, const std::vector<Tensor>& outputs, bool accumulate) {
  const std::optional<GradType> type = one_launch_type(grads, plan, state, outputs);
  if (!type.has_value()) {
    return false;
  }
  convert_grads(grads, *type);
  const auto launch_as = [&](auto launch) {
    return launch(grads, plan, state, choices, outputs, accumulate) == cudaSuccess;
  };
  switch (*type) {
    case kFloat64:
      return launch_as(launch_both_as<double, double>);
    case kFloat32:
      return launch_as(launch_both_as<float, float>);
    case kBFloat16:
      return launch_as(launch_both_as<__nv_bfloat16, float>);
    default:
      return launch_as(launch_both_as<__half, float>);
  }
}

void fused_step_combine_op(std::vector<Tensor> task_grads, std::vector<Tensor> outputs,
                           Tensor param_numels, Tensor chunk_map, std::optional<Tensor> grad_scale,
                           Tensor sq_grad_sum, Tensor grad_mean, Tensor excess_risk,
                           Tensor relative_excess_risk, Tensor baseline_excess_risk,
                           Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                           Tensor num_task_steps, Tensor num_skipped_steps, Tensor found_nonfinite,
                           Tensor ticket, bool sqrt_fisher, double eps, double gradient_momentum,
                           double robust_step_size, int64_t num_warmup_steps, bool relative,
                           double min_weight, double weight_total, bool accumulate,
                           int64_t rounding_seed) {
  const ParamLayout layout = read_param_layout(param_numels);
  const StepTensors state = {
      sq_grad_sum,          grad_mean,         excess_risk,     relative_excess_risk,
      baseline_excess_risk, log_task_weights,  task_weights,    num_steps,
      num_task_steps,       num_skipped_steps, found_nonfinite, ticket};
  const StepChoices choices = {sqrt_fisher,      eps,      gradient_momentum, robust_step_size,
                               num_warmup_steps, relative, min_weight,        weight_total,
                               rounding_seed};
  TaskGrads grads =
      read_step(std::move(task_grads), outputs, layout, chunk_map, grad_scale, state, choices);
  check_state_for_launch(sq_grad_sum, grad_mean);
  const LaunchScope scope(sq_grad_sum);
  const StepPlan plan = {layout, chunk_map, grad_scale, scope};
  if (!launch_both(grads, plan, state, choices, outputs, accumulate)) {
    run_fused_step(grads, plan, state, choices);
    run_combine(grads, plan,
                {task_weights, found_nonfinite, sq_grad_sum, grad_mean, gradient_momentum,
                 state.rounding(rounding_seed)},
                outputs, accumulate);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fused_step_combine_", TORCH_BOX(&fused_step_combine_op));
}

}  // namespace excessmtl::cuda
