// The two phases of a step on the CPU, on arguments that have been read and checked: one op each, and one op that runs both.
#pragma once

#include <vector>

#include "../param_layout.h"
#include "../step_state.h"
#include "state_rows.h"

namespace excessmtl::cpu {

// fused_step_. grad_scale: 1 where there is none.
void run_fused_step(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                    const StepTensors& tensors, const StepChoices& choices);

// What combine_ works on besides gradients and outputs.
struct CombineState {
  Tensor task_weights;     // [T] float64
  Tensor found_nonfinite;  // [T] bool
  Tensor sq_grad_sum;      // [T, padded P], or no elements: nothing to repair
  Tensor grad_mean;
  double gradient_momentum;
  StepRounding rounding;  // of the repair
};

// combine_, or the repair.
void run_combine(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                 const CombineState& state, const std::vector<Tensor>& outputs, bool accumulate);

}  // namespace excessmtl::cpu
