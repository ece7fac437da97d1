// The fixed numbers of every launch, each with its reason. Kernels and host code read them here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace excessmtl::cuda {

constexpr int kWarpSize = 32;
// 8 warps: a block sum of two short trees, and 8 blocks fill an SM of 2,048 threads.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// At least so many blocks per SM, which bounds the registers of a thread: 64 for four blocks, 80 for three (momentum carries a
// third stream; the compiler spilled 16 bytes at 64), 128 for two (float64: its root and division are long code). Each thread of
// the float32 step has at least 64 bytes of loads in flight (bench/sass_gate.py), so an SM has 64 KiB, or 48 KiB with momentum; an
// H100 needs about 20 KiB (3.35 TB/s x 0.7 us / 132) to keep its memory busy.
template <typename acc_t, bool kMomentum = false>
constexpr int kMinBlocksPerSm = sizeof(acc_t) == sizeof(double) ? 2
                                : kMomentum                     ? 3
                                                                : 4;

// All phases in one kernel. At one block more per SM the compiler spilled registers, and with momentum held back loads of the step's
// batch; fewer blocks with all loads under way have as many bytes in flight.
template <typename acc_t, bool kMomentum>
constexpr int kMinBlocksPerSmOfBoth = kMomentum || sizeof(acc_t) == sizeof(double) ? 2 : 3;

// The grid stops growing at 8 blocks per SM, the most that fit: blocks then walk over several chunks each, and take one ticket.
constexpr int kMaxBlocksPerSm = 8;

// 16 bytes of gradient and of state per thread and access, the widest there is; two of each before the first use. With four the
// compiler, short of registers, moved half of the loads behind the first uses.
constexpr int kVectorsInFlight = 2;

// Shorter slices of a chunk go to one warp each: below 8 accesses per lane a whole block would mostly idle.
constexpr int kMinBlockSliceNumel = 1024;

// A bit per task travels in the arguments; two tasks per thread in the last block.
constexpr int kMaxTasks = 512;

// Pointer tables in the arguments: classic 4 KiB of kernel parameters, and the 32,764 bytes of sm_70+ since CUDA 12.1.
// kArgumentBytes is left for everything else.
constexpr int kArgumentBytes = 504;
constexpr int kSmallTable = (4096 - 8 - kArgumentBytes) / 8;    // 448 pointers
constexpr int kLargeTable = (32764 - 12 - kArgumentBytes) / 8;  // 4,031 pointers

// Blocks per task: enough to fill the GPU, and no more than there are chunks.
inline dim3 grid_of(int64_t num_chunks, int64_t num_tasks, int num_sms) {
  const int64_t resident = static_cast<int64_t>(num_sms) * kMaxBlocksPerSm;
  int64_t blocks = resident / num_tasks > 0 ? resident / num_tasks : 1;
  if (blocks > num_chunks) {
    blocks = num_chunks;
  }
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num_tasks), 1);
}

// The same where all blocks must be resident at once; x = 0: not even one per task is.
inline dim3 cooperative_grid_of(int64_t num_chunks, int64_t num_tasks, int num_sms,
                                int blocks_per_sm) {
  const int64_t resident = static_cast<int64_t>(num_sms) * blocks_per_sm;
  const int64_t blocks = resident / num_tasks < num_chunks ? resident / num_tasks : num_chunks;
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(num_tasks), 1);
}

// Step and combine share a launch where the second reads the gradients from L2: where they fill at most half of it. The other half
// is for the state that streams by (at least as many bytes), and on GPUs whose L2 is in two parts for the copy in the other part.
// Larger gradients come from memory twice however many launches there are, and there two launches do better: each kernel has a grid
// and registers of its own, and a cooperative one starts only when the whole GPU is free for it.
inline bool fits_one_launch(int64_t grad_bytes, int64_t l2_bytes) {
  return grad_bytes <= l2_bytes / 2;
}

}  // namespace excessmtl::cuda
