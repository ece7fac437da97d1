// fused_step_combine_ on the CPU: both phases on arguments that are read and checked once.
//
// The sum over tasks needs the new weights, and those need every element: no pass can be shared, but a call's fixed cost can.
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "grad_scale.h"
#include "step_phases.h"

namespace excessmtl::cpu {
namespace {

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
  const double scale = read_grad_scale(grad_scale);
  const TaskGrads grads =
      read_step(std::move(task_grads), outputs, layout, chunk_map, grad_scale, state, choices);
  run_fused_step(grads, layout, scale, state, choices);
  run_combine(grads, layout, scale,
              {task_weights, found_nonfinite, sq_grad_sum, grad_mean, gradient_momentum,
               read_rounding(state.rounding(rounding_seed), sq_grad_sum)},
              outputs, accumulate);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("fused_step_combine_", TORCH_BOX(&fused_step_combine_op));
}

}  // namespace excessmtl::cpu
