// The arguments of every op, read and checked: both backends begin here, so that a wrong one gets the same words on every device
// and nothing is written before all have been seen.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"
#include "memory_overlap.h"
#include "param_layout.h"
#include "step_state.h"

namespace excessmtl {

// No gradient may lie where the op writes, but that outputs[l] may be a gradient of parameter l: every backend has read a tile of
// all tasks before it writes there.
inline void check_grads_apart(const TaskGrads& grads, const ParamLayout& layout,
                              const WrittenMemory& written) {
  const int64_t num_tensors = layout.num_tensors();
  for (int64_t k = 0; k < static_cast<int64_t>(grads.data.size()); ++k) {
    if (grads.data[k] == nullptr) {
      continue;
    }
    const int64_t index = k % num_tensors;
    const auto begin = reinterpret_cast<uintptr_t>(grads.data[k]);
    const uintptr_t end = begin + layout.numels[index] * kGradBytes[grads.types[k]];
    const Extent* const found = written.find(begin, end);
    if (found != nullptr &&
        !(found->index == index && found->begin == begin && found->end == end)) {
      refuse_overlap({begin, end, "task_grads", k}, *found);
    }
  }
}

// What a CUDA launch reads beside gradients and state.
inline void check_plan_apart(const Tensor& chunk_map, const std::optional<Tensor>& grad_scale,
                             const WrittenMemory& written) {
  written.check_apart(chunk_map, "chunk_map");
  if (grad_scale.has_value()) {
    written.check_apart(*grad_scale, "grad_scale");
  }
}

inline void check_rounding_apart(const RoundingSource& rounding, const WrittenMemory& written) {
  if (rounding.num_steps.has_value()) {
    written.check_apart(*rounding.num_steps, "num_steps");
  }
  if (rounding.num_skipped_steps.has_value()) {
    written.check_apart(*rounding.num_skipped_steps, "num_skipped_steps");
  }
}

inline void add_extents(std::vector<Extent>& extents, const std::vector<Tensor>& outputs) {
  for (size_t index = 0; index < outputs.size(); ++index) {
    extents.push_back(extent_of(outputs[index], "outputs", static_cast<int64_t>(index)));
  }
}

// fused_step_ (no outputs) and fused_step_combine_.
inline TaskGrads read_step(std::vector<Tensor> task_grads, const std::vector<Tensor>& outputs,
                           const ParamLayout& layout, const Tensor& chunk_map,
                           const std::optional<Tensor>& grad_scale, const StepTensors& state,
                           const StepChoices& choices) {
  check_step(state, choices, layout);
  TaskGrads grads =
      read_task_grads(std::move(task_grads), layout, state.num_tasks(), state.sq_grad_sum);
  check_state_holds(grads, state.sq_grad_sum);
  check_outputs(outputs, layout, state.sq_grad_sum);
  std::vector<Extent> extents = {
      extent_of(state.sq_grad_sum, "sq_grad_sum"),
      extent_of(state.grad_mean, "grad_mean"),
      extent_of(state.excess_risk, "excess_risk"),
      extent_of(state.relative_excess_risk, "relative_excess_risk"),
      extent_of(state.baseline_excess_risk, "baseline_excess_risk"),
      extent_of(state.log_task_weights, "log_task_weights"),
      extent_of(state.task_weights, "task_weights"),
      extent_of(state.num_steps, "num_steps"),
      extent_of(state.num_task_steps, "num_task_steps"),
      extent_of(state.num_skipped_steps, "num_skipped_steps"),
      extent_of(state.found_nonfinite, "found_nonfinite"),
      extent_of(state.ticket, "ticket"),
  };
  add_extents(extents, outputs);
  const WrittenMemory written(std::move(extents));
  check_plan_apart(chunk_map, grad_scale, written);
  check_grads_apart(grads, layout, written);
  return grads;
}

// accumulate_excess_risk_
inline TaskGrads read_accumulation(std::vector<Tensor> task_grads, const ParamLayout& layout,
                                   const Tensor& chunk_map, const std::optional<Tensor>& grad_scale,
                                   const Tensor& sq_grad_sum, const Tensor& grad_mean,
                                   const Tensor& excess_risk_sum, const Tensor& ticket, double eps,
                                   double gradient_momentum, const RoundingSource& rounding) {
  check_state(sq_grad_sum, grad_mean, layout, gradient_momentum > 0.0);
  const int64_t num_tasks = sq_grad_sum.size(0);
  check_num_tasks(num_tasks);
  check_element_options(eps, gradient_momentum);
  check_vector(excess_risk_sum, "excess_risk_sum", num_tasks, ScalarType::Double, sq_grad_sum);
  check_vector(ticket, "ticket", 1, ScalarType::Int, sq_grad_sum);
  check_rounding(rounding, sq_grad_sum);
  TaskGrads grads = read_task_grads(std::move(task_grads), layout, num_tasks, sq_grad_sum);
  check_state_holds(grads, sq_grad_sum);
  const WrittenMemory written(
      {extent_of(sq_grad_sum, "sq_grad_sum"), extent_of(grad_mean, "grad_mean"),
       extent_of(excess_risk_sum, "excess_risk_sum"), extent_of(ticket, "ticket")});
  check_plan_apart(chunk_map, grad_scale, written);
  check_rounding_apart(rounding, written);
  check_grads_apart(grads, layout, written);
  return grads;
}

// combine_. A sq_grad_sum without elements: nothing to repair.
inline TaskGrads read_combination(std::vector<Tensor> task_grads,
                                  const std::vector<Tensor>& outputs, const ParamLayout& layout,
                                  const Tensor& chunk_map, const std::optional<Tensor>& grad_scale,
                                  const Tensor& task_weights, const Tensor& found_nonfinite,
                                  const Tensor& sq_grad_sum, const Tensor& grad_mean,
                                  double gradient_momentum, const RoundingSource& rounding) {
  const int64_t num_tasks = task_weights.numel();
  check_num_tasks(num_tasks);
  check_vector(task_weights, "task_weights", num_tasks, ScalarType::Double, task_weights);
  check_vector(found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, task_weights);
  check_element_options(1.0, gradient_momentum);
  STD_TORCH_CHECK(sq_grad_sum.dim() == 2 && sq_grad_sum.size(0) == num_tasks,
                  "Expected `sq_grad_sum` to have ", num_tasks, " rows, but got another shape.");
  const bool has_state = sq_grad_sum.numel() > 0;
  if (has_state) {
    check_state(sq_grad_sum, grad_mean, layout, gradient_momentum > 0.0);
    check_same_device(sq_grad_sum, "sq_grad_sum", task_weights);
  }
  check_rounding(rounding, sq_grad_sum);
  TaskGrads grads = read_task_grads(std::move(task_grads), layout, num_tasks, task_weights);
  std::vector<Extent> extents;
  if (has_state) {
    check_state_holds(grads, sq_grad_sum);
    extents = {extent_of(sq_grad_sum, "sq_grad_sum"), extent_of(grad_mean, "grad_mean")};
  }
  check_outputs(outputs, layout, task_weights);
  add_extents(extents, outputs);
  const WrittenMemory written(std::move(extents));
  check_plan_apart(chunk_map, grad_scale, written);
  check_rounding_apart(rounding, written);
  written.check_apart(task_weights, "task_weights");
  written.check_apart(found_nonfinite, "found_nonfinite");
  check_grads_apart(grads, layout, written);
  return grads;
}

// fold_
inline TaskGrads read_fold(std::vector<Tensor> task_grads, const ParamLayout& layout,
                           const Tensor& chunk_map, const Tensor& log_weight,
                           const Tensor& running_sum, const Tensor& running_log_max) {
  check_vector(log_weight, "log_weight", 1, ScalarType::Double, running_sum);
  check_vector(running_log_max, "running_log_max", 1, ScalarType::Double, running_sum);
  const ScalarType type = running_sum.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "Expected `running_sum` of float32 or float64, but got ",
                  torch::headeronly::toString(type), ".");
  check_vector(running_sum, "running_sum", layout.padded_numel(), type, running_sum);
  TaskGrads grads = read_task_grads(std::move(task_grads), layout, 1, running_sum);
  check_state_holds(grads, running_sum);
  const WrittenMemory written(
      {extent_of(running_sum, "running_sum"), extent_of(running_log_max, "running_log_max")});
  check_plan_apart(chunk_map, std::nullopt, written);
  written.check_apart(log_weight, "log_weight");
  check_grads_apart(grads, layout, written);
  return grads;
}

// update_task_risks_
inline void check_task_risks(const Tensor& excess_risk_sum, const std::vector<int64_t>& tasks,
                             const Tensor& excess_risk, const Tensor& relative_excess_risk,
                             const Tensor& baseline_excess_risk, const Tensor& num_steps,
                             const Tensor& num_task_steps, const Tensor& found_nonfinite,
                             double gradient_momentum, int64_t num_warmup_steps,
                             double raw_risk_scale) {
  const int64_t num_tasks = excess_risk.numel();
  check_num_tasks(num_tasks);
  check_tasks(tasks, num_tasks);
  constexpr ScalarType kDouble = ScalarType::Double;
  check_vector(excess_risk_sum, "excess_risk_sum", num_tasks, kDouble, excess_risk);
  check_vector(excess_risk, "excess_risk", num_tasks, kDouble, excess_risk);
  check_vector(relative_excess_risk, "relative_excess_risk", num_tasks, kDouble, excess_risk);
  check_vector(baseline_excess_risk, "baseline_excess_risk", num_tasks, kDouble, excess_risk);
  check_vector(num_steps, "num_steps", 1, ScalarType::Long, excess_risk);
  check_vector(num_task_steps, "num_task_steps", num_tasks, ScalarType::Long, excess_risk);
  check_vector(found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, excess_risk);
  check_element_options(1.0, gradient_momentum);
  check_num_warmup_steps(num_warmup_steps);
  STD_TORCH_CHECK(std::isfinite(raw_risk_scale) && raw_risk_scale > 0.0,
                  "Expected `raw_risk_scale` > 0, but got ", raw_risk_scale, ".");
  const WrittenMemory written({extent_of(excess_risk, "excess_risk"),
                               extent_of(relative_excess_risk, "relative_excess_risk"),
                               extent_of(baseline_excess_risk, "baseline_excess_risk"),
                               extent_of(num_task_steps, "num_task_steps"),
                               extent_of(found_nonfinite, "found_nonfinite")});
  written.check_apart(excess_risk_sum, "excess_risk_sum");
  written.check_apart(num_steps, "num_steps");
}

// update_task_weights_
inline void check_task_weights(const std::vector<int64_t>& tasks,
                               const Tensor& relative_excess_risk, const Tensor& log_task_weights,
                               const Tensor& task_weights, const Tensor& num_steps,
                               const Tensor& num_skipped_steps, const Tensor& found_nonfinite,
                               double robust_step_size, int64_t num_warmup_steps, double min_weight,
                               double weight_total) {
  const int64_t num_tasks = task_weights.numel();
  check_num_tasks(num_tasks);
  check_tasks(tasks, num_tasks);
  constexpr ScalarType kDouble = ScalarType::Double;
  check_vector(relative_excess_risk, "relative_excess_risk", num_tasks, kDouble, task_weights);
  check_vector(log_task_weights, "log_task_weights", num_tasks, kDouble, task_weights);
  check_vector(task_weights, "task_weights", num_tasks, kDouble, task_weights);
  check_vector(num_steps, "num_steps", 1, ScalarType::Long, task_weights);
  check_vector(num_skipped_steps, "num_skipped_steps", 1, ScalarType::Long, task_weights);
  check_vector(found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, task_weights);
  check_weight_options(robust_step_size, min_weight, weight_total, num_tasks);
  check_num_warmup_steps(num_warmup_steps);
  const WrittenMemory written(
      {extent_of(log_task_weights, "log_task_weights"), extent_of(task_weights, "task_weights"),
       extent_of(num_steps, "num_steps"), extent_of(num_skipped_steps, "num_skipped_steps")});
  written.check_apart(relative_excess_risk, "relative_excess_risk");
  written.check_apart(found_nonfinite, "found_nonfinite");
}

}  // namespace excessmtl
