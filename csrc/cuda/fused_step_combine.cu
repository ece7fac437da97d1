// fused_step_combine_ on CUDA: one cooperative launch where it helps and fits, else the launches of the two ops.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "fused_step_combine_launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "step_phases.h"

namespace excessmtl::cuda {
namespace {

template <typename grad_t, typename acc_t>
cudaError_t launch_both_as(StepCall& call, const LaunchScope& scope) {
  const StepPlan plan = plan_of(call, scope);
  const StepTensors& state = call.state;
  const StepChoices& choices = call.choices;
  StepScratch scratch;
  StepCombineArgs<acc_t> args = {};
  args.step = make_step_args<acc_t>(call.grads, plan, state.sq_grad_sum, state.grad_mean, {},
                                    state.ticket, choices.eps, choices.gradient_momentum,
                                    std::nullopt, scratch);
  args.step.state = state.task_state();
  args.step.task_options = choices.task_options(call.layout);
  args.combine = make_combine_args(plan, call.combine_state(), !call.outputs.empty(), call.accumulate);
  std::vector<const void*> pointers = call.grads.data;
  for (const Tensor& output : call.outputs) {
    pointers.push_back(output.numel() > 0 ? output.mutable_data_ptr() : nullptr);
  }
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
std::optional<GradType> one_launch_type(const StepCall& call, const LaunchScope& scope) {
  if (call.state.sq_grad_sum.scalar_type() == ScalarType::BFloat16) {
    return std::nullopt;
  }
  CommonType common;
  common.add_state(call.state.sq_grad_sum.scalar_type());
  add_types(common, call.grads);
  for (const Tensor& output : call.outputs) {
    if (output.numel() > 0 && grad_type_of(output) != common.get()) {
      return std::nullopt;
    }
  }
  const TaskGrads& grads = call.grads;
  const auto num_pointers = static_cast<int64_t>(grads.data.size() + call.outputs.size());
  const int64_t grad_bytes = grads.num_tasks() * call.layout.num_params * kGradBytes[common.get()];
  const bool is_better = grads.any_present() && num_pointers <= kSmallTable &&
                         scope.can_launch_cooperatively() &&
                         fits_one_launch(grad_bytes, scope.l2_bytes());
  return is_better ? std::optional(common.get()) : std::nullopt;
}

// True: both phases are on their way. False: nothing has happened.
bool launch_both(StepCall& call, const LaunchScope& scope) {
  const std::optional<GradType> type = one_launch_type(call, scope);
  if (!type.has_value()) {
    return false;
  }
  convert_grads(call.grads, *type);
  const auto launch_as = [&](auto launch) { return launch(call, scope) == cudaSuccess; };
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

void fused_step_combine(StepCall& call) {
  STD_TORCH_CHECK(!call.moves.is_given(), "Expected no `risk_share_sum` on CUDA. excessmtl_ext.functional composes it.");
  check_state_for_launch(call.state.sq_grad_sum, call.state.grad_mean);
  const LaunchScope scope(call.state.sq_grad_sum);
  if (!launch_both(call, scope)) {
    run_fused_step(call, scope);
    CombineCall combine = combine_call_of(std::move(call));
    run_combine(combine, scope);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fused_step_combine_", TORCH_BOX(&StepEntry<&fused_step_combine>::fused_step_combine));
}

}  // namespace excessmtl::cuda
