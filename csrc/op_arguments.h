// The arguments of every op, spelled, read and checked once for both backends: a wrong one gets the same words on every device, and
// nothing is written before all have been seen.
//
// A backend writes one function per op, which takes the op's call: TORCH_BOX(&fold_entry<&fold>) registers it.
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
#include "task_state.h"

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

// What combine_ works on besides gradients and outputs.
struct CombineState {
  Tensor task_weights;     // [T] float64, or [T, L]
  Tensor found_nonfinite;  // [T] bool
  // Checked, and not used: a step that is not finite has written no state.
  Tensor sq_grad_sum;  // [T, padded P], or no elements
  Tensor grad_mean;
  double gradient_momentum;
  RoundingSource rounding;

  bool has_rows() const { return sq_grad_sum.numel() > 0; }
  // Whether every tensor has a weight of its own.
  bool per_tensor() const { return task_weights.dim() == 2; }
};

// ---- fused_step_ and fused_step_combine_ -----------------------------------------------------------------------------

struct StepCall {
  ParamLayout layout;
  Tensor chunk_map;
  std::optional<Tensor> grad_scale;
  StepTensors state;
  StepChoices choices;
  std::vector<Tensor> outputs;  // none: fused_step_
  bool accumulate;
  MoveArguments moves;
  TaskGrads grads;

  RoundingSource rounding() const { return state.rounding(choices.rounding_seed); }
  CombineState combine_state() const {
    return {moves.per_tensor ? *moves.tensor_weights : state.task_weights,
            state.found_nonfinite,
            state.sq_grad_sum,
            state.grad_mean,
            choices.gradient_momentum,
            rounding()};
  }
};

inline void read_step_grads(StepCall& call, std::vector<Tensor> task_grads) {
  const StepTensors& state = call.state;
  check_step(state, call.choices, call.layout);
  check_moves(call.moves, state.num_tasks(), call.layout.num_tensors(), state.sq_grad_sum);
  call.grads =
      read_task_grads(std::move(task_grads), call.layout, state.num_tasks(), state.sq_grad_sum);
  check_state_holds(call.grads, state.sq_grad_sum);
  check_outputs(call.outputs, call.layout, state.sq_grad_sum);
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
  add_extents(extents, call.moves);
  add_extents(extents, call.outputs);
  const WrittenMemory written(std::move(extents));
  check_plan_apart(call.chunk_map, call.grad_scale, written);
  check_moves_apart(call.moves, written);
  check_grads_apart(call.grads, call.layout, written);
}

template <auto kRun, class Tensors, class Choices, class LateChoices, class Moves>
struct StepEntryOf;

template <auto kRun, typename... Tensors, typename... Choices, typename... LateChoices,
          typename... Moves>
struct StepEntryOf<kRun, TypeList<Tensors...>, TypeList<Choices...>, TypeList<LateChoices...>,
                   TypeList<Moves...>> {
  static void fused_step(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
                         std::optional<Tensor> grad_scale, Tensors... state, Choices... choices,
                         LateChoices... late_choices, Moves... moves) {
    fused_step_combine(std::move(task_grads), {}, std::move(param_numels), std::move(chunk_map),
                       std::move(grad_scale), std::move(state)..., choices..., false,
                       late_choices..., std::move(moves)...);
  }
  static void fused_step_combine(std::vector<Tensor> task_grads, std::vector<Tensor> outputs,
                                 Tensor param_numels, Tensor chunk_map,
                                 std::optional<Tensor> grad_scale, Tensors... state,
                                 Choices... choices, bool accumulate, LateChoices... late_choices,
                                 Moves... moves) {
    StepCall call = {read_param_layout(param_numels),
                     std::move(chunk_map),
                     std::move(grad_scale),
                     {std::move(state)...},
                     {choices..., late_choices...},
                     std::move(outputs),
                     accumulate,
                     {std::move(moves)...},
                     {}};
    read_step_grads(call, std::move(task_grads));
    kRun(call);
  }
};

template <auto kRun>
using StepEntry =
    StepEntryOf<kRun, StepTensorTypes, StepChoiceTypes, LateChoiceTypes, MoveArgumentTypes>;

// ---- accumulate_excess_risk_ -----------------------------------------------------------------------------------------

struct AccumulateCall {
  ParamLayout layout;
  Tensor chunk_map;
  std::optional<Tensor> grad_scale;
  Tensor sq_grad_sum;
  Tensor grad_mean;
  Tensor excess_risk_sum;
  Tensor ticket;
  bool sqrt_fisher;
  double eps;
  double gradient_momentum;
  RoundingSource rounding;
  std::optional<Tensor> known_nonfinite;  // [R] bool
  std::optional<Tensor> square_sums;  // [R, L] float64
  TaskGrads grads;
};

inline void read_grads_to_accumulate(AccumulateCall& call, std::vector<Tensor> task_grads) {
  const Tensor& sums = call.sq_grad_sum;
  check_state(sums, call.grad_mean, call.layout, call.gradient_momentum > 0.0);
  const int64_t num_tasks = sums.size(0);
  check_num_tasks(num_tasks);
  check_element_options(call.eps, call.gradient_momentum);
  check_vector(call.excess_risk_sum, "excess_risk_sum", num_tasks, ScalarType::Double, sums);
  check_vector(call.ticket, "ticket", 1, ScalarType::Int, sums);
  check_rounding(call.rounding, sums);
  call.grads = read_task_grads(std::move(task_grads), call.layout, num_tasks, sums);
  check_state_holds(call.grads, sums);
  std::vector<Extent> extents = {
      extent_of(sums, "sq_grad_sum"), extent_of(call.grad_mean, "grad_mean"),
      extent_of(call.excess_risk_sum, "excess_risk_sum"), extent_of(call.ticket, "ticket")};
  if (call.square_sums.has_value()) {
    check_per_tensor(*call.square_sums, "square_sums", num_tasks, call.layout.num_tensors(),
                     ScalarType::Double, sums);
    extents.push_back(extent_of(*call.square_sums, "square_sums"));
  }
  const WrittenMemory written(std::move(extents));
  if (call.known_nonfinite.has_value()) {
    check_vector(*call.known_nonfinite, "known_nonfinite", num_tasks, ScalarType::Bool, sums);
    written.check_apart(*call.known_nonfinite, "known_nonfinite");
  }
  check_plan_apart(call.chunk_map, call.grad_scale, written);
  check_rounding_apart(call.rounding, written);
  check_grads_apart(call.grads, call.layout, written);
}

template <auto kRun>
void accumulate_excess_risk_entry(std::vector<Tensor> task_grads, Tensor param_numels,
                                  Tensor chunk_map, std::optional<Tensor> grad_scale,
                                  Tensor sq_grad_sum, Tensor grad_mean, Tensor excess_risk_sum,
                                  Tensor ticket, bool sqrt_fisher, double eps,
                                  double gradient_momentum, std::optional<Tensor> num_steps,
                                  std::optional<Tensor> num_skipped_steps, int64_t rounding_seed,
                                  int64_t first_task, std::optional<Tensor> known_nonfinite,
                                  std::optional<Tensor> square_sums) {
  AccumulateCall call = {
      read_param_layout(param_numels),
      std::move(chunk_map),
      std::move(grad_scale),
      std::move(sq_grad_sum),
      std::move(grad_mean),
      std::move(excess_risk_sum),
      std::move(ticket),
      sqrt_fisher,
      eps,
      gradient_momentum,
      {rounding_seed, std::move(num_steps), std::move(num_skipped_steps), first_task},
      std::move(known_nonfinite),
      std::move(square_sums),
      {}};
  read_grads_to_accumulate(call, std::move(task_grads));
  kRun(call);
}

// ---- update_task_risks_ ----------------------------------------------------------------------------------------------

struct TaskRisksCall {
  Tensor excess_risk_sum;  // [T] float64
  std::vector<int64_t> tasks;
  TaskState state;
  TaskOptions options;

  int64_t num_tasks() const { return excess_risk_sum.numel(); }
};

template <auto kRun>
void update_task_risks_entry(Tensor excess_risk_sum, std::vector<int64_t> tasks, Tensor excess_risk,
                             Tensor relative_excess_risk, Tensor baseline_excess_risk,
                             Tensor num_steps, Tensor num_task_steps, Tensor found_nonfinite,
                             double gradient_momentum, int64_t num_warmup_steps, bool relative,
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
  check_raw_risk_scale(raw_risk_scale);
  const WrittenMemory written({extent_of(excess_risk, "excess_risk"),
                               extent_of(relative_excess_risk, "relative_excess_risk"),
                               extent_of(baseline_excess_risk, "baseline_excess_risk"),
                               extent_of(num_task_steps, "num_task_steps"),
                               extent_of(found_nonfinite, "found_nonfinite")});
  written.check_apart(excess_risk_sum, "excess_risk_sum");
  written.check_apart(num_steps, "num_steps");

  TaskState state = {};
  state.excess_risk = excess_risk.mutable_data_ptr<double>();
  state.relative_excess_risk = relative_excess_risk.mutable_data_ptr<double>();
  state.baseline_excess_risk = baseline_excess_risk.mutable_data_ptr<double>();
  state.num_steps = const_cast<int64_t*>(num_steps.const_data_ptr<int64_t>());  // only read
  state.num_task_steps = num_task_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = found_nonfinite.mutable_data_ptr<bool>();
  TaskOptions options = {};
  options.momentum = gradient_momentum;
  options.num_warmup_steps = num_warmup_steps;
  options.relative = relative;
  options.raw_risk_scale = raw_risk_scale;
  kRun(TaskRisksCall{std::move(excess_risk_sum), std::move(tasks), state, options});
}

// ---- update_task_weights_ --------------------------------------------------------------------------------------------

struct TaskWeightsCall {
  Tensor task_weights;  // [T] float64
  std::vector<int64_t> tasks;
  TaskState state;
  TaskOptions options;

  int64_t num_tasks() const { return task_weights.numel(); }
};

template <auto kRun>
void update_task_weights_entry(std::vector<int64_t> tasks, Tensor relative_excess_risk,
                               Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                               Tensor num_skipped_steps, Tensor found_nonfinite,
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

  TaskState state = {};
  // Only read.
  state.relative_excess_risk = const_cast<double*>(relative_excess_risk.const_data_ptr<double>());
  state.log_task_weights = log_task_weights.mutable_data_ptr<double>();
  state.task_weights = task_weights.mutable_data_ptr<double>();
  state.num_steps = num_steps.mutable_data_ptr<int64_t>();
  state.num_skipped_steps = num_skipped_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = const_cast<bool*>(found_nonfinite.const_data_ptr<bool>());  // only read
  TaskOptions options = {};
  options.num_warmup_steps = num_warmup_steps;
  options.robust_step_size = robust_step_size;
  options.min_weight = min_weight;
  options.weight_total = weight_total;
  kRun(TaskWeightsCall{std::move(task_weights), std::move(tasks), state, options});
}

// ---- combine_ --------------------------------------------------------------------------------------------------------

struct CombineCall {
  ParamLayout layout;
  Tensor chunk_map;
  std::optional<Tensor> grad_scale;
  CombineState state;
  std::vector<Tensor> outputs;
  bool accumulate;
  TaskGrads grads;
};

// The second half of a step.
inline CombineCall combine_call_of(StepCall&& step) {
  CombineState state = step.combine_state();
  return {std::move(step.layout), std::move(step.chunk_map), std::move(step.grad_scale),
          std::move(state),       std::move(step.outputs),   step.accumulate,
          std::move(step.grads)};
}

inline void read_grads_to_combine(CombineCall& call, std::vector<Tensor> task_grads) {
  const CombineState& state = call.state;
  const Tensor& weights = state.task_weights;
  const int64_t num_tasks = state.per_tensor() ? weights.size(0) : weights.numel();
  check_num_tasks(num_tasks);
  if (state.per_tensor()) {
    check_per_tensor(weights, "task_weights", num_tasks, call.layout.num_tensors(),
                     ScalarType::Double, weights);
  } else {
    check_vector(weights, "task_weights", num_tasks, ScalarType::Double, weights);
  }
  check_vector(state.found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, weights);
  check_element_options(1.0, state.gradient_momentum);
  STD_TORCH_CHECK(state.sq_grad_sum.dim() == 2 && state.sq_grad_sum.size(0) == num_tasks,
                  "Expected `sq_grad_sum` to have ", num_tasks, " rows, but got another shape.");
  if (state.has_rows()) {
    check_state(state.sq_grad_sum, state.grad_mean, call.layout, state.gradient_momentum > 0.0);
    check_same_device(state.sq_grad_sum, "sq_grad_sum", weights);
  }
  check_rounding(state.rounding, state.sq_grad_sum);
  call.grads = read_task_grads(std::move(task_grads), call.layout, num_tasks, weights);
  std::vector<Extent> extents;
  if (state.has_rows()) {
    check_state_holds(call.grads, state.sq_grad_sum);
    extents = {extent_of(state.sq_grad_sum, "sq_grad_sum"),
               extent_of(state.grad_mean, "grad_mean")};
  }
  check_outputs(call.outputs, call.layout, weights);
  add_extents(extents, call.outputs);
  const WrittenMemory written(std::move(extents));
  check_plan_apart(call.chunk_map, call.grad_scale, written);
  check_rounding_apart(state.rounding, written);
  written.check_apart(weights, "task_weights");
  written.check_apart(state.found_nonfinite, "found_nonfinite");
  check_grads_apart(call.grads, call.layout, written);
}

template <auto kRun>
void combine_entry(std::vector<Tensor> task_grads, std::vector<Tensor> outputs, Tensor param_numels,
                   Tensor chunk_map, std::optional<Tensor> grad_scale, Tensor task_weights,
                   Tensor found_nonfinite, Tensor sq_grad_sum, Tensor grad_mean,
                   double gradient_momentum, bool accumulate, std::optional<Tensor> num_steps,
                   std::optional<Tensor> num_skipped_steps, int64_t rounding_seed,
                   int64_t first_task) {
  CombineCall call = {
      read_param_layout(param_numels),
      std::move(chunk_map),
      std::move(grad_scale),
      {std::move(task_weights),
       std::move(found_nonfinite),
       std::move(sq_grad_sum),
       std::move(grad_mean),
       gradient_momentum,
       {rounding_seed, std::move(num_steps), std::move(num_skipped_steps), first_task}},
      std::move(outputs),
      accumulate,
      {}};
  read_grads_to_combine(call, std::move(task_grads));
  kRun(call);
}

// ---- fold_ -----------------------------------------------------------------------------------------------------------

struct FoldCall {
  ParamLayout layout;
  Tensor chunk_map;
  Tensor log_weight;       // [] float64, or [L]
  Tensor running_sum;      // [padded P]
  Tensor running_log_max;  // like log_weight
  TaskGrads grads;

  bool per_tensor() const { return log_weight.numel() != 1; }
};

template <auto kRun>
void fold_entry(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
                Tensor log_weight, Tensor running_sum, Tensor running_log_max) {
  FoldCall call = {read_param_layout(param_numels), std::move(chunk_map),
                   std::move(log_weight),           std::move(running_sum),
                   std::move(running_log_max),      {}};
  const int64_t num_weights = call.per_tensor() ? call.layout.num_tensors() : 1;
  check_vector(call.log_weight, "log_weight", num_weights, ScalarType::Double, call.running_sum);
  check_vector(call.running_log_max, "running_log_max", num_weights, ScalarType::Double,
               call.running_sum);
  const ScalarType type = call.running_sum.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "Expected `running_sum` of float32 or float64, but got ",
                  torch::headeronly::toString(type), ".");
  check_vector(call.running_sum, "running_sum", call.layout.padded_numel(), type, call.running_sum);
  call.grads = read_task_grads(std::move(task_grads), call.layout, 1, call.running_sum);
  check_state_holds(call.grads, call.running_sum);
  const WrittenMemory written({extent_of(call.running_sum, "running_sum"),
                               extent_of(call.running_log_max, "running_log_max")});
  check_plan_apart(call.chunk_map, std::nullopt, written);
  written.check_apart(call.log_weight, "log_weight");
  check_grads_apart(call.grads, call.layout, written);
  kRun(call);
}

}  // namespace excessmtl
