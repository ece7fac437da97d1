// combine_ and fold_ on the CPU.
//
// Work:     item = chunk of kChunkNumel padded parameters (combine_, fold_) or (task, chunk) (the repair).
// Traffic:  every gradient read once, every output written once; the sum over tasks stays in a tile in the first-level cache.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "../param_layout.h"
#include "../step_arguments.h"
#include "chunks.h"
#include "grad_scale.h"
#include "step_phases.h"

namespace excessmtl::cpu {
namespace {

// A tile of the sum and one of a task's gradient fit together in 32 KiB of first-level cache.
constexpr int64_t kTileNumel = 2048;

// ---- rounding to the output's type ------------------------------------------------------------------------------------

uint16_t to_bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return 0x7fc0U;  // NaN: rounding could carry its mantissa into infinity
  }
  // To nearest, ties to even.
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

uint16_t to_float16_bits(float value) {
  const c10::Half half = value;
  return half.x;
}

template <typename acc_t>
void write_tile(const acc_t* tile, void* output, GradType type, int64_t count, bool accumulate) {
  const auto write = [&](auto* out, auto&& widen, auto&& narrow) {
    if (accumulate) {
      for (int64_t k = 0; k < count; ++k) {
        out[k] = narrow(widen(out[k]) + tile[k]);
      }
    } else {
      for (int64_t k = 0; k < count; ++k) {
        out[k] = narrow(tile[k]);
      }
    }
  };
  switch (type) {
    case kFloat64:
      return write(
          static_cast<double*>(output), [](double v) { return v; },
          [](auto v) { return static_cast<double>(v); });
    case kFloat32:
      return write(
          static_cast<float*>(output), [](float v) { return v; },
          [](auto v) { return static_cast<float>(v); });
    case kBFloat16:
      return write(
          static_cast<uint16_t*>(output),
          [](uint16_t v) {
            const uint32_t bits = static_cast<uint32_t>(v) << 16;
            float wide;
            std::memcpy(&wide, &bits, sizeof wide);
            return wide;
          },
          [](auto v) { return to_bfloat16_bits(static_cast<float>(v)); });
    default:
      return write(
          static_cast<uint16_t*>(output),
          [](uint16_t v) { return static_cast<float>(c10::Half(v, c10::Half::from_bits())); },
          [](auto v) { return to_float16_bits(static_cast<float>(v)); });
  }
}

// ---- the two phases ---------------------------------------------------------------------------------------------------

template <typename acc_t>
void combine(const TaskGrads& grads, const ParamLayout& layout,
             const std::vector<void*>& output_data, const std::vector<GradType>& output_types,
             const double* task_weights, bool accumulate) {
  const FoldLoops<acc_t>& loops = fold_loops<acc_t>();
  for_each_item(
      num_chunks(layout), grads.num_tasks() * std::min(layout.padded_numel(), kChunkNumel),
      [&](int64_t chunk) {
        for_each_slice(
            layout, chunk,
            [&](int64_t segment, int64_t in_segment, int64_t /*position*/, int64_t count) {
              if (output_data[segment] == nullptr) {
                return;
              }
              alignas(64) acc_t tile[kTileNumel];
              for (int64_t begin = 0; begin < count; begin += kTileNumel) {
                const int64_t size = std::min(kTileNumel, count - begin);
                // Whole vectors: fold moves the last one whole, and what stands behind the sum must be a number.
                std::fill(
                    tile,
                    tile + (size + kSegmentAlignment - 1) / kSegmentAlignment * kSegmentAlignment,
                    acc_t(0));
                for (int64_t task = 0; task < grads.num_tasks(); ++task) {
                  const int64_t k = task * layout.num_tensors() + segment;
                  if (grads.data[k] != nullptr) {
                    loops.fold[grads.types[k]](
                        advanced(grads.data[k], grads.types[k], in_segment + begin), acc_t(1),
                        static_cast<acc_t>(task_weights[task]), tile, size);
                  }
                }
                // The gradients of this tile are read by now, so an output may be one of them.
                char* output = static_cast<char*>(output_data[segment]) +
                               (in_segment + begin) * kGradBytes[output_types[segment]];
                write_tile(tile, output, output_types[segment], size, accumulate);
              }
            });
      });
}

template <typename state_t>
void repair(const TaskGrads& grads, const ParamLayout& layout, const Tensor& sq_grad_sum,
            const Tensor& grad_mean, const ElementOptions<Accumulation<state_t>>& options,
            const StepRounding& rounding) {
  const StateLoops<state_t>& loops = state_loops<state_t>();
  const bool has_momentum = options.momentum > 0;
  const int64_t stride = layout.padded_numel();
  const int64_t chunks = num_chunks(layout);
  state_t* sums = rows_of<state_t>(sq_grad_sum);
  state_t* means = has_momentum ? rows_of<state_t>(grad_mean) : nullptr;
  for_each_item(grads.num_tasks() * chunks, std::min(stride, kChunkNumel), [&](int64_t item) {
    const int64_t task = item / chunks;
    const RoundingKey key = row_key(rounding, task, RoundingUse::kRepair);
    for_each_slice(layout, item % chunks,
                   [&](int64_t segment, int64_t in_segment, int64_t position, int64_t count) {
                     const int64_t k = task * layout.num_tensors() + segment;
                     if (grads.data[k] != nullptr) {
                       const int64_t at = task * stride + position;
                       loops.repair[grads.types[k]][has_momentum](
                           advanced(grads.data[k], grads.types[k], in_segment), sums + at,
                           has_momentum ? means + at : nullptr, count, options,
                           slice_rounding(key, position));
                     }
                   });
  });
}

void combine_op(std::vector<Tensor> task_grads, std::vector<Tensor> outputs, Tensor param_numels,
                Tensor chunk_map, std::optional<Tensor> grad_scale, Tensor task_weights,
                Tensor found_nonfinite, Tensor sq_grad_sum, Tensor grad_mean,
                double gradient_momentum, bool accumulate, std::optional<Tensor> num_steps,
                std::optional<Tensor> num_skipped_steps, int64_t rounding_seed,
                int64_t first_task) {
  const ParamLayout layout = read_param_layout(param_numels);
  const RoundingSource rounding = {rounding_seed, std::move(num_steps),
                                   std::move(num_skipped_steps), first_task};
  const double scale = read_grad_scale(grad_scale);
  const TaskGrads grads =
      read_combination(std::move(task_grads), outputs, layout, chunk_map, grad_scale, task_weights,
                       found_nonfinite, sq_grad_sum, grad_mean, gradient_momentum, rounding);
  run_combine(grads, layout, scale,
              {task_weights, found_nonfinite, sq_grad_sum, grad_mean, gradient_momentum,
               sq_grad_sum.numel() > 0 ? read_rounding(rounding, sq_grad_sum) : StepRounding{}},
              outputs, accumulate);
}

template <typename acc_t>
void fold(const TaskGrads& grads, const ParamLayout& layout, Tensor& running_sum,
          const FoldFactors& factors) {
  const FoldLoops<acc_t>& loops = fold_loops<acc_t>();
  acc_t* sums = running_sum.mutable_data_ptr<acc_t>();
  const acc_t keep = static_cast<acc_t>(factors.keep);
  const acc_t add = static_cast<acc_t>(factors.add);
  for_each_item(
      num_chunks(layout), std::min(layout.padded_numel(), kChunkNumel), [&](int64_t chunk) {
        for_each_slice(layout, chunk,
                       [&](int64_t segment, int64_t in_segment, int64_t position, int64_t count) {
                         if (grads.data[segment] != nullptr) {
                           loops.fold[grads.types[segment]](
                               advanced(grads.data[segment], grads.types[segment], in_segment),
                               keep, add, sums + position, count);
                         } else {
                           std::transform(sums + position, sums + position + count, sums + position,
                                          [keep](acc_t v) { return v * keep; });
                         }
                       });
      });
}

void fold_op(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
             Tensor log_weight, Tensor running_sum, Tensor running_log_max) {
  const ParamLayout layout = read_param_layout(param_numels);
  const TaskGrads grads =
      read_fold(std::move(task_grads), layout, chunk_map, log_weight, running_sum, running_log_max);
  double& log_max = *running_log_max.mutable_data_ptr<double>();
  const FoldFactors factors = fold_factors(*log_weight.const_data_ptr<double>(), log_max);
  if (running_sum.scalar_type() == ScalarType::Double) {
    fold<double>(grads, layout, running_sum, factors);
  } else {
    fold<float>(grads, layout, running_sum, factors);
  }
  log_max = factors.log_max;
}

}  // namespace

void run_combine(const TaskGrads& grads, const ParamLayout& layout, double grad_scale,
                 const CombineState& state, const std::vector<Tensor>& outputs, bool accumulate) {
  const bool* flags = state.found_nonfinite.const_data_ptr<bool>();
  if (std::find(flags, flags + grads.num_tasks(), true) != flags + grads.num_tasks()) {
    if (state.sq_grad_sum.numel() > 0) {
      with_state_type(state.sq_grad_sum, [&](auto zero) {
        using state_t = decltype(zero);
        repair<state_t>(
            grads, layout, state.sq_grad_sum, state.grad_mean,
            make_element_options<Accumulation<state_t>>(1.0, state.gradient_momentum, grad_scale),
            state.rounding);
      });
    }
    for (const Tensor& output : outputs) {
      torch::stable::fill_(output, std::numeric_limits<double>::quiet_NaN());
    }
    return;
  }
  if (outputs.empty()) {
    return;
  }
  std::vector<void*> output_data(outputs.size(), nullptr);
  std::vector<GradType> output_types(outputs.size());
  bool needs_double = false;
  for (size_t index = 0; index < outputs.size(); ++index) {
    if (outputs[index].numel() > 0) {
      output_types[index] = grad_type_of(outputs[index]);
      output_data[index] = outputs[index].mutable_data_ptr();
      needs_double |= output_types[index] == kFloat64;
    }
  }
  for (size_t k = 0; k < grads.data.size(); ++k) {
    needs_double |= grads.data[k] != nullptr && grads.types[k] == kFloat64;
  }
  const double* weights = state.task_weights.const_data_ptr<double>();
  if (needs_double) {
    combine<double>(grads, layout, output_data, output_types, weights, accumulate);
  } else {
    combine<float>(grads, layout, output_data, output_types, weights, accumulate);
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("combine_", TORCH_BOX(&combine_op));
  m.impl("fold_", TORCH_BOX(&fold_op));
}

}  // namespace excessmtl::cpu
