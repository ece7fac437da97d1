// accumulate_excess_risk_ on the CPU.
//
// Work:         item = (task, chunk of kChunkNumel padded parameters), spread over the threads of torch.
// Traffic:      task_grads read twice; sq_grad_sum (and grad_mean) read once and written once: 16 (24) bytes per float32 element, of
//               which the first 4 look for gradients that are not finite: nothing is written before it is known that there are none.
// Squares:      the sums per tensor read a gradient again while a block of kBlockNumel of it is in the first-level cache.
// Determinism:  one partial per item, and one per piece (chunk c, tensor l) for the squares, added in double in chunk order: equal
//               inputs give equal bits for any number of threads.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../op_arguments.h"
#include "chunks.h"
#include "grad_scale.h"
#include "state_rows.h"
#include "step_phases.h"

namespace excessmtl::cpu {
namespace {

// The tasks with a gradient whose square is not finite.
template <typename acc_t>
std::vector<uint8_t> find_nonfinite(const TaskGrads& grads, const ParamLayout& layout,
                                    acc_t inverse_scale) {
  const FoldLoops<acc_t>& loops = fold_loops<acc_t>();
  const int64_t chunks = num_chunks(layout);
  std::vector<uint8_t> found_in_item(grads.num_tasks() * chunks, 0);
  for_each_item(
      grads.num_tasks() * chunks, std::min(layout.padded_numel(), kChunkNumel), [&](int64_t item) {
        const int64_t task = item / chunks;
        if (!grads.is_present[task]) {
          return;
        }
        for_each_slice(layout, item % chunks,
                       [&](int64_t segment, int64_t in_segment, int64_t /*position*/, int64_t count) {
                         const int64_t k = task * layout.num_tensors() + segment;
                         if (grads.data[k] == nullptr) {
                           return;
                         }
                         const acc_t largest = loops.largest_magnitude[grads.types[k]](
                             advanced(grads.data[k], grads.types[k], in_segment), count);
                         if (!has_finite_square(largest, inverse_scale)) {
                           found_in_item[item] = 1;
                         }
                       });
      });
  std::vector<uint8_t> found(grads.num_tasks(), 0);
  for (int64_t item = 0; item < static_cast<int64_t>(found_in_item.size()); ++item) {
    found[item / chunks] |= found_in_item[item];
  }
  return found;
}

// True: no task is flagged. False: the sums say which are, and the step must write nothing.
bool all_finite(const std::vector<uint8_t>& found, const TaskGrads& grads,
                double* excess_risk_sum) {
  if (std::find(found.begin(), found.end(), 1) == found.end()) {
    return true;
  }
  for (int64_t task = 0; task < grads.num_tasks(); ++task) {
    if (grads.is_present[task]) {
      excess_risk_sum[task] = found[task] != 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    }
  }
  return false;
}

// Each chunk-or-tensor border begins one more piece, so piece (c, l) has the number c + l.
int64_t num_pieces(const ParamLayout& layout) { return num_chunks(layout) + layout.num_tensors(); }

// Adds the pieces of every tensor up, in chunk order.
template <typename acc_t>
void sum_pieces(const std::vector<double>& pieces, const ParamLayout& layout, int64_t num_tasks,
                double* square_sums) {
  const int64_t num_tensors = layout.num_tensors();
  for (int64_t task = 0; task < num_tasks; ++task) {
    const double* const row = pieces.data() + task * num_pieces(layout);
    for (int64_t index = 0; index < num_tensors; ++index) {
      double sum = 0.0;
      if (layout.numels[index] > 0) {
        const int64_t last = (layout.offsets[index] + layout.numels[index] - 1) / kChunkNumel;
        for (int64_t chunk = layout.offsets[index] / kChunkNumel; chunk <= last; ++chunk) {
          sum += row[chunk + index];
        }
      }
      square_sums[task * num_tensors + index] = bounded_square_sum<acc_t>(sum);
    }
  }
}

template <typename state_t>
void accumulate(const TaskGrads& grads, const ParamLayout& layout, const StepRows& rows,
                bool sqrt_fisher, const ElementOptions<Accumulation<state_t>>& options,
                double* excess_risk_sum, double* square_sums) {
  using acc_t = Accumulation<state_t>;
  const StateLoops<state_t>& loops = state_loops<state_t>();
  const FoldLoops<acc_t>& grad_loops = fold_loops<acc_t>();
  const bool has_momentum = options.momentum > 0;
  const int64_t stride = layout.padded_numel();
  const int64_t chunks = num_chunks(layout);
  state_t* sums = rows_of<state_t>(rows.sq_grad_sum);
  state_t* means = has_momentum ? rows_of<state_t>(rows.grad_mean) : nullptr;
  std::vector<double> partials(grads.num_tasks() * chunks, 0.0);
  std::vector<double> pieces(square_sums == nullptr ? 0 : grads.num_tasks() * num_pieces(layout),
                             0.0);
  for_each_item(grads.num_tasks() * chunks, std::min(stride, kChunkNumel), [&](int64_t item) {
    const int64_t task = item / chunks;
    if (!grads.is_present[task]) {
      return;
    }
    const RoundingKey key = row_key(rows.rounding, task);
    double partial = 0.0;
    for_each_slice(layout, item % chunks,
                   [&](int64_t segment, int64_t in_segment, int64_t position, int64_t count) {
                     const int64_t k = task * layout.num_tensors() + segment;
                     if (grads.data[k] == nullptr) {
                       return;
                     }
                     const int64_t at = task * stride + position;
                     const int64_t block = square_sums == nullptr ? count : kBlockNumel;
                     double share = 0.0;
                     double square = 0.0;
                     for (int64_t from = 0; from < count; from += block) {
                       const int64_t size = std::min(block, count - from);
                       const void* grad =
                           advanced(grads.data[k], grads.types[k], in_segment + from);
                       share += loops.accumulate[grads.types[k]][sqrt_fisher][has_momentum](
                           grad, sums + at + from, has_momentum ? means + at + from : nullptr, size,
                           options, slice_rounding(key, position + from));
                       if (square_sums != nullptr) {
                         square += grad_loops.square_sum[grads.types[k]](
                             grad, options.inverse_scale, size);
                       }
                     }
                     partial += share;
                     if (square_sums != nullptr) {
                       pieces[task * num_pieces(layout) + item % chunks + segment] = square;
                     }
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
  if (square_sums != nullptr) {
    sum_pieces<acc_t>(pieces, layout, grads.num_tasks(), square_sums);
  }
}

void accumulate_excess_risk(const AccumulateCall& call) {
  run_accumulate(
      call.grads, call.layout, read_grad_scale(call.grad_scale),
      {call.sq_grad_sum, call.grad_mean, call.gradient_momentum,
       read_rounding(call.rounding, call.sq_grad_sum)},
      call.sqrt_fisher, call.eps, call.excess_risk_sum.mutable_data_ptr<double>(),
      call.square_sums.has_value() ? call.square_sums->mutable_data_ptr<double>() : nullptr,
      call.known_nonfinite.has_value() ? call.known_nonfinite->const_data_ptr<bool>() : nullptr);
}

}  // namespace

void run_accumulate(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                    const StepRows& rows, bool sqrt_fisher, double eps, double* excess_risk_sum,
                    double* square_sums, const bool* known_nonfinite) {
  with_state_type(rows.sq_grad_sum, [&](auto zero) {
    using state_t = decltype(zero);
    const auto options =
        make_element_options<Accumulation<state_t>>(eps, rows.gradient_momentum, grad_scale);
    const std::vector<uint8_t> found =
        known_nonfinite != nullptr
            ? std::vector<uint8_t>(known_nonfinite, known_nonfinite + grads.num_tasks())
            : find_nonfinite(grads, layout, options.inverse_scale);
    if (all_finite(found, grads, excess_risk_sum)) {
      accumulate<state_t>(grads, layout, rows, sqrt_fisher, options, excess_risk_sum,
                          square_sums);
    } else if (square_sums != nullptr) {
      std::fill(square_sums, square_sums + grads.num_tasks() * layout.num_tensors(), 0.0);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("accumulate_excess_risk_",
         TORCH_BOX(&accumulate_excess_risk_entry<&accumulate_excess_risk>));
}

}  // namespace excessmtl::cpu
