// Argument checks with one wording. The Python layer checks first and raises ValueError or TypeError; here stands what
// memory safety needs, for those who call torch.ops directly. A failed check raises RuntimeError before anything is written.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <bitset>
#include <cmath>
#include <cstdint>
#include <vector>

namespace excessmtl {

inline void check_dtype(const torch::stable::Tensor& tensor, const char* name,
                        torch::headeronly::ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, "Expected `", name, "` of ",
                  torch::headeronly::toString(expected), ", but got ",
                  torch::headeronly::toString(tensor.scalar_type()), ".");
}

struct DeviceOf {
  int32_t type = 0;
  int32_t index = 0;

  explicit DeviceOf(const torch::stable::Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  }
  bool operator==(const DeviceOf&) const = default;
};

inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const DeviceOf& device) {
  STD_TORCH_CHECK(DeviceOf(tensor) == device, "Expected `", name,
                  "` on the device of the state. Move both to one device.");
}

inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const torch::stable::Tensor& like) {
  check_same_device(tensor, name, DeviceOf(like));
}

// Sizes and strides may name more than the storage holds: resize_() on it takes memory away from under a tensor.
inline void check_storage(const torch::stable::Tensor& tensor, const char* name) {
  int64_t end = 0;  // of the elements, counted from the first
  if (tensor.is_contiguous()) {
    end = tensor.numel();
  } else if (tensor.numel() > 0) {
    end = 1;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      end += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
  }
  if (end == 0) {
    return;
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const auto element_size = static_cast<int64_t>(tensor.element_size());
  STD_TORCH_CHECK((tensor.storage_offset() + end) * element_size <= bytes, "Expected `", name,
                  "` to lie within its storage, but that has ", bytes,
                  " bytes. Something has resized it.");
}

inline void check_vector(const torch::stable::Tensor& tensor, const char* name, int64_t numel,
                         torch::headeronly::ScalarType dtype, const torch::stable::Tensor& like) {
  check_dtype(tensor, name, dtype);
  check_same_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.numel() == numel && tensor.is_contiguous(), "Expected `", name,
                  "` to be contiguous with ", numel, " elements, but got ", tensor.numel(), ".");
  check_storage(tensor, name);
}

inline void check_matrix(const torch::stable::Tensor& tensor, const char* name, int64_t rows,
                         int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                  "Expected `", name, "` of shape [", rows, ", ", columns,
                  "], but got another shape.");
  STD_TORCH_CHECK(tensor.is_contiguous(), "Expected `", name, "` to be contiguous.");
  check_storage(tensor, name);
}

constexpr int64_t kMaxTasks = 512;

inline void check_tasks(const std::vector<int64_t>& tasks, int64_t num_tasks) {
  std::bitset<kMaxTasks> seen;
  for (const int64_t task : tasks) {
    STD_TORCH_CHECK(task >= 0 && task < num_tasks, "Expected `tasks` between 0 and ", num_tasks - 1,
                    ", but got ", task, ".");
    STD_TORCH_CHECK(!seen[task], "Expected `tasks` without repetition, but got ", task, " twice.");
    seen[task] = true;
  }
}

inline void check_num_tasks(int64_t num_tasks) {
  STD_TORCH_CHECK(num_tasks >= 1 && num_tasks <= kMaxTasks, "Expected between 1 and ", kMaxTasks,
                  " tasks, but got ", num_tasks, ".");
}

inline void check_element_options(double eps, double momentum) {
  // Below the smallest normal float the reciprocal root of eps is infinite, and 0 * inf is NaN.
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 1.17549435e-38,
                  "Expected `eps` >= 1.17549435e-38, but got ", eps, ".");
  STD_TORCH_CHECK(momentum >= 0.0 && momentum < 1.0,
                  "Expected `gradient_momentum` in [0, 1), but got ", momentum, ".");
}

inline void check_num_warmup_steps(int64_t num_warmup_steps) {
  STD_TORCH_CHECK(num_warmup_steps >= 0, "Expected `num_warmup_steps` >= 0, but got ",
                  num_warmup_steps, ".");
}

inline void check_raw_risk_scale(double raw_risk_scale) {
  STD_TORCH_CHECK(std::isfinite(raw_risk_scale) && raw_risk_scale > 0.0,
                  "Expected `raw_risk_scale` > 0, but got ", raw_risk_scale, ".");
}

inline void check_weight_options(double robust_step_size, double min_weight, double weight_total,
                                 int64_t num_tasks) {
  STD_TORCH_CHECK(std::isfinite(robust_step_size) && robust_step_size > 0.0,
                  "Expected `robust_step_size` > 0, but got ", robust_step_size, ".");
  STD_TORCH_CHECK(min_weight >= 0.0 && min_weight * static_cast<double>(num_tasks) <= 1.0 + 1e-12,
                  "Expected `min_weight` between 0 and 1 / num_tasks, but got ", min_weight, ".");
  STD_TORCH_CHECK(std::isfinite(weight_total) && weight_total > 0.0,
                  "Expected `weight_total` > 0, but got ", weight_total, ".");
}

}  // namespace excessmtl
