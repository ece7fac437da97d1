// The compiled cooperative launches, beside those of the fused step in one file per gradient type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "fused_step_combine.cuh"
#include "launch.cuh"

namespace excessmtl::cuda {

// Defined for <double, double>, <float, float>, <__nv_bfloat16, float> and <__half, float>, for tables of up to kSmallTable pointers.
template <typename grad_t, typename acc_t>
cudaError_t launch_fused_step_combine(bool sqrt_fisher, bool has_momentum, int num_sms,
                                      cudaStream_t stream, const StepCombineArgs<acc_t>& args,
                                      const TensorPointers& tensors);

template <typename grad_t, typename acc_t, bool kSqrtFisher, bool kMomentum>
inline cudaError_t launch_fused_step_combine_as(int num_sms, cudaStream_t stream,
                                                const StepCombineArgs<acc_t>& args,
                                                const TensorPointers& tensors) {
  return launch_cooperative(
      fused_step_combine_kernel<grad_t, acc_t, kSqrtFisher, kMomentum, kSmallTable>,
      args.step.chunks.num_chunks, args.step.num_tasks, num_sms, stream, args,
      make_table<kSmallTable>(tensors));
}

#define EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(grad_t, acc_t)                     \
  template <>                                                                         \
  cudaError_t launch_fused_step_combine<grad_t, acc_t>(                               \
      bool sqrt_fisher, bool has_momentum, int num_sms, cudaStream_t stream,          \
      const StepCombineArgs<acc_t>& args, const TensorPointers& tensors) {            \
    if (sqrt_fisher) {                                                                \
      return has_momentum ? launch_fused_step_combine_as<grad_t, acc_t, true, true>(  \
                                num_sms, stream, args, tensors)                       \
                          : launch_fused_step_combine_as<grad_t, acc_t, true, false>( \
                                num_sms, stream, args, tensors);                      \
    }                                                                                 \
    return has_momentum ? launch_fused_step_combine_as<grad_t, acc_t, false, true>(   \
                              num_sms, stream, args, tensors)                         \
                        : launch_fused_step_combine_as<grad_t, acc_t, false, false>(  \
                              num_sms, stream, args, tensors);                        \
  }

}  // namespace excessmtl::cuda
