// The loss scale of a GradScaler, read on the host.
#pragma once

#include <optional>

#include "../checks.h"
#include "../param_layout.h"

namespace excessmtl::cpu {

inline double read_grad_scale(const std::optional<Tensor>& grad_scale) {
  if (!grad_scale.has_value()) {
    return 1.0;
  }
  STD_TORCH_CHECK(grad_scale->numel() == 1 && grad_scale->is_cpu(),
                  "Expected `grad_scale` to be one number on the CPU.");
  check_storage(*grad_scale, "grad_scale");
  if (grad_scale->scalar_type() == ScalarType::Double) {
    return *grad_scale->const_data_ptr<double>();
  }
  check_dtype(*grad_scale, "grad_scale", ScalarType::Float);
  return static_cast<double>(*grad_scale->const_data_ptr<float>());
}

}  // namespace excessmtl::cpu
