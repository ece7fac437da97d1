// Which part of which parameter a block works on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_config.cuh"

namespace excessmtl::cuda {

// A piece of one parameter inside one chunk. `position` is a multiple of 32 (segments and chunks both start at one), so the
// state there is aligned, and a gradient there is aligned exactly if its tensor is.
struct Slice {
  int64_t segment;     // l
  int64_t in_segment;  // first element, counted in the parameter
  int64_t position;    // the same, counted in a row of the state
  int numel;
};

// The threads that share a slice: kStride of them, this one is number `index`.
template <int kStride>
struct Workers {
  static constexpr int stride = kStride;
  int index;
};

// The chunk map in device memory, int64: [chunk_numel, num_chunks, L, padded P, offset_0..offset_L, n_0..n_{L-1}, first_0..first_{C-1}].
// Chunk c covers positions [c * chunk_numel, (c + 1) * chunk_numel) below padded P; first_c is the first segment that ends after
// its start. chunk_numel is a multiple of 32 below 2^30.
struct ParamChunks {
  const int64_t* map;
  int64_t num_chunks;
  int64_t num_tensors;

  // A map made for other parameters would send loads and stores anywhere: rather stop the launch. Called once per block.
  __device__ __forceinline__ void check(int64_t padded_numel) const {
    if (threadIdx.x == 0 && (__ldg(map + 1) != num_chunks || __ldg(map + 2) != num_tensors ||
                             __ldg(map + 3) != padded_numel)) {
      __trap();
    }
  }

  // Calls visit(slice, workers) for this thread's part of every slice of the chunk: the whole block shares a long slice, one warp
  // takes a short one. A chunk inside one large parameter is one call.
  template <class Visit>
  __device__ __forceinline__ void visit_slices(int64_t chunk, const Visit& visit) const {
    const int64_t* const offsets = map + 4;
    const int64_t* const numels = offsets + num_tensors + 1;
    const int64_t chunk_numel = __ldg(map);
    const int64_t padded_numel = __ldg(map + 3);
    const int64_t begin = chunk * chunk_numel;
    const int64_t end = begin + chunk_numel < padded_numel ? begin + chunk_numel : padded_numel;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int64_t segment = __ldg(numels + num_tensors + chunk); segment < num_tensors; ++segment) {
      const int64_t offset = __ldg(offsets + segment);
      if (offset >= end) {
        break;
      }
      const int64_t last = offset + __ldg(numels + segment);
      const int64_t first = begin > offset ? begin : offset;
      const int64_t numel = (last < end ? last : end) - first;
      if (numel <= 0) {
        continue;
      }
      const Slice slice = {segment, first - offset, first, static_cast<int>(numel)};
      if (numel >= kMinBlockSliceNumel) {
        visit(slice, Workers<kThreads>{static_cast<int>(threadIdx.x)});
      } else if (segment % kWarps == warp) {
        visit(slice, Workers<kWarpSize>{lane});
      }
    }
  }
};

}  // namespace excessmtl::cuda
