// fused_step_ on the CPU: the rows of the state over all threads, then the numbers per task.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../op_arguments.h"
#include "grad_scale.h"
#include "state_rows.h"
#include "step_phases.h"
#include "task_updates.h"

namespace excessmtl::cpu {
namespace {

void fused_step(const StepCall& call) { run_fused_step(call, read_grad_scale(call.grad_scale)); }

}  // namespace

void run_fused_step(const StepCall& call, double grad_scale) {
  const TaskGrads& grads = call.grads;
  const int64_t num_tasks = grads.num_tasks();
  const TaskState state = call.state.task_state();
  std::fill(state.found_nonfinite, state.found_nonfinite + num_tasks, false);
  std::vector<int64_t> tasks;
  for (int64_t task = 0; task < num_tasks; ++task) {
    if (grads.is_present[task]) {
      tasks.push_back(task);
    }
  }
  const TaskOptions options = call.choices.task_options(call.layout);
  const int64_t num_tensors = call.layout.num_tensors();
  std::vector<double> excess_risk_sum(num_tasks, 0.0);
  std::vector<double> square_sums(call.moves.is_given() ? num_tasks * num_tensors : 0, 0.0);
  run_accumulate(grads, call.layout, grad_scale, rows_of_step(call), call.choices.sqrt_fisher,
                 call.choices.eps, excess_risk_sum.data(),
                 call.moves.is_given() ? square_sums.data() : nullptr);
  if (call.moves.is_given()) {
    commit_step({excess_risk_sum.data(), square_sums.data(), num_tensors}, tasks, num_tasks,
                call.layout, state, call.moves.move_state(), options, call.moves.move_options(),
                true);
  } else if (update_task_risks(excess_risk_sum.data(), tasks, state, options)) {
    update_task_weights(tasks, num_tasks, state, options);
  } else {
    *state.num_skipped_steps += 1;
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("fused_step_", TORCH_BOX(&StepEntry<&fused_step>::fused_step));
}

}  // namespace excessmtl::cpu
