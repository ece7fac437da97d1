// The numbers of the state that there is one of per task, as addresses: what the per-task half of a step reads and writes.
// Includes no torch header, as excess_risk_math.h.
#pragma once

#include <cstdint>

namespace excessmtl {

// [T], but for the two counters of steps.
struct TaskState {
  double* excess_risk;
  double* relative_excess_risk;
  double* baseline_excess_risk;
  double* log_task_weights;
  double* task_weights;
  int64_t* num_steps;
  int64_t* num_task_steps;
  int64_t* num_skipped_steps;
  bool* found_nonfinite;
};

}  // namespace excessmtl
