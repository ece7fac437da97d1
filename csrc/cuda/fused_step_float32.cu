// The fused step for float32 gradients.
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(float, float)

}  // namespace excessmtl::cuda
