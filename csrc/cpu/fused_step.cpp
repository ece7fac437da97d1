// fused_step_ and accumulate_excess_risk_ on the CPU.
//
// Work:         item = (task, chunk of kChunkNumel padded parameters), spread over the threads of torch.
// Traffic:      task_grads read once; sq_grad_sum (and grad_mean) read once and written once: 12 (20) bytes per float32 element.
// Determinism:  one partial per item, added in double in chunk order: equal inputs give equal bits for any number of threads.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "chunks.h"
#include "grad_scale.h"
#include "state_rows.h"
#include "step_phases.h"
#include "task_updates.h"

namespace excessmtl::cpu {
namespace {

// Adds every present task's gradients to the state and writes the raw sums of those tasks to excess_risk_sum [R].
template <typename state_t>
void accumulate(const TaskGrads& grads, const ParamLayout& layout, const Tensor& sq_grad_sum,
                const Tensor& grad_mean, double* excess_risk_sum, bool sqrt_fisher,
                const ElementOptions<Accumulation<state_t>>& options,
                const StepRounding& rounding) {
  const StateLoops<state_t>& loops = state_loops<state_t>();
  const bool has_momentum = options.momentum > 0;
  const int64_t stride = layout.padded_numel();
  const int64_t chunks = num_chunks(layout);
  state_t* sums = rows_of<state_t>(sq_grad_sum);
  state_t* means = has_momentum ? rows_of<state_t>(grad_mean) : nullptr;
  std::vector<double> partials(grads.num_tasks() * chunks, 0.0);
  for_each_item(grads.num_tasks() * chunks, std::min(stride, kChunkNumel), [&](int64_t item) {
    const int64_t task = item / chunks;
    if (!grads.is_present[task]) {
      return;
    }
    const RoundingKey key = row_key(rounding, task, RoundingUse::kAccumulate);
    double partial = 0.0;
    for_each_slice(layout, item % chunks,
                   [&](int64_t segment, int64_t in_segment, int64_t position, int64_t count) {
                     const int64_t k = task * layout.num_tensors() + segment;
                     if (grads.data[k] == nullptr) {
                       return;
                     }
                     const int64_t at = task * stride + position;
                     partial += loops.accumulate[grads.types[k]][sqrt_fisher][has_momentum](
                         advanced(grads.data[k], grads.types[k], in_segment), sums + at,
                         has_momentum ? means + at : nullptr, count, options,
                         slice_rounding(key, position));
                   });
    partials[item] = partial;
  });
  for (int64_t task = 0; task < grads.num_tasks(); ++task) {
    if (grads.is_present[task]) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[task * chunks + chunk];
      }
      excess_risk_sum[task] = sum;
    }
  }
}

void accumulate_any_type(const TaskGrads& grads, const ParamLayout& layout,
                         const Tensor& sq_grad_sum, const Tensor& grad_mean,
                         double* excess_risk_sum, bool sqrt_fisher, double eps, double momentum,
                         double grad_scale, const StepRounding& rounding) {
  with_state_type(sq_grad_sum, [&](auto zero) {
    using state_t = decltype(zero);
    accumulate<state_t>(grads, layout, sq_grad_sum, grad_mean, excess_risk_sum, sqrt_fisher,
                        make_element_options<Accumulation<state_t>>(eps, momentum, grad_scale),
                        rounding);
  });
}

void accumulate_excess_risk_op(std::vector<Tensor> task_grads, Tensor param_numels,
                               Tensor chunk_map, std::optional<Tensor> grad_scale,
                               Tensor sq_grad_sum, Tensor grad_mean, Tensor excess_risk_sum,
                               Tensor ticket, bool sqrt_fisher, double eps,
                               double gradient_momentum, std::optional<Tensor> num_steps,
                               std::optional<Tensor> num_skipped_steps, int64_t rounding_seed,
                               int64_t first_task) {
  const ParamLayout layout = read_param_layout(param_numels);
  const RoundingSource rounding = {rounding_seed, std::move(num_steps),
                                   std::move(num_skipped_steps), first_task};
  const double scale = read_grad_scale(grad_scale);
  const TaskGrads grads =
      read_accumulation(std::move(task_grads), layout, chunk_map, grad_scale, sq_grad_sum,
                        grad_mean, excess_risk_sum, ticket, eps, gradient_momentum, rounding);
  accumulate_any_type(grads, layout, sq_grad_sum, grad_mean,
                      excess_risk_sum.mutable_data_ptr<double>(), sqrt_fisher, eps,
                      gradient_momentum, scale, read_rounding(rounding, sq_grad_sum));
}

void fused_step_op(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
                   std::optional<Tensor> grad_scale, Tensor sq_grad_sum, Tensor grad_mean,
                   Tensor excess_risk, Tensor relative_excess_risk, Tensor baseline_excess_risk,
                   Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                   Tensor num_task_steps, Tensor num_skipped_steps, Tensor found_nonfinite,
                   Tensor ticket, bool sqrt_fisher, double eps, double gradient_momentum,
                   double robust_step_size, int64_t num_warmup_steps, bool relative,
                   double min_weight, double weight_total, int64_t rounding_seed) {
  const ParamLayout layout = read_param_layout(param_numels);
  const StepTensors state = {
      sq_grad_sum,          grad_mean,         excess_risk,     relative_excess_risk,
      baseline_excess_risk, log_task_weights,  task_weights,    num_steps,
      num_task_steps,       num_skipped_steps, found_nonfinite, ticket};
  const StepChoices choices = {sqrt_fisher,      eps,      gradient_momentum, robust_step_size,
                               num_warmup_steps, relative, min_weight,        weight_total,
                               rounding_seed};
  const double scale = read_grad_scale(grad_scale);
  const TaskGrads grads =
      read_step(std::move(task_grads), {}, layout, chunk_map, grad_scale, state, choices);
  run_fused_step(grads, layout, scale, state, choices);
}

}  // namespace

void run_fused_step(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                    const StepTensors& tensors, const StepChoices& choices) {
  const int64_t num_tasks = grads.num_tasks();
  const auto state = tensors.task_state<TaskState>();
  std::fill(state.found_nonfinite, state.found_nonfinite + num_tasks, false);
  std::vector<int64_t> tasks;
  for (int64_t task = 0; task < num_tasks; ++task) {
    if (grads.is_present[task]) {
      tasks.push_back(task);
    }
  }
  std::vector<double> excess_risk_sum(num_tasks, 0.0);
  accumulate_any_type(grads, layout, tensors.sq_grad_sum, tensors.grad_mean, excess_risk_sum.data(),
                      choices.sqrt_fisher, choices.eps, choices.gradient_momentum, grad_scale,
                      read_rounding(tensors.rounding(choices.rounding_seed), tensors.sq_grad_sum));
  const TaskOptions options = choices.task_options(layout);
  if (update_task_risks(excess_risk_sum.data(), tasks, state, options)) {
    update_task_weights(tasks, num_tasks, state, options);
  } else {
    *state.num_skipped_steps += 1;
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("fused_step_", TORCH_BOX(&fused_step_op));
  m.impl("accumulate_excess_risk_", TORCH_BOX(&accumulate_excess_risk_op));
}

}  // namespace excessmtl::cpu
