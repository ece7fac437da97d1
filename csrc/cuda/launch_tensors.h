// From the tensors of an op to what its kernel takes: one gradient type, a chunk map, a pointer table.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../param_layout.h"
#include "element_access.cuh"
#include "launch.cuh"
#include "launch_scope.h"
#include "param_chunks.cuh"
#include "task_updates.cuh"

namespace excessmtl::cuda {

constexpr ScalarType kScalarTypes[kNumGradTypes] = {ScalarType::Double, ScalarType::Float,
                                                    ScalarType::BFloat16, ScalarType::Half};

// The one type a launch reads and writes: that of all tensors when they agree and the state does not ask for more, else the widest
// (float64 before float32). Starts out undecided.
class CommonType {
 public:
  void add(GradType type) {
    if (!is_decided_) {
      type_ = type;
      is_decided_ = true;
    } else if (type != type_) {
      type_ = type == kFloat64 || type_ == kFloat64 ? kFloat64 : kFloat32;
    }
  }
  // A kernel for float64 gradients is the only one with float64 state.
  void add_state(ScalarType state_type) {
    if (state_type == ScalarType::Double) {
      add(kFloat64);
    }
  }
  GradType get() const { return is_decided_ ? type_ : kFloat32; }

 private:
  GradType type_ = kFloat32;
  bool is_decided_ = false;
};

// Of a launch that touches the state: there is no kernel for float16 gradients beside bfloat16 state.
inline GradType launch_type(const CommonType& common, const Tensor& sq_grad_sum) {
  const bool is_missing =
      common.get() == kFloat16 && sq_grad_sum.scalar_type() == ScalarType::BFloat16;
  return is_missing ? kFloat32 : common.get();
}

inline void add_types(CommonType& common, const TaskGrads& grads) {
  for (size_t k = 0; k < grads.data.size(); ++k) {
    if (grads.data[k] != nullptr) {
      common.add(grads.types[k]);
    }
  }
}

// Gradients of another type than the launch's are copied into it: a slow path, an extra pass over those gradients. A step whose
// gradients all have one type (the usual one) copies nothing.
inline void convert_grads(TaskGrads& grads, GradType type) {
  for (size_t k = 0; k < grads.data.size(); ++k) {
    if (grads.data[k] != nullptr && grads.types[k] != type) {
      grads.tensors[k] = torch::stable::to(grads.tensors[k], kScalarTypes[type]);
      grads.types[k] = type;
      grads.data[k] = grads.tensors[k].const_data_ptr();
    }
  }
}

inline TaskSet present_tasks(const TaskGrads& grads) {
  TaskSet tasks = {};
  for (int64_t task = 0; task < grads.num_tasks(); ++task) {
    if (grads.is_present[task]) {
      tasks.insert(static_cast<int>(task));
    }
  }
  return tasks;
}

inline TaskSet task_set(const std::vector<int64_t>& tasks) {
  TaskSet set = {};
  for (const int64_t task : tasks) {
    set.insert(static_cast<int>(task));
  }
  return set;
}

// The map lies on the device; what the host can see of it is its size, which gives the number of chunks.
inline ParamChunks read_chunk_map(const Tensor& chunk_map, const ParamLayout& layout,
                                  const Tensor& like) {
  check_dtype(chunk_map, "chunk_map", ScalarType::Long);
  check_same_device(chunk_map, "chunk_map", like);
  const int64_t num_chunks = chunk_map.numel() - 5 - 2 * layout.num_tensors();
  const bool fits =
      layout.padded_numel() == 0
          ? num_chunks == 0
          : num_chunks >= 1 && num_chunks <= layout.padded_numel() / kSegmentAlignment;
  check_storage(chunk_map, "chunk_map");
  STD_TORCH_CHECK(chunk_map.is_contiguous() && fits,
                  "Expected `chunk_map` to be the map made for `param_numels` of ",
                  layout.num_tensors(), " parameters, but got one of ", chunk_map.numel(),
                  " numbers.");
  return {chunk_map.const_data_ptr<int64_t>(), num_chunks, layout.num_tensors()};
}

inline GradScale read_grad_scale(const std::optional<Tensor>& grad_scale, const Tensor& like) {
  if (!grad_scale.has_value()) {
    return {nullptr, false};
  }
  const bool is_double = grad_scale->scalar_type() == ScalarType::Double;
  check_vector(*grad_scale, "grad_scale", 1, is_double ? ScalarType::Double : ScalarType::Float,
               like);
  return {grad_scale->const_data_ptr(), is_double};
}

// Every row starts on a multiple of 32 elements, so the first decides.
inline void check_state_alignment(const Tensor& state, const char* name) {
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(state.const_data_ptr()) % 16 == 0, "Expected `", name,
      "` to start at a multiple of 16 bytes. Use a tensor of its own, or whole rows of one.");
}

// The pointers of a launch. Owns the table in device memory when there is one: it goes back to torch's allocator, which knows the
// stream, when the op returns.
class DevicePointers {
 public:
  DevicePointers(std::vector<const void*> pointers, const Tensor& like, const LaunchScope& scope)
      : pointers_(std::move(pointers)) {
    const auto count = static_cast<int64_t>(pointers_.size());
    if (!TensorPointers::fits_arguments(count)) {
      table_ = torch::stable::new_empty(like, {count}, ScalarType::Long);
      in_device_memory_ =
          reinterpret_cast<unsigned long long*>(table_->mutable_data_ptr<int64_t>());
      check_cuda(write_pointer_table(pointers_.data(), count, in_device_memory_, scope.stream),
                 "Writing the pointers");
    }
  }
  TensorPointers get() const {
    return {pointers_.data(), static_cast<int64_t>(pointers_.size()), in_device_memory_};
  }

 private:
  std::vector<const void*> pointers_;
  std::optional<Tensor> table_;
  unsigned long long* in_device_memory_ = nullptr;
};

}  // namespace excessmtl::cuda
