// The per-task half of a step on the CPU: raw sums -> risks, baselines -> log-weights, weights.
#pragma once

#include <cstdint>
#include <vector>

#include "../excess_risk_math.h"
#include "../task_state.h"

namespace excessmtl::cpu {

// Commits the risks of the given tasks, or only flags the tasks whose sum is not finite. True when all are finite.
bool update_task_risks(const double* excess_risk_sum, const std::vector<int64_t>& tasks,
                       const TaskState& state, const TaskOptions& options);

// Moves the weights of the given tasks, which share the mass they had; the others keep theirs. Counts the step.
void update_task_weights(const std::vector<int64_t>& tasks, int64_t num_tasks,
                         const TaskState& state, const TaskOptions& options);

}  // namespace excessmtl::cpu
