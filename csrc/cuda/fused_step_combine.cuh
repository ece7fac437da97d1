// The kernel of fused_step_combine_: both phases in one cooperative launch.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "block_shared.cuh"
#include "combine.cuh"
#include "fused_step.cuh"
#include "launch_config.cuh"
#include "pointer_table.cuh"

namespace excessmtl::cuda {

template <typename acc_t>
struct StepCombineArgs {
  StepArgs<acc_t> step;
  CombineArgs combine;
};
static_assert(sizeof(StepCombineArgs<double>) <= kArgumentBytes,
              "The pointer tables leave kArgumentBytes for the arguments.");

// Apart, so that no barrier is needed between the phases' uses.
template <typename acc_t>
struct StepCombineShared {
  StepShared step;
  CombineShared<acc_t> combine;
};

// find_nonfinite_kernel, fused_step_kernel, then, when its last block has written the weights, combine_kernel.
//
// Grid:         cooperative_grid_of(): x = walks over the chunks, y = task, all resident; block = kThreads threads. In the second
//               phase a block is no longer of a task: all blocks of the grid share the chunks.
// Traffic:      as the three kernels, the gradients of the second and third from L2 where they fit (fits_one_launch()).
// Determinism:  as those kernels: which block takes a chunk changes no sum.
// Precondition: those of the kernels; a cooperative launch. `tensors`: T x L gradients, then L outputs.
template <typename grad_t, typename acc_t, bool kSqrtFisher, bool kMomentum, int kCapacity>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSmOfBoth<acc_t, kMomentum>)
    fused_step_combine_kernel(const __grid_constant__ StepCombineArgs<acc_t> args,
                              const __grid_constant__ PointerTable<kCapacity> tensors) {
  StepCombineShared<acc_t>& shared = block_shared<StepCombineShared<acc_t>>();
  args.step.chunks.check(args.step.row_stride);
  find_nonfinite_in_chunks<grad_t, acc_t, true>(args.step, tensors);
  // Every block sees all flags from here on.
  cooperative_groups::this_grid().sync();
  run_step<grad_t, acc_t, kSqrtFisher, kMomentum, true>(args.step, tensors, shared.step);
  // The last block has come here: weights, flags and the state of every block are written, for every block to see.
  cooperative_groups::this_grid().sync();
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  const int64_t num_blocks = int64_t{gridDim.x} * gridDim.y;
  combine_chunks<grad_t>(args.combine, tensors, shared.combine.task_weights, block, num_blocks);
}

}  // namespace excessmtl::cuda
