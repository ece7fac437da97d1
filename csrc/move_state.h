// What a step keeps besides task_state.h for weights within bounds and gradients at one size, as addresses.
// Includes no torch header, as excess_risk_math.h.
#pragma once

#include <cstdint>

namespace excessmtl {

// [T] or [T, L], task-major.
struct MoveState {
  double* risk_share_sum;       // [T]
  int64_t* num_gradient_steps;  // [T]
  double* momentum_mass;        // [T]
  double* momentum_sq_mass;     // [T]
  double* tensor_mean_square;   // [T, L]
  int64_t* num_tensor_steps;    // [T, L]
  double* tensor_weights;       // [T, L]: the factors of the step; nullptr: not asked for
  double* risk_share;           // [T]: the shares of the step go here and not into their sum; nullptr: into the sum
  const double* log_priorities;  // [T]
  const double* floors;          // [T]; nullptr: TaskOptions::min_weight for all
};

}  // namespace excessmtl
