// Every compiled launch of the fused step, over simt.h. With -DONLY_FLOAT32 the others than float32's are refused (quicker to
// compile, for the sanitizers).
#include "cuda_runtime.h"
//
#include "../../csrc/cuda/fused_step_float32.cu"

#if !defined(ONLY_FLOAT32)

#include "../../csrc/cuda/fused_step_bfloat16.cu"
#include "../../csrc/cuda/fused_step_bfloat16_state.cu"
#include "../../csrc/cuda/fused_step_float16.cu"
#include "../../csrc/cuda/fused_step_float64.cu"

#else

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace excessmtl::cuda {

#define REFUSE_FUSED_STEP(grad_t, state_t)                                               \
  template <>                                                                            \
  cudaError_t launch_fused_step<grad_t, state_t>(                                        \
      bool, bool, dim3, cudaStream_t, const StepArgs<state_t>&, const TensorPointers&) { \
    return cudaErrorInvalidValue;                                                        \
  }
#define REFUSE_FUSED_STEP_COMBINE(grad_t, acc_t)                                             \
  template <>                                                                                \
  cudaError_t launch_fused_step_combine<grad_t, acc_t>(                                      \
      bool, bool, int, cudaStream_t, const StepCombineArgs<acc_t>&, const TensorPointers&) { \
    return cudaErrorInvalidValue;                                                            \
  }

REFUSE_FUSED_STEP(double, double)
REFUSE_FUSED_STEP(__nv_bfloat16, float)
REFUSE_FUSED_STEP(__half, float)
REFUSE_FUSED_STEP(float, BFloat16Bits)
REFUSE_FUSED_STEP(__nv_bfloat16, BFloat16Bits)
REFUSE_FUSED_STEP_COMBINE(double, double)
REFUSE_FUSED_STEP_COMBINE(__nv_bfloat16, float)
REFUSE_FUSED_STEP_COMBINE(__half, float)

}  // namespace excessmtl::cuda

#endif
