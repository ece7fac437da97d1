// The phases of a step on CUDA, on arguments that have been read and checked: one op each, and one op that runs both.
//
// Gradients of another type than a phase's launch are converted in `grads`.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "combine.cuh"
#include "fused_step.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"

namespace excessmtl::cuda {

// What both phases read besides gradients and state.
struct StepPlan {
  const ParamLayout& layout;
  const Tensor& chunk_map;
  const std::optional<Tensor>& grad_scale;
  const LaunchScope& scope;
};

template <class Call>
StepPlan plan_of(const Call& call, const LaunchScope& scope) {
  return {call.layout, call.chunk_map, call.grad_scale, scope};
}

// What CUDA asks of the state beyond the checks of op_arguments.h.
void check_state_for_launch(const Tensor& sq_grad_sum, const Tensor& grad_mean);

// One launch for all present tasks. excess_risk_sum nullptr: the whole step, on `state`.
void launch_step(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                 const Tensor& grad_mean, const RoundingSource& rounding, const Tensor& ticket,
                 double* excess_risk_sum, const TaskState& state, const TaskOptions& task_options,
                 bool sqrt_fisher, double eps);

// fused_step_: one launch, or none where no task is present.
void run_fused_step(StepCall& call, const LaunchScope& scope);

// combine_, or the repair: one launch as a rule.
void run_combine(CombineCall& call, const LaunchScope& scope);

// Addresses: the kernels read the number of the step.
inline void set_rounding(NoRounding& /*rounding*/, const RoundingSource& /*source*/) {}
inline void set_rounding(LaunchRounding& rounding, const RoundingSource& source) {
  rounding = {source.seed, source.num_steps->const_data_ptr<int64_t>(),
              source.num_skipped_steps->const_data_ptr<int64_t>(),
              static_cast<int>(source.first_task)};
}

template <typename state_t>
state_t* rows_of(const Tensor& state) {
  return static_cast<state_t*>(state.mutable_data_ptr());
}

// The arguments of the step's kernel but for its sums, state and task options. Allocates the partials, which `partials` keeps.
template <typename state_t>
StepArgs<state_t> make_step_args(const TaskGrads& grads, const StepPlan& plan,
                                 const Tensor& sq_grad_sum, const Tensor& grad_mean,
                                 const RoundingSource& rounding, const Tensor& ticket, double eps,
                                 double gradient_momentum, std::optional<Tensor>& partials) {
  StepArgs<state_t> args = {};
  args.chunks = read_chunk_map(plan.chunk_map, plan.layout, sq_grad_sum);
  args.grad_scale = read_grad_scale(plan.grad_scale, sq_grad_sum);
  args.sq_grad_sum = rows_of<state_t>(sq_grad_sum);
  args.grad_mean = gradient_momentum > 0.0 ? rows_of<state_t>(grad_mean) : nullptr;
  set_rounding(args.rounding, rounding);
  args.row_stride = plan.layout.padded_numel();
  partials = torch::stable::new_empty(sq_grad_sum, {grads.num_tasks() * args.chunks.num_chunks},
                                      ScalarType::Double);
  args.partials = partials->mutable_data_ptr<double>();
  args.ticket = reinterpret_cast<unsigned*>(ticket.mutable_data_ptr<int32_t>());
  args.element_options = make_element_options<Accumulation<state_t>>(eps, gradient_momentum, 1.0);
  args.present = present_tasks(grads);
  args.num_tasks = static_cast<int>(grads.num_tasks());
  return args;
}

template <typename state_t>
CombineArgs<state_t> make_combine_args(const StepPlan& plan, const CombineState& state,
                                       bool has_outputs, bool accumulate) {
  CombineArgs<state_t> args = {};
  args.chunks = read_chunk_map(plan.chunk_map, plan.layout, state.task_weights);
  args.grad_scale = read_grad_scale(plan.grad_scale, state.task_weights);
  args.task_weights = state.task_weights.const_data_ptr<double>();
  args.found_nonfinite = state.found_nonfinite.const_data_ptr<bool>();
  if (state.has_rows()) {
    args.sq_grad_sum = rows_of<state_t>(state.sq_grad_sum);
    args.grad_mean = state.gradient_momentum > 0.0 ? rows_of<state_t>(state.grad_mean) : nullptr;
    set_rounding(args.rounding, state.rounding);
  }
  args.row_stride = plan.layout.padded_numel();
  args.element_options =
      make_element_options<Accumulation<state_t>>(1.0, state.gradient_momentum, 1.0);
  args.num_tasks = static_cast<int>(state.task_weights.numel());
  args.has_outputs = has_outputs;
  args.accumulate = accumulate;
  return args;
}

// After a launch that failed: a grid that stopped half-way leaves the ticket in between, and the next launch must find 0. Its own
// error is beside the point.
inline void check_step_launch(cudaError_t status, unsigned* ticket, const LaunchScope& scope,
                              const char* what) {
  if (status != cudaSuccess) {
    (void)cudaMemsetAsync(ticket, 0, sizeof(unsigned), scope.stream);
  }
  check_cuda(status, what);
}

}  // namespace excessmtl::cuda
