// The arguments of commit_step_, spelled, read and checked once for both backends.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "memory_overlap.h"
#include "move_arguments.h"
#include "param_layout.h"
#include "step_state.h"

namespace excessmtl {

struct CommitCall {
  std::optional<Tensor> excess_risk_sum;  // [T] float64; none: the weights alone
  std::optional<Tensor> square_sums;      // [T, L] float64, or without moves_weights [1, L] of the one task that takes part
  std::vector<int64_t> tasks;
  ParamLayout layout;
  Tensor chunk_map;
  TaskState state;
  MoveState move_state;
  TaskOptions options;
  MoveOptions move_options;
  bool moves_weights;
  Tensor task_weights;  // for its device

  int64_t num_tasks() const { return task_weights.numel(); }
  const double* risk_sums() const {
    return excess_risk_sum.has_value() ? excess_risk_sum->const_data_ptr<double>() : nullptr;
  }
  // Where the sums of a task's squares lie: row i of them, or the only one.
  int64_t square_stride() const { return square_sums->size(0) == 1 ? 0 : layout.num_tensors(); }
};

template <auto kRun, class Moves>
struct CommitEntryOf;

template <auto kRun, typename... Moves>
struct CommitEntryOf<kRun, TypeList<Moves...>> {
  static void commit_step(std::optional<Tensor> excess_risk_sum, std::optional<Tensor> square_sums,
                          std::vector<int64_t> tasks, Tensor param_numels, Tensor chunk_map,
                          Tensor excess_risk, Tensor relative_excess_risk,
                          Tensor baseline_excess_risk, Tensor log_task_weights,
                          Tensor task_weights, Tensor num_steps, Tensor num_task_steps,
                          Tensor num_skipped_steps, Tensor found_nonfinite,
                          std::optional<Tensor> risk_share, double gradient_momentum,
                          double robust_step_size, int64_t num_warmup_steps, bool relative,
                          double raw_risk_scale, double min_weight, double weight_total,
                          bool moves_weights, Moves... move_arguments) {
    const MoveArguments moves = {std::move(move_arguments)...};
    ParamLayout layout = read_param_layout(param_numels);
    const int64_t num_tasks = task_weights.numel();
    check_num_tasks(num_tasks);
    check_tasks(tasks, num_tasks);
    check_element_options(1.0, gradient_momentum);
    check_weight_options(robust_step_size, min_weight, weight_total, num_tasks);
    check_num_warmup_steps(num_warmup_steps);
    check_raw_risk_scale(raw_risk_scale);
    given(moves.risk_share_sum, "risk_share_sum");
    check_moves(moves, num_tasks, layout.num_tensors(), task_weights);
    constexpr ScalarType kDouble = ScalarType::Double;
    constexpr ScalarType kLong = ScalarType::Long;
    std::vector<Extent> extents;
    const auto check_written = [&](const Tensor& tensor, const char* name, int64_t numel,
                                   ScalarType type) {
      check_vector(tensor, name, numel, type, task_weights);
      extents.push_back(extent_of(tensor, name));
    };
    check_written(excess_risk, "excess_risk", num_tasks, kDouble);
    check_written(relative_excess_risk, "relative_excess_risk", num_tasks, kDouble);
    check_written(baseline_excess_risk, "baseline_excess_risk", num_tasks, kDouble);
    check_written(log_task_weights, "log_task_weights", num_tasks, kDouble);
    check_written(task_weights, "task_weights", num_tasks, kDouble);
    check_written(num_steps, "num_steps", 1, kLong);
    check_written(num_task_steps, "num_task_steps", num_tasks, kLong);
    check_written(num_skipped_steps, "num_skipped_steps", 1, kLong);
    check_written(found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool);
    if (risk_share.has_value()) {
      check_written(*risk_share, "risk_share", num_tasks, kDouble);
    }
    add_extents(extents, moves);
    const WrittenMemory written(std::move(extents));
    check_moves_apart(moves, written);
    written.check_apart(chunk_map, "chunk_map");
    STD_TORCH_CHECK(excess_risk_sum.has_value() == square_sums.has_value(),
                    "Expected `excess_risk_sum` and `square_sums` or neither, but got one.");
    if (excess_risk_sum.has_value()) {
      check_vector(*excess_risk_sum, "excess_risk_sum", num_tasks, kDouble, task_weights);
      const bool is_one_row = square_sums->dim() == 2 && square_sums->size(0) == 1;
      check_per_tensor(*square_sums, "square_sums",
                       is_one_row && tasks.size() == 1 && !moves_weights ? 1 : num_tasks, layout.num_tensors(),
                       kDouble, task_weights);
      written.check_apart(*excess_risk_sum, "excess_risk_sum");
      written.check_apart(*square_sums, "square_sums");
    }

    const TaskState state = task_state_of(
        excess_risk, relative_excess_risk, baseline_excess_risk, log_task_weights, task_weights,
        num_steps, num_task_steps, num_skipped_steps, found_nonfinite);
    MoveState move_state = moves.move_state();
    move_state.risk_share =
        risk_share.has_value() ? risk_share->mutable_data_ptr<double>() : nullptr;
    const TaskOptions options = {gradient_momentum, num_warmup_steps, relative,    raw_risk_scale,
                                 robust_step_size,  min_weight,       weight_total};
    CommitCall call = {std::move(excess_risk_sum),
                       std::move(square_sums),
                       std::move(tasks),
                       std::move(layout),
                       std::move(chunk_map),
                       state,
                       move_state,
                       options,
                       moves.move_options(),
                       moves_weights,
                       std::move(task_weights)};
    kRun(call);
  }
};

template <auto kRun>
using CommitEntry = CommitEntryOf<kRun, MoveArgumentTypes>;

}  // namespace excessmtl
