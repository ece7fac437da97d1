// update_task_weights_ on the CPU: T numbers, one thread.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../op_arguments.h"
#include "task_updates.h"

namespace excessmtl::cpu {
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

std::vector<double> simplex_shares(int64_t num_tasks, const TaskState& state) {
  const double* const log_weights = state.log_task_weights;
  const double largest = *std::max_element(log_weights, log_weights + num_tasks);
  std::vector<double> shares(num_tasks);
  double total = 0.0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    shares[task] = std::exp(log_weights[task] - largest);
    total += shares[task];
  }
  for (double& share : shares) {
    share /= total;
  }
  return shares;
}

void write_task_weights(int64_t num_tasks, const TaskState& state, const TaskOptions& options) {
  const std::vector<double> shares = simplex_shares(num_tasks, state);
  for (int64_t task = 0; task < num_tasks; ++task) {
    state.task_weights[task] = scaled_task_weight(shares[task], num_tasks, options);
  }
}

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
  write_task_weights(num_tasks, state, options);
  *state.num_steps += 1;
}

namespace {

void update_task_weights_of(const TaskWeightsCall& call) {
  for (const int64_t task : call.tasks) {
    if (call.state.found_nonfinite[task]) {
      *call.state.num_skipped_steps += 1;
      return;
    }
  }
  update_task_weights(call.tasks, call.num_tasks(), call.state, call.options);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("update_task_weights_", TORCH_BOX(&update_task_weights_entry<&update_task_weights_of>));
}

}  // namespace excessmtl::cpu
