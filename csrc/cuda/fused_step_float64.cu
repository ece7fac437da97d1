// The fused step for float64 gradients.
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(double, double)

}  // namespace excessmtl::cuda
