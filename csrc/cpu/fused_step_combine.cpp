// fused_step_combine_ on the CPU: both phases on arguments that are read and checked once.
//
// The sum over tasks needs the new weights, and those need every element: no pass can be shared, but a call's fixed cost can.
#include <utility>

#include "../op_arguments.h"
#include "grad_scale.h"
#include "step_phases.h"

namespace excessmtl::cpu {
namespace {

void fused_step_combine(StepCall& call) {
  const double grad_scale = read_grad_scale(call.grad_scale);
  run_fused_step(call, grad_scale);
  run_combine(combine_call_of(std::move(call)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("fused_step_combine_", TORCH_BOX(&StepEntry<&fused_step_combine>::fused_step_combine));
}

}  // namespace excessmtl::cpu
