// The fused step for float16 gradients.
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__half, float)

}  // namespace excessmtl::cuda
