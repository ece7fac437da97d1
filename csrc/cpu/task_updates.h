// The per-task half of a step on the CPU: raw sums -> risks, baselines -> log-weights, weights.
#pragma once

#include <cstdint>
#include <vector>

#include "../excess_risk_math.h"
#include "../move_state.h"
#include "../param_layout.h"
#include "../task_state.h"

namespace excessmtl::cpu {

// What a step has added up over its elements.
struct StepSums {
  const double* risks;    // [T]; nullptr: the tasks have been taken in before
  const double* squares;  // [T, L], or the row of the one task
  int64_t square_stride;  // L, or 0
};

// Commits the risks of the given tasks, or only flags the tasks whose sum is not finite. True when all are finite.
bool update_task_risks(const double* excess_risk_sum, const std::vector<int64_t>& tasks,
                       const TaskState& state, const TaskOptions& options);

// Moves the weights of the given tasks, which share the mass they had; the others keep theirs. Counts the step.
void update_task_weights(const std::vector<int64_t>& tasks, int64_t num_tasks,
                         const TaskState& state, const TaskOptions& options);

// exp(l_i) / sum_k exp(l_k) of the log-weights.
std::vector<double> simplex_shares(int64_t num_tasks, const TaskState& state);

// The weights from the log-weights, with min_weight as every task's floor.
void write_task_weights(int64_t num_tasks, const TaskState& state, const TaskOptions& options);

// Both of the former with the state that bounded moves and sizes need: from the sums of a step to the weights and the factors of
// its gradients, or without moves_weights to the risks and sizes. A step that is not finite is counted and changes nothing else.
void commit_step(const StepSums& sums, const std::vector<int64_t>& tasks, int64_t num_tasks,
                 const ParamLayout& layout, const TaskState& state, const MoveState& moves,
                 const TaskOptions& options, const MoveOptions& move_options, bool moves_weights);

}  // namespace excessmtl::cpu
