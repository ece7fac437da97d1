// The fused step for float16 gradients, alone and with combine_ in one launch.
#include "fused_step_combine_launch.cuh"
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__half, float)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(__half, float)

}  // namespace excessmtl::cuda
