// update_task_risks_ on the CPU: T numbers, one thread.
#include <cmath>
#include <cstdint>
#include <vector>

#include "../op_arguments.h"
#include "task_updates.h"

namespace excessmtl::cpu {

bool update_task_risks(const double* excess_risk_sum, const std::vector<int64_t>& tasks,
                       const TaskState& state, const TaskOptions& options) {
  bool all_finite = true;
  for (const int64_t task : tasks) {
    state.found_nonfinite[task] = !std::isfinite(excess_risk_sum[task]);
    all_finite &= !state.found_nonfinite[task];
  }
  if (!all_finite) {
    return false;
  }
  for (const int64_t task : tasks) {
    const TaskRisk risk = updated_task_risk(excess_risk_sum[task], state.baseline_excess_risk[task],
                                            *state.num_steps, state.num_task_steps[task], options);
    state.excess_risk[task] = risk.excess_risk;
    state.relative_excess_risk[task] = risk.relative_excess_risk;
    state.baseline_excess_risk[task] = risk.baseline_excess_risk;
    state.num_task_steps[task] = risk.num_task_steps;
  }
  return true;
}

namespace {

void update_task_risks_of(const TaskRisksCall& call) {
  update_task_risks(call.excess_risk_sum.const_data_ptr<double>(), call.tasks, call.state,
                    call.options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("update_task_risks_", TORCH_BOX(&update_task_risks_entry<&update_task_risks_of>));
}

}  // namespace excessmtl::cpu
