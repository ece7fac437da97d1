// How the shared parameters lie in the flat state, and the gradients of a step as the ops see them.
// Both backends read their arguments through here, so that a wrong argument gets the same words on every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "checks.h"

namespace excessmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 32 floats are 128 bytes: every segment of the state starts on a cache line (and on a GPU's memory transaction), whatever the
// sizes of the tensors before it.
constexpr int64_t kSegmentAlignment = 32;

struct ParamLayout {
  std::vector<int64_t> numels;   // [L]
  std::vector<int64_t> offsets;  // [L + 1], padded
  int64_t num_params = 0;        // P

  int64_t num_tensors() const { return static_cast<int64_t>(numels.size()); }
  int64_t padded_numel() const { return offsets.back(); }
  // The segment that covers a padded position below padded_numel().
  int64_t segment_at(int64_t position) const {
    return std::upper_bound(offsets.begin(), offsets.end(), position) - offsets.begin() - 1;
  }
};

inline ParamLayout read_param_layout(const Tensor& param_numels) {
  check_dtype(param_numels, "param_numels", ScalarType::Long);
  STD_TORCH_CHECK(param_numels.is_cpu(),
                  "Expected `param_numels` on the CPU: the launch is planned on the host.");
  STD_TORCH_CHECK(param_numels.dim() == 1 && param_numels.is_contiguous(),
                  "Expected `param_numels` to be a contiguous vector.");
  check_storage(param_numels, "param_numels");
  ParamLayout layout;
  const int64_t num_tensors = param_numels.numel();
  const int64_t* numels = param_numels.const_data_ptr<int64_t>();
  layout.numels.assign(numels, numels + num_tensors);
  layout.offsets.reserve(num_tensors + 1);
  int64_t offset = 0;
  for (const int64_t numel : layout.numels) {
    STD_TORCH_CHECK(numel >= 0 && numel <= (int64_t{1} << 48) && offset <= (int64_t{1} << 50),
                    "Expected `param_numels` between 0 and 2^48, but got ", numel, ".");
    layout.offsets.push_back(offset);
    layout.num_params += numel;
    offset += (numel + kSegmentAlignment - 1) / kSegmentAlignment * kSegmentAlignment;
  }
  layout.offsets.push_back(offset);
  return layout;
}

// The element types of gradients, in the order of the kernels' dispatch tables.
enum GradType : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16, kNumGradTypes };

constexpr int64_t kGradBytes[kNumGradTypes] = {8, 4, 2, 2};

inline GradType grad_type_of(const Tensor& grad) {
  switch (grad.scalar_type()) {
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "Expected `task_grads` of float64, float32, bfloat16 or float16, but got ",
                      torch::headeronly::toString(grad.scalar_type()), ".");
  }
}

// One step's gradients: task-major pointers into contiguous tensors, nullptr where a task has none.
struct TaskGrads {
  std::vector<Tensor> tensors;      // keeps the contiguous copies of strided gradients alive
  std::vector<const void*> data;    // [T * L]
  std::vector<GradType> types;      // [T * L]
  std::vector<uint8_t> is_present;  // [T]: the task has a gradient for at least one parameter

  int64_t num_tasks() const { return static_cast<int64_t>(is_present.size()); }
  bool any_present() const {
    return std::find(is_present.begin(), is_present.end(), 1) != is_present.end();
  }
};

// `like`: a tensor on the device of the step.
inline TaskGrads read_task_grads(std::vector<Tensor> task_grads, const ParamLayout& layout,
                                 int64_t num_tasks, const Tensor& like) {
  const int64_t num_tensors = layout.num_tensors();
  STD_TORCH_CHECK(static_cast<int64_t>(task_grads.size()) == num_tasks * num_tensors,
                  "Expected `task_grads` to hold ", num_tasks, " tasks x ", num_tensors,
                  " parameters = ", num_tasks * num_tensors, " tensors, but got ",
                  task_grads.size(), ".");
  TaskGrads grads;
  grads.tensors = std::move(task_grads);
  grads.data.assign(grads.tensors.size(), nullptr);
  grads.types.assign(grads.tensors.size(), kFloat32);
  grads.is_present.assign(num_tasks, 0);
  const DeviceOf device(like);
  for (int64_t task = 0; task < num_tasks; ++task) {
    for (int64_t index = 0; index < num_tensors; ++index) {
      const int64_t k = task * num_tensors + index;
      Tensor& grad = grads.tensors[k];
      const int64_t numel = grad.numel();
      if (numel == 0) {
        continue;
      }
      STD_TORCH_CHECK(numel == layout.numels[index], "Expected `task_grads` of task ", task,
                      ", parameter ", index, " to have ", layout.numels[index],
                      " elements, but got ", numel, ".");
      check_same_device(grad, "task_grads", device);
      grads.types[k] = grad_type_of(grad);
      check_storage(grad, "task_grads");
      if (!grad.is_contiguous()) {
        grad = torch::stable::contiguous(grad);
      }
      grads.data[k] = grad.const_data_ptr();
      grads.is_present[task] = 1;
    }
  }
  return grads;
}

// L outputs or none; one without elements stands for "no output for this parameter".
inline void check_outputs(const std::vector<Tensor>& outputs, const ParamLayout& layout,
                          const Tensor& like) {
  STD_TORCH_CHECK(outputs.empty() || static_cast<int64_t>(outputs.size()) == layout.num_tensors(),
                  "Expected `outputs` to hold ", layout.num_tensors(), " tensors or none, but got ",
                  outputs.size(), ".");
  for (size_t index = 0; index < outputs.size(); ++index) {
    const Tensor& output = outputs[index];
    if (output.numel() == 0) {
      continue;
    }
    STD_TORCH_CHECK(output.numel() == layout.numels[index] && output.is_contiguous(),
                    "Expected `outputs` ", index, " to be contiguous with ", layout.numels[index],
                    " elements, but got ", output.numel(), ".");
    check_same_device(output, "outputs", like);
    (void)grad_type_of(output);
    check_storage(output, "outputs");
  }
}

// State rows [R, padded P] in the accumulation type, or in bfloat16; grad_mean has no columns when momentum is off.
inline void check_state(const Tensor& sq_grad_sum, const Tensor& grad_mean,
                        const ParamLayout& layout, bool has_momentum) {
  const ScalarType type = sq_grad_sum.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
      "Expected `sq_grad_sum` of float32, float64 or bfloat16, but got ",
      torch::headeronly::toString(type), ".");
  check_matrix(sq_grad_sum, "sq_grad_sum", sq_grad_sum.dim() == 2 ? sq_grad_sum.size(0) : -1,
               layout.padded_numel());
  check_dtype(grad_mean, "grad_mean", type);
  check_same_device(grad_mean, "grad_mean", sq_grad_sum);
  check_matrix(grad_mean, "grad_mean", sq_grad_sum.size(0),
               has_momentum ? layout.padded_numel() : 0);
}

// Narrower state would lose what float64 gradients carry.
inline void check_state_holds(const TaskGrads& grads, const Tensor& sq_grad_sum) {
  if (sq_grad_sum.scalar_type() == ScalarType::Double) {
    return;
  }
  for (size_t k = 0; k < grads.data.size(); ++k) {
    STD_TORCH_CHECK(grads.data[k] == nullptr || grads.types[k] != kFloat64,
                    "Expected `sq_grad_sum` of float64 for float64 gradients, but got ",
                    torch::headeronly::toString(sq_grad_sum.scalar_type()), ".");
  }
}

}  // namespace excessmtl
