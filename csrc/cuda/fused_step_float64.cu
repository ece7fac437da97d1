// The fused step for float64 gradients, alone and with combine_ in one launch.
#include "fused_step_combine_launch.cuh"
#include "fused_step_launch.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(double, double)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(double, double)

}  // namespace excessmtl::cuda
