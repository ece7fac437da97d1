// commit_step_ on the CPU: T and T * L numbers, one thread.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../commit_arguments.h"
#include "task_updates.h"

namespace excessmtl::cpu {
namespace {

// Commits risks, sizes and counts of the given tasks, and writes their shares of signal. False: a sum is not finite, and nothing
// but the flags has changed.
bool take_in(const StepSums& sums, const std::vector<int64_t>& tasks, const ParamLayout& layout,
             const TaskState& state, const MoveState& moves, const TaskOptions& options,
             double* risk_share) {
  if (!update_task_risks(sums.risks, tasks, state, options)) {
    return false;
  }
  const int64_t num_tensors = layout.num_tensors();
  for (const int64_t task : tasks) {
    const double* const squares = sums.squares + task * sums.square_stride;
    double* const mean_squares = moves.tensor_mean_square + task * num_tensors;
    int64_t* const num_steps = moves.num_tensor_steps + task * num_tensors;
    bool has_grad = false;
    double num_reached = 0.0;
    for (int64_t index = 0; index < num_tensors; ++index) {
      if (layout.numels[index] == 0) {
        continue;
      }
      const auto numel = static_cast<double>(layout.numels[index]);
      const TensorSize size =
          updated_tensor_size(mean_squares[index], num_steps[index], squares[index] / numel);
      mean_squares[index] = size.mean_square;
      num_steps[index] = size.num_steps;
      has_grad |= squares[index] > 0.0;
      num_reached += size.num_steps > 0 ? numel : 0.0;
    }
    const SignalShare share = updated_signal_share(
        sums.risks[task], has_grad, num_reached,
        {0.0, moves.num_gradient_steps[task], moves.momentum_mass[task],
         moves.momentum_sq_mass[task]},
        options.momentum);
    moves.num_gradient_steps[task] = share.num_gradient_steps;
    moves.momentum_mass[task] = share.momentum_mass;
    moves.momentum_sq_mass[task] = share.momentum_sq_mass;
    risk_share[task] = share.share;
  }
  return true;
}

// R and the log-weights of all tasks from the sums of the shares so far.
void move_log_weights(int64_t num_tasks, const TaskState& state, const MoveState& moves,
                      const TaskOptions& options, const MoveOptions& move_options) {
  const double largest =
      *std::max_element(moves.risk_share_sum, moves.risk_share_sum + num_tasks);
  for (int64_t task = 0; task < num_tasks; ++task) {
    state.relative_excess_risk[task] = bounded_relative_risk(
        moves.risk_share_sum[task], largest, moves.num_gradient_steps[task]);
    state.log_task_weights[task] =
        bounded_log_weight(moves.log_priorities[task], state.relative_excess_risk[task],
                           *state.num_steps, options.num_warmup_steps, move_options.max_log_ratio);
  }
  const double* const log_weights = state.log_task_weights;
  const double log_largest = *std::max_element(log_weights, log_weights + num_tasks);
  double total = 0.0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    total += std::exp(log_weights[task] - log_largest);
  }
  const double log_total = log_largest + std::log(total);
  for (int64_t task = 0; task < num_tasks; ++task) {
    state.log_task_weights[task] -= log_total;
  }
}

void write_floored_weights(int64_t num_tasks, const TaskState& state, const MoveState& moves,
                           const TaskOptions& options) {
  double total_floor = 0.0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    total_floor += moves.floors[task];
  }
  const std::vector<double> shares = simplex_shares(num_tasks, state);
  for (int64_t task = 0; task < num_tasks; ++task) {
    state.task_weights[task] = floored_task_weight(shares[task], moves.floors[task], total_floor,
                                                   options.weight_total);
  }
}

void write_tensor_weights(const StepSums& sums, int64_t num_tasks, const ParamLayout& layout,
                          const TaskState& state, const MoveState& moves) {
  const int64_t num_tensors = layout.num_tensors();
  for (int64_t index = 0; index < num_tensors; ++index) {
    double largest = 0.0;
    for (int64_t task = 0; task < num_tasks; ++task) {
      largest = std::max(largest, moves.tensor_mean_square[task * num_tensors + index]);
    }
    const double numel = static_cast<double>(std::max<int64_t>(layout.numels[index], 1));
    for (int64_t task = 0; task < num_tasks; ++task) {
      const int64_t at = task * num_tensors + index;
      moves.tensor_weights[at] =
          tensor_weight(state.task_weights[task], largest, moves.tensor_mean_square[at],
                        sums.squares[task * sums.square_stride + index] / numel);
    }
  }
}

void commit_step_of(const CommitCall& call) {
  StepSums sums = {call.risk_sums(), nullptr, 0};
  if (call.square_sums.has_value()) {
    sums.squares = call.square_sums->const_data_ptr<double>();
    sums.square_stride = call.square_stride();
  }
  commit_step(sums, call.tasks, call.num_tasks(), call.layout, call.state, call.move_state,
              call.options, call.move_options, call.moves_weights);
}

}  // namespace

void commit_step(const StepSums& sums, const std::vector<int64_t>& tasks, int64_t num_tasks,
                 const ParamLayout& layout, const TaskState& state, const MoveState& moves,
                 const TaskOptions& options, const MoveOptions& move_options, bool moves_weights) {
  std::vector<double> own_shares(moves.risk_share == nullptr ? num_tasks : 0, 0.0);
  double* const risk_share = moves.risk_share == nullptr ? own_shares.data() : moves.risk_share;
  bool counts = true;
  if (sums.risks != nullptr) {
    counts = take_in(sums, tasks, layout, state, moves, options, risk_share);
  } else {
    counts = std::none_of(tasks.begin(), tasks.end(),
                          [&](int64_t task) { return state.found_nonfinite[task]; });
  }
  if (!moves_weights || tasks.empty()) {
    return;
  }
  if (!counts) {
    *state.num_skipped_steps += 1;
    return;
  }
  if (move_options.is_bounded) {
    move_log_weights(num_tasks, state, moves, options, move_options);
    write_task_weights(num_tasks, state, options);
    *state.num_steps += 1;
  } else {
    update_task_weights(tasks, num_tasks, state, options);
  }
  if (moves.floors != nullptr) {
    write_floored_weights(num_tasks, state, moves, options);
  }
  if (sums.risks != nullptr) {
    write_tensor_weights(sums, num_tasks, layout, state, moves);
    if (move_options.is_bounded && moves.risk_share == nullptr) {
      for (const int64_t task : tasks) {
        moves.risk_share_sum[task] += risk_share[task];
      }
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("commit_step_", TORCH_BOX(&CommitEntry<&commit_step_of>::commit_step));
}

}  // namespace excessmtl::cpu
