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

// Two launches for all present tasks: is every gradient finite, then the step. excess_risk_sum nullptr: the whole step, on `state`.
// known_nonfinite: [R] bool, where the answer is known, and the first launch is none; no value otherwise.
void launch_step(TaskGrads& grads, const StepPlan& plan, const Tensor& sq_grad_sum,
                 const Tensor& grad_mean, const RoundingSource& rounding, const Tensor& ticket,
                 double* excess_risk_sum, const TaskState& state, const TaskOptions& task_options,
                 bool sqrt_fisher, double eps, const std::optional<Tensor>& known_nonfinite);

// fused_step_: no launch where no task is present.
void run_fused_step(StepCall& call, const LaunchScope& scope);

// combine_: one launch.
void run_combine(CombineCall& call, const LaunchScope& scope);

// Addresses: the kernels read the number of the step.
inline void set_rounding(NoRounding& /*rounding*/, const RoundingSource& /*source*/) {}
inline void set_rounding(LaunchRounding& rounding, const RoundingSource& source) {
  rounding = {source.seed, source.num_steps->const_data_ptr<int64_t>(),
              static_cast<int>(source.first_task)};
}

template <typename state_t>
state_t* rows_of(const Tensor& state) {
  return static_cast<state_t*>(state.mutable_data_ptr());
}

// What the kernels of a step work in, allocated for it.
struct StepScratch {
  std::optional<Tensor> partials;
  std::optional<Tensor> found_nonfinite;  // [T] int32

  // `known`: the flags [T] bool, if they are; 0 otherwise.
  void hold_flags(const std::optional<Tensor>& known, int64_t num_tasks, const Tensor& like,
                  const LaunchScope& scope) {
    if (known.has_value()) {
      found_nonfinite = torch::stable::to(*known, ScalarType::Int);
      return;
    }
    found_nonfinite = torch::stable::new_empty(like, {num_tasks}, ScalarType::Int);
    check_cuda(cudaMemsetAsync(found_nonfinite->mutable_data_ptr<int32_t>(), 0,
                               num_tasks * sizeof(int32_t), scope.stream),
               "cudaMemsetAsync");
  }
};

// The arguments of the step's kernels but for its sums, state and task options.
template <typename state_t>
StepArgs<state_t> make_step_args(const TaskGrads& grads, const StepPlan& plan,
                                 const Tensor& sq_grad_sum, const Tensor& grad_mean,
                                 const RoundingSource& rounding, const Tensor& ticket, double eps,
                                 double gradient_momentum,
                                 const std::optional<Tensor>& known_nonfinite,
                                 StepScratch& scratch) {
  StepArgs<state_t> args = {};
  args.chunks = read_chunk_map(plan.chunk_map, plan.layout, sq_grad_sum);
  args.grad_scale = read_grad_scale(plan.grad_scale, sq_grad_sum);
  args.sq_grad_sum = rows_of<state_t>(sq_grad_sum);
  args.grad_mean = gradient_momentum > 0.0 ? rows_of<state_t>(grad_mean) : nullptr;
  set_rounding(args.rounding, rounding);
  args.row_stride = plan.layout.padded_numel();
  scratch.hold_flags(known_nonfinite, grads.num_tasks(), sq_grad_sum, plan.scope);
  args.found_nonfinite =
      reinterpret_cast<unsigned*>(scratch.found_nonfinite->mutable_data_ptr<int32_t>());
  args.finds_nonfinite = !known_nonfinite.has_value();
  scratch.partials = torch::stable::new_empty(
      sq_grad_sum, {grads.num_tasks() * args.chunks.num_chunks}, ScalarType::Double);
  args.partials = scratch.partials->mutable_data_ptr<double>();
  args.ticket = reinterpret_cast<unsigned*>(ticket.mutable_data_ptr<int32_t>());
  args.element_options = make_element_options<Accumulation<state_t>>(eps, gradient_momentum, 1.0);
  args.present = present_tasks(grads);
  args.num_tasks = static_cast<int>(grads.num_tasks());
  return args;
}

inline CombineArgs make_combine_args(const StepPlan& plan, const CombineState& state,
                                     bool has_outputs, bool accumulate) {
  CombineArgs args = {};
  args.chunks = read_chunk_map(plan.chunk_map, plan.layout, state.task_weights);
  // Outputs keep the scale; a wrong one is an error all the same.
  (void)read_grad_scale(plan.grad_scale, state.task_weights);
  args.task_weights = state.task_weights.const_data_ptr<double>();
  args.found_nonfinite = state.found_nonfinite.const_data_ptr<bool>();
  args.row_stride = plan.layout.padded_numel();
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
