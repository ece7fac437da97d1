// accumulate_excess_risk_ on the CPU.
//
// Work:         item = (task, chunk of kChunkNumel padded parameters), spread over the threads of torch.
// Traffic:      task_grads read once; sq_grad_sum (and grad_mean) read once and written once: 12 (20) bytes per float32 element.
// Determinism:  one partial per item, added in double in chunk order: equal inputs give equal bits for any number of threads.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../op_arguments.h"
#include "chunks.h"
#include "grad_scale.h"
#include "state_rows.h"
#include "step_phases.h"

namespace excessmtl::cpu {
namespace {

template <typename state_t>
void accumulate(const TaskGrads& grads, const ParamLayout& layout, const StepRows& rows,
                bool sqrt_fisher, const ElementOptions<Accumulation<state_t>>& options,
                double* excess_risk_sum) {
  const StateLoops<state_t>& loops = state_loops<state_t>();
  const bool has_momentum = options.momentum > 0;
  const int64_t stride = layout.padded_numel();
  const int64_t chunks = num_chunks(layout);
  state_t* sums = rows_of<state_t>(rows.sq_grad_sum);
  state_t* means = has_momentum ? rows_of<state_t>(rows.grad_mean) : nullptr;
  std::vector<double> partials(grads.num_tasks() * chunks, 0.0);
  for_each_item(grads.num_tasks() * chunks, std::min(stride, kChunkNumel), [&](int64_t item) {
    const int64_t task = item / chunks;
    if (!grads.is_present[task]) {
      return;
    }
    const RoundingKey key = row_key(rows.rounding, task, RoundingUse::kAccumulate);
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

void accumulate_excess_risk(const AccumulateCall& call) {
  run_accumulate(call.grads, call.layout, read_grad_scale(call.grad_scale),
                 {call.sq_grad_sum, call.grad_mean, call.gradient_momentum,
                  read_rounding(call.rounding, call.sq_grad_sum)},
                 call.sqrt_fisher, call.eps, call.excess_risk_sum.mutable_data_ptr<double>());
}

}  // namespace

void run_accumulate(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                    const StepRows& rows, bool sqrt_fisher, double eps, double* excess_risk_sum) {
  with_state_type(rows.sq_grad_sum, [&](auto zero) {
    using state_t = decltype(zero);
    accumulate<state_t>(
        grads, layout, rows, sqrt_fisher,
        make_element_options<Accumulation<state_t>>(eps, rows.gradient_momentum, grad_scale),
        excess_risk_sum);
  });
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("accumulate_excess_risk_",
         TORCH_BOX(&accumulate_excess_risk_entry<&accumulate_excess_risk>));
}

}  // namespace excessmtl::cpu
