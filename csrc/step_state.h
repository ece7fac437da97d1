// The state and the choices of a step as the ops receive them: what the schemas of fused_step_ and fused_step_combine_ share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "excess_risk_math.h"
#include "param_layout.h"
#include "task_state.h"

namespace excessmtl {

// What the random bits of bfloat16 state are drawn from, as accumulate_excess_risk_ and combine_ receive it.
struct RoundingSource {
  int64_t seed = 0;
  std::optional<Tensor> num_steps;          // [] int64
  std::optional<Tensor> num_skipped_steps;  // [] int64
  int64_t first_task = 0;                   // whose row is the first
};

inline void check_rounding(const RoundingSource& source, const Tensor& sq_grad_sum) {
  STD_TORCH_CHECK(sq_grad_sum.scalar_type() != ScalarType::BFloat16 ||
                      (source.num_steps.has_value() && source.num_skipped_steps.has_value()),
                  "Expected `num_steps` and `num_skipped_steps` with bfloat16 state: its rounding "
                  "draws from them. Pass those of the state.");
  if (source.num_steps.has_value()) {
    check_vector(*source.num_steps, "num_steps", 1, ScalarType::Long, sq_grad_sum);
  }
  if (source.num_skipped_steps.has_value()) {
    check_vector(*source.num_skipped_steps, "num_skipped_steps", 1, ScalarType::Long, sq_grad_sum);
  }
  STD_TORCH_CHECK(source.first_task >= 0 && source.first_task < kMaxTasks,
                  "Expected `first_task` between 0 and ", kMaxTasks - 1, ", but got ",
                  source.first_task, ".");
}

// The addresses of tensors that have been checked.
inline TaskState task_state_of(const Tensor& excess_risk, const Tensor& relative_excess_risk,
                               const Tensor& baseline_excess_risk, const Tensor& log_task_weights,
                               const Tensor& task_weights, const Tensor& num_steps,
                               const Tensor& num_task_steps, const Tensor& num_skipped_steps,
                               const Tensor& found_nonfinite) {
  return {excess_risk.mutable_data_ptr<double>(),
          relative_excess_risk.mutable_data_ptr<double>(),
          baseline_excess_risk.mutable_data_ptr<double>(),
          log_task_weights.mutable_data_ptr<double>(),
          task_weights.mutable_data_ptr<double>(),
          num_steps.mutable_data_ptr<int64_t>(),
          num_task_steps.mutable_data_ptr<int64_t>(),
          num_skipped_steps.mutable_data_ptr<int64_t>(),
          found_nonfinite.mutable_data_ptr<bool>()};
}

// In the order of the schemas. The [T] vectors are float64 unless they say otherwise.
struct StepTensors {
  Tensor sq_grad_sum;  // [T, padded P]
  Tensor grad_mean;    // [T, padded P], or [T, 0] without momentum
  Tensor excess_risk;
  Tensor relative_excess_risk;
  Tensor baseline_excess_risk;
  Tensor log_task_weights;
  Tensor task_weights;
  Tensor num_steps;          // [] int64
  Tensor num_task_steps;     // [T] int64
  Tensor num_skipped_steps;  // [] int64
  Tensor found_nonfinite;    // [T] bool
  Tensor ticket;             // [1] int32, CUDA only

  int64_t num_tasks() const { return sq_grad_sum.size(0); }
  RoundingSource rounding(int64_t seed) const { return {seed, num_steps, num_skipped_steps, 0}; }

  TaskState task_state() const {
    return task_state_of(excess_risk, relative_excess_risk, baseline_excess_risk, log_task_weights,
                         task_weights, num_steps, num_task_steps, num_skipped_steps,
                         found_nonfinite);
  }
};

// In the order of the schemas, where rounding_seed stands apart.
struct StepChoices {
  bool sqrt_fisher;
  double eps;
  double gradient_momentum;
  double robust_step_size;
  int64_t num_warmup_steps;
  bool relative;
  double min_weight;
  double weight_total;
  int64_t rounding_seed;

  TaskOptions task_options(const ParamLayout& layout) const {
    const double raw_risk_scale =
        sqrt_fisher || layout.num_params == 0 ? 1.0 : 1.0 / static_cast<double>(layout.num_params);
    return {gradient_momentum, num_warmup_steps, relative,    raw_risk_scale,
            robust_step_size,  min_weight,       weight_total};
  }
};

template <class... T>
struct TypeList {};

// The members' types, for the ops' signatures; a choice that is new comes with a default, at the end of the schemas.
using StepTensorTypes = TypeList<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor, Tensor>;
using StepChoiceTypes = TypeList<bool, double, double, double, int64_t, bool, double,
                                 double>;   // sqrt_fisher to weight_total
using LateChoiceTypes = TypeList<int64_t>;  // rounding_seed

inline void check_step(const StepTensors& state, const StepChoices& choices,
                       const ParamLayout& layout) {
  const Tensor& sums = state.sq_grad_sum;
  check_state(sums, state.grad_mean, layout, choices.gradient_momentum > 0.0);
  const int64_t num_tasks = state.num_tasks();
  check_num_tasks(num_tasks);
  check_element_options(choices.eps, choices.gradient_momentum);
  check_weight_options(choices.robust_step_size, choices.min_weight, choices.weight_total,
                       num_tasks);
  check_num_warmup_steps(choices.num_warmup_steps);
  constexpr ScalarType kDouble = ScalarType::Double;
  check_vector(state.excess_risk, "excess_risk", num_tasks, kDouble, sums);
  check_vector(state.relative_excess_risk, "relative_excess_risk", num_tasks, kDouble, sums);
  check_vector(state.baseline_excess_risk, "baseline_excess_risk", num_tasks, kDouble, sums);
  check_vector(state.log_task_weights, "log_task_weights", num_tasks, kDouble, sums);
  check_vector(state.task_weights, "task_weights", num_tasks, kDouble, sums);
  check_vector(state.num_steps, "num_steps", 1, ScalarType::Long, sums);
  check_vector(state.num_task_steps, "num_task_steps", num_tasks, ScalarType::Long, sums);
  check_vector(state.num_skipped_steps, "num_skipped_steps", 1, ScalarType::Long, sums);
  check_vector(state.found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, sums);
  check_vector(state.ticket, "ticket", 1, ScalarType::Int, sums);
}

}  // namespace excessmtl
