// The tensors and choices behind weights within bounds and gradients at one size, as the ops receive them: all or none of the
// tensors of the state. What the schemas of fused_step_, fused_step_combine_ and commit_step_ share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "excess_risk_math.h"
#include "memory_overlap.h"
#include "move_state.h"
#include "param_layout.h"
#include "step_state.h"

namespace excessmtl {

// In the order of the schemas.
struct MoveArguments {
  std::optional<Tensor> risk_share_sum;      // [T] float64
  std::optional<Tensor> num_gradient_steps;  // [T] int64
  std::optional<Tensor> momentum_mass;       // [T] float64
  std::optional<Tensor> momentum_sq_mass;    // [T] float64
  std::optional<Tensor> tensor_mean_square;  // [T, L] float64
  std::optional<Tensor> num_tensor_steps;    // [T, L] int64
  std::optional<Tensor> tensor_weights;      // [T, L] float64
  std::optional<Tensor> log_priorities;      // [T] float64
  std::optional<Tensor> weight_floors;              // [T] float64, or none: min_weight for all
  std::optional<double> max_log_ratio;       // none: the mirror steps of Eq. 9
  bool per_tensor;                           // whether the sum of the gradients takes tensor_weights

  bool is_given() const { return risk_share_sum.has_value(); }

  MoveState move_state() const {
    MoveState state = {};
    state.risk_share_sum = risk_share_sum->mutable_data_ptr<double>();
    state.num_gradient_steps = num_gradient_steps->mutable_data_ptr<int64_t>();
    state.momentum_mass = momentum_mass->mutable_data_ptr<double>();
    state.momentum_sq_mass = momentum_sq_mass->mutable_data_ptr<double>();
    state.tensor_mean_square = tensor_mean_square->mutable_data_ptr<double>();
    state.num_tensor_steps = num_tensor_steps->mutable_data_ptr<int64_t>();
    state.tensor_weights = tensor_weights->mutable_data_ptr<double>();
    state.log_priorities = log_priorities->const_data_ptr<double>();
    state.floors = weight_floors.has_value() ? weight_floors->const_data_ptr<double>() : nullptr;
    return state;
  }
  MoveOptions move_options() const {
    return {max_log_ratio.has_value(), max_log_ratio.value_or(0.0)};
  }
};

using MoveArgumentTypes =
    TypeList<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
             std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
             std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>,
             std::optional<double>, bool>;

inline const Tensor& given(const std::optional<Tensor>& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.has_value(), "Expected `", name,
                  "` with `risk_share_sum`, but got None. Pass all of that state or none.");
  return *tensor;
}

// [T, L].
inline void check_per_tensor(const Tensor& tensor, const char* name, int64_t num_tasks,
                             int64_t num_tensors, ScalarType dtype, const Tensor& like) {
  check_dtype(tensor, name, dtype);
  check_same_device(tensor, name, like);
  check_matrix(tensor, name, num_tasks, num_tensors);
}

inline void check_moves(const MoveArguments& moves, int64_t num_tasks, int64_t num_tensors,
                        const Tensor& like) {
  if (!moves.is_given()) {
    STD_TORCH_CHECK(!moves.max_log_ratio.has_value() && !moves.per_tensor,
                    "Expected `risk_share_sum` with `max_log_ratio` or `per_tensor`, but got None. "
                    "Pass the state that these choices need.");
    return;
  }
  constexpr ScalarType kDouble = ScalarType::Double;
  constexpr ScalarType kLong = ScalarType::Long;
  const auto vector = [&](const std::optional<Tensor>& tensor, const char* name, ScalarType type) {
    check_vector(given(tensor, name), name, num_tasks, type, like);
  };
  const auto matrix = [&](const std::optional<Tensor>& tensor, const char* name, ScalarType type) {
    check_per_tensor(given(tensor, name), name, num_tasks, num_tensors, type, like);
  };
  vector(moves.risk_share_sum, "risk_share_sum", kDouble);
  vector(moves.num_gradient_steps, "num_gradient_steps", kLong);
  vector(moves.momentum_mass, "momentum_mass", kDouble);
  vector(moves.momentum_sq_mass, "momentum_sq_mass", kDouble);
  matrix(moves.tensor_mean_square, "tensor_mean_square", kDouble);
  matrix(moves.num_tensor_steps, "num_tensor_steps", kLong);
  matrix(moves.tensor_weights, "tensor_weights", kDouble);
  vector(moves.log_priorities, "log_priorities", kDouble);
  if (moves.weight_floors.has_value()) {
    vector(moves.weight_floors, "weight_floors", kDouble);
  }
  if (moves.max_log_ratio.has_value()) {
    STD_TORCH_CHECK(std::isfinite(*moves.max_log_ratio) && *moves.max_log_ratio >= 0.0,
                    "Expected `max_log_ratio` >= 0 and finite, but got ", *moves.max_log_ratio,
                    ".");
  }
}

inline void add_extents(std::vector<Extent>& extents, const MoveArguments& moves) {
  if (moves.is_given()) {
    extents.push_back(extent_of(*moves.risk_share_sum, "risk_share_sum"));
    extents.push_back(extent_of(*moves.num_gradient_steps, "num_gradient_steps"));
    extents.push_back(extent_of(*moves.momentum_mass, "momentum_mass"));
    extents.push_back(extent_of(*moves.momentum_sq_mass, "momentum_sq_mass"));
    extents.push_back(extent_of(*moves.tensor_mean_square, "tensor_mean_square"));
    extents.push_back(extent_of(*moves.num_tensor_steps, "num_tensor_steps"));
    extents.push_back(extent_of(*moves.tensor_weights, "tensor_weights"));
  }
}

inline void check_moves_apart(const MoveArguments& moves, const WrittenMemory& written) {
  if (moves.log_priorities.has_value()) {
    written.check_apart(*moves.log_priorities, "log_priorities");
  }
  if (moves.weight_floors.has_value()) {
    written.check_apart(*moves.weight_floors, "weight_floors");
  }
}

}  // namespace excessmtl
