// accumulate_excess_risk_ on CUDA: the launches of the fused step, which end with the sums.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "../op_arguments.h"
#include "launch_scope.h"
#include "step_phases.h"

namespace excessmtl::cuda {
namespace {

void accumulate_excess_risk(AccumulateCall& call) {
  check_state_for_launch(call.sq_grad_sum, call.grad_mean);
  STD_TORCH_CHECK(!call.square_sums.has_value(), "Expected no `square_sums` on CUDA. excessmtl_ext.functional composes it.");
  const LaunchScope scope(call.sq_grad_sum);
  if (!call.grads.any_present()) {
    return;
  }
  TaskOptions task_options = {};
  task_options.momentum = call.gradient_momentum;
  launch_step(call.grads, plan_of(call, scope), call.sq_grad_sum, call.grad_mean, call.rounding,
              call.ticket, call.excess_risk_sum.mutable_data_ptr<double>(), TaskState{},
              task_options, call.sqrt_fisher, call.eps, call.known_nonfinite);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("accumulate_excess_risk_",
         TORCH_BOX(&accumulate_excess_risk_entry<&accumulate_excess_risk>));
}

}  // namespace excessmtl::cuda
