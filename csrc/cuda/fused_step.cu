// fused_step_ on CUDA: arguments in, two launches out. Never waits for the device.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "fused_step_launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "step_phases.h"

namespace excessmtl::cuda {

static_assert(kMaxTasks == excessmtl::kMaxTasks,
              "The kernels and the argument checks agree on the number of tasks.");

namespace {

template <typename state_t>
void launch_step_as(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                    const Tensor& grad_mean, const RoundingSource& rounding, const Tensor& ticket,
                    double* excess_risk_sum, const TaskState& state,
                    const TaskOptions& task_options, bool sqrt_fisher, double eps,
                    const std::optional<Tensor>& known_nonfinite) {
  const bool has_momentum = task_options.momentum > 0.0;
  CommonType common;
  common.add_state(sq_grad_sum.scalar_type());
  add_types(common, grads);
  const GradType type = launch_type(common, sq_grad_sum);
  convert_grads(grads, type);
  StepScratch scratch;
  auto args = make_step_args<state_t>(grads, plan, sq_grad_sum, grad_mean, rounding, ticket, eps,
                                      task_options.momentum, known_nonfinite, scratch);
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

void fused_step(StepCall& call) {
  check_state_for_launch(call.state.sq_grad_sum, call.state.grad_mean);
  run_fused_step(call, LaunchScope(call.state.sq_grad_sum));
}

}  // namespace

void check_state_for_launch(const Tensor& sq_grad_sum, const Tensor& grad_mean) {
  check_state_alignment(sq_grad_sum, "sq_grad_sum");
  check_state_alignment(grad_mean, "grad_mean");
}

void launch_step(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                 const Tensor& grad_mean, const RoundingSource& rounding, const Tensor& ticket,
                 double* excess_risk_sum, const TaskState& state, const TaskOptions& task_options,
                 bool sqrt_fisher, double eps, const std::optional<Tensor>& known_nonfinite) {
  const auto launch_as = [&](auto launch) {
    launch(grads, plan, sq_grad_sum, grad_mean, rounding, ticket, excess_risk_sum, state,
           task_options, sqrt_fisher, eps, known_nonfinite);
  };
  switch (sq_grad_sum.scalar_type()) {
    case ScalarType::Double:
      return launch_as(launch_step_as<double>);
    case ScalarType::BFloat16:
      return launch_as(launch_step_as<BFloat16Bits>);
    default:
      return launch_as(launch_step_as<float>);
  }
}

void run_fused_step(StepCall& call, const LaunchScope& scope) {
  STD_TORCH_CHECK(!call.moves.is_given(), "Expected no `risk_share_sum` on CUDA. excessmtl_ext.functional composes it.");
  const StepTensors& state = call.state;
  const TaskState task_state = state.task_state();
  if (!call.grads.any_present()) {
    // Nothing happened, so nothing was found; no kernel for that.
    check_cuda(cudaMemsetAsync(task_state.found_nonfinite, 0, call.grads.num_tasks() * sizeof(bool),
                               scope.stream),
               "cudaMemsetAsync");
    return;
  }
  launch_step(call.grads, plan_of(call, scope), state.sq_grad_sum, state.grad_mean, call.rounding(),
              state.ticket, nullptr, task_state, call.choices.task_options(call.layout),
              call.choices.sqrt_fisher, call.choices.eps, std::nullopt);
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fused_step_", TORCH_BOX(&StepEntry<&fused_step>::fused_step));
}

}  // namespace excessmtl::cuda
