// The fused step with bfloat16 state. Not in one launch with combine_: whoever halves the state has a model whose gradients no L2
// cache holds, and the kernels would be half as many again.
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(float, BFloat16Bits)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__nv_bfloat16, BFloat16Bits)

}  // namespace excessmtl::cuda
