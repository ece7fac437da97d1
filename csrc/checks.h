// Argument checks with one wording. The Python layer checks first and raises ValueError or TypeError; here stands what
// memory safety needs, for those who call torch.ops directly. A failed check raises RuntimeError before anything is written.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

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

inline void check_same_device(const torch::stable::Tensor& tensor, const char* name,
                              const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  "Expected `", name, "` on the device of the state. Move both to one device.");
}

inline void check_vector(const torch::stable::Tensor& tensor, const char* name, int64_t numel,
                         torch::headeronly::ScalarType dtype, const torch::stable::Tensor& like) {
  check_dtype(tensor, name, dtype);
  check_same_device(tensor, name, like);
  STD_TORCH_CHECK(tensor.numel() == numel && tensor.is_contiguous(), "Expected `", name,
                  "` to be contiguous with ", numel, " elements, but got ", tensor.numel(), ".");
}

inline void check_matrix(const torch::stable::Tensor& tensor, const char* name, int64_t rows,
                         int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns,
                  "Expected `", name, "` of shape [", rows, ", ", columns,
                  "], but got another shape.");
  STD_TORCH_CHECK(tensor.is_contiguous(), "Expected `", name, "` to be contiguous.");
}

inline void check_tasks(const std::vector<int64_t>& tasks, int64_t num_tasks) {
  for (const int64_t task : tasks) {
    STD_TORCH_CHECK(task >= 0 && task < num_tasks, "Expected `tasks` between 0 and ", num_tasks - 1,
                    ", but got ", task, ".");
  }
}

constexpr int64_t kMaxTasks = 512;

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
