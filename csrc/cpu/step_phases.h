// The phases of a step on the CPU, on arguments that have been read and checked: one op each, and one op that runs all.
#pragma once

#include "../op_arguments.h"
#include "state_rows.h"

namespace excessmtl::cpu {

// accumulate_excess_risk_: adds every present task's gradients to the state and writes the raw sums of those tasks to
// excess_risk_sum [R], their sums of squares to square_sums [R, L] unless that is null. Where any gradient is not finite: NaN and 0
// as the flags say, squares of 0, and no state. grad_scale: 1 where there is none. known_nonfinite: [R], where the flags are known;
// nullptr: they are looked for.
void run_accumulate(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                    const StepRows& rows, bool sqrt_fisher, double eps, double* excess_risk_sum,
                    double* square_sums, const bool* known_nonfinite = nullptr);

// fused_step_.
void run_fused_step(const StepCall& call, double grad_scale);

// combine_.
void run_combine(const CombineCall& call);

}  // namespace excessmtl::cpu
