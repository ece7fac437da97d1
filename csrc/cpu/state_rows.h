// The rows of the state as the CPU loops take them, in each of the types it may have.
#pragma once

#include <cstdint>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "element_loops.h"

namespace excessmtl::cpu {

// What the random bits of a step are drawn from, read on the host.
struct StepRounding {
  int64_t seed = 0;
  int64_t step = 0;
  int64_t first_task = 0;
};

// Of bfloat16 state; nothing is read for other state.
inline StepRounding read_rounding(const RoundingSource& source, const Tensor& sq_grad_sum) {
  if (sq_grad_sum.scalar_type() != ScalarType::BFloat16) {
    return {};
  }
  return {source.seed, *source.num_steps->const_data_ptr<int64_t>(), source.first_task};
}

// Rows of the state in one step.
struct StepRows {
  const Tensor& sq_grad_sum;  // [R, padded P]
  const Tensor& grad_mean;    // [R, padded P], or [R, 0] without momentum
  double gradient_momentum;
  StepRounding rounding;
};

inline StepRows rows_of_step(const StepCall& call) {
  return {call.state.sq_grad_sum, call.state.grad_mean, call.choices.gradient_momentum,
          read_rounding(call.rounding(), call.state.sq_grad_sum)};
}

inline RoundingKey row_key(const StepRounding& rounding, int64_t row) {
  return rounding_key(rounding.seed, rounding.step, rounding.first_task + row);
}

template <typename state_t>
state_t* rows_of(const Tensor& state) {
  return static_cast<state_t*>(state.mutable_data_ptr());
}

// Calls f(state_t{}) for the type of the state's elements.
template <class F>
void with_state_type(const Tensor& sq_grad_sum, const F& f) {
  switch (sq_grad_sum.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16Bits{});
    default:
      return f(float{});
  }
}

}  // namespace excessmtl::cpu
