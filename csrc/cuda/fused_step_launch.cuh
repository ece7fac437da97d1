// The compiled launches of the fused step, one file per gradient type so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "fused_step.cuh"
#include "launch.cuh"

namespace excessmtl::cuda {

// Defined for <double, double>, <float, float>, <__nv_bfloat16, float> and <__half, float>, and with bfloat16 state for <float,
// BFloat16Bits> and <__nv_bfloat16, BFloat16Bits>.
template <typename grad_t, typename state_t>
cudaError_t launch_fused_step(bool sqrt_fisher, bool has_momentum, dim3 grid, cudaStream_t stream,
                              const StepArgs<state_t>& args, const TensorPointers& grads);

template <typename grad_t, typename state_t, bool kSqrtFisher, bool kMomentum>
inline cudaError_t launch_fused_step_as(dim3 grid, cudaStream_t stream,
                                        const StepArgs<state_t>& args,
                                        const TensorPointers& grads) {
  if (args.finds_nonfinite) {
    const cudaError_t status =
        launch_with_table(find_nonfinite_kernel<grad_t, state_t, kSmallTable>,
                          find_nonfinite_kernel<grad_t, state_t, kLargeTable>, grid, stream, args,
                          grads);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return launch_with_table(fused_step_kernel<grad_t, state_t, kSqrtFisher, kMomentum, kSmallTable>,
                           fused_step_kernel<grad_t, state_t, kSqrtFisher, kMomentum, kLargeTable>,
                           grid, stream, args, grads);
}

#define EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(grad_t, state_t)                                       \
  template <>                                                                                     \
  cudaError_t launch_fused_step<grad_t, state_t>(                                                 \
      bool sqrt_fisher, bool has_momentum, dim3 grid, cudaStream_t stream,                        \
      const StepArgs<state_t>& args, const TensorPointers& grads) {                               \
    if (sqrt_fisher) {                                                                            \
      return has_momentum                                                                         \
                 ? launch_fused_step_as<grad_t, state_t, true, true>(grid, stream, args, grads)   \
                 : launch_fused_step_as<grad_t, state_t, true, false>(grid, stream, args, grads); \
    }                                                                                             \
    return has_momentum                                                                           \
               ? launch_fused_step_as<grad_t, state_t, false, true>(grid, stream, args, grads)    \
               : launch_fused_step_as<grad_t, state_t, false, false>(grid, stream, args, grads);  \
  }

}  // namespace excessmtl::cuda
