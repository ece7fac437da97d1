// combine_ on the CPU.
//
// Work:     item = chunk of kChunkNumel padded parameters.
// Traffic:  every gradient read once, every output written once; the sum over tasks stays in a tile in the first-level cache.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "../op_arguments.h"
#include "../param_layout.h"
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

// ---- the sum ----------------------------------------------------------------------------------------------------------

template <typename acc_t>
void weighted_sum(const TaskGrads& grads, const ParamLayout& layout,
                  const std::vector<void*>& output_data, const std::vector<GradType>& output_types,
                  const double* task_weights, bool per_tensor, bool accumulate) {
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
                        static_cast<acc_t>(task_weights[per_tensor ? k : task]), tile, size);
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

void combine(const CombineCall& call) {
  (void)read_grad_scale(call.grad_scale);  // a wrong one is an error, though outputs keep the scale
  run_combine(call);
}

}  // namespace

void run_combine(const CombineCall& call) {
  const TaskGrads& grads = call.grads;
  const CombineState& state = call.state;
  const std::vector<Tensor>& outputs = call.outputs;
  const bool* flags = state.found_nonfinite.const_data_ptr<bool>();
  if (std::find(flags, flags + grads.num_tasks(), true) != flags + grads.num_tasks()) {
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
    weighted_sum<double>(grads, call.layout, output_data, output_types, weights,
                         state.per_tensor(), call.accumulate);
  } else {
    weighted_sum<float>(grads, call.layout, output_data, output_types, weights,
                        state.per_tensor(), call.accumulate);
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) {
  m.impl("combine_", TORCH_BOX(&combine_entry<&combine>));
}

}  // namespace excessmtl::cpu
