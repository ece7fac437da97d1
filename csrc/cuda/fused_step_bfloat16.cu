// The fused step for bfloat16 gradients.
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__nv_bfloat16, float)

}  // namespace excessmtl::cuda
