// update_task_risks_ and update_task_weights_ on the CPU: T numbers each, one thread.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "chunks.h"
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

template <class Value>
double log_sum_exp(const std::vector<int64_t>& tasks, const Value& value) {
  double largest = -std::numeric_limits<double>::infinity();
  for (const int64_t task : tasks) {
    largest = std::max(largest, value(task));
  }
  double sum = 0.0;
  for (const int64_t task : tasks) {
    sum += std::exp(value(task) - largest);
  }
  return largest + std::log(sum);
}

}  // namespace

void update_task_weights(const std::vector<int64_t>& tasks, int64_t num_tasks,
                         const TaskState& state, const TaskOptions& options) {
  if (tasks.empty()) {
    return;
  }
  if (*state.num_steps >= options.num_warmup_steps) {
    const auto before = [&](int64_t task) { return state.log_task_weights[task]; };
    const auto moved = [&](int64_t task) {
      return moved_log_weight(state.log_task_weights[task], state.relative_excess_risk[task],
                              *state.num_steps, options);
    };
    const double log_mass = log_sum_exp(tasks, before);
    const double log_total = log_sum_exp(tasks, moved);
    for (const int64_t task : tasks) {
      state.log_task_weights[task] = (moved(task) - log_total) + log_mass;
    }
  }
  const double* log_weights = state.log_task_weights;
  const double largest = *std::max_element(log_weights, log_weights + num_tasks);
  double total = 0.0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    total += std::exp(log_weights[task] - largest);
  }
  for (int64_t task = 0; task < num_tasks; ++task) {
    state.task_weights[task] =
        scaled_task_weight(std::exp(log_weights[task] - largest) / total, num_tasks, options);
  }
  *state.num_steps += 1;
}

namespace {

void update_task_risks_op(Tensor excess_risk_sum, std::vector<int64_t> tasks, Tensor excess_risk,
                          Tensor relative_excess_risk, Tensor baseline_excess_risk,
                          Tensor num_steps, Tensor num_task_steps, Tensor found_nonfinite,
                          double gradient_momentum, int64_t num_warmup_steps, bool relative,
                          double raw_risk_scale) {
  check_task_risks(excess_risk_sum, tasks, excess_risk, relative_excess_risk, baseline_excess_risk,
                   num_steps, num_task_steps, found_nonfinite, gradient_momentum, num_warmup_steps,
                   raw_risk_scale);
  TaskState state{};
  state.excess_risk = excess_risk.mutable_data_ptr<double>();
  state.relative_excess_risk = relative_excess_risk.mutable_data_ptr<double>();
  state.baseline_excess_risk = baseline_excess_risk.mutable_data_ptr<double>();
  state.num_steps = const_cast<int64_t*>(num_steps.const_data_ptr<int64_t>());  // only read
  state.num_task_steps = num_task_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = found_nonfinite.mutable_data_ptr<bool>();
  const TaskOptions options = {
      gradient_momentum, num_warmup_steps, relative, raw_risk_scale, 0.0, 0.0, 1.0};
  update_task_risks(excess_risk_sum.const_data_ptr<double>(), tasks, state, options);
}

void update_task_weights_op(std::vector<int64_t> tasks, Tensor relative_excess_risk,
                            Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                            Tensor num_skipped_steps, Tensor found_nonfinite,
                            double robust_step_size, int64_t num_warmup_steps, double min_weight,
                            double weight_total) {
  const int64_t num_tasks = task_weights.numel();
  check_task_weights(tasks, relative_excess_risk, log_task_weights, task_weights, num_steps,
                     num_skipped_steps, found_nonfinite, robust_step_size, num_warmup_steps,
                     min_weight, weight_total);
  const bool* flags = found_nonfinite.const_data_ptr<bool>();
  for (const int64_t task : tasks) {
    if (flags[task]) {
      *num_skipped_steps.mutable_data_ptr<int64_t>() += 1;
      return;
    }
  }
  TaskState state{};
  // Only read.
  state.relative_excess_risk = const_cast<double*>(relative_excess_risk.const_data_ptr<double>());
  state.log_task_weights = log_task_weights.mutable_data_ptr<double>();
  state.task_weights = task_weights.mutable_data_ptr<double>();
  state.num_steps = num_steps.mutable_data_ptr<int64_t>();
  const TaskOptions options = {0.0,        num_warmup_steps, true, 1.0, robust_step_size,
                               min_weight, weight_total};
  update_task_weights(tasks, num_tasks, state, options);
}

std::string cpu_capability_op() { return capability().name; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("update_task_risks_", TORCH_BOX(&update_task_risks_op));
  m.impl("update_task_weights_", TORCH_BOX(&update_task_weights_op));
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_op));
}

}  // namespace excessmtl::cpu
