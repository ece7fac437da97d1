// How the CPU ops split their work: fixed chunks of the padded parameters, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../param_layout.h"
#include "element_loops.h"

namespace excessmtl::cpu {

// 64 KiB of gradient and 64 KiB of state per chunk: long enough (about 10 us) to hide the hand-out to a thread, short enough to
// balance a handful of chunks over the cores. Fixed, so that partial sums and their order depend on nothing else.
constexpr int64_t kChunkNumel = 16384;

// Below this many elements in total the threads take longer to start than one needs for the work (measured: 2 to 5 us).
constexpr int64_t kMinParallelNumel = 2 * kChunkNumel;

inline int64_t num_chunks(const ParamLayout& layout) {
  return (layout.padded_numel() + kChunkNumel - 1) / kChunkNumel;
}

// Calls f(item) for every item in [0, num_items), over threads when there is enough work.
template <class F>
void for_each_item(int64_t num_items, int64_t numel_per_item, const F& f) {
  const auto run = [&f](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      f(item);
    }
  };
  if (num_items <= 1 || num_items * numel_per_item < kMinParallelNumel) {
    run(0, num_items);
  } else {
    torch::stable::parallel_for(0, num_items, 1, run);
  }
}

// Calls f(segment, position in the segment, position in the padded vector, count) for every slice of a parameter in a chunk.
template <class F>
void for_each_slice(const ParamLayout& layout, int64_t chunk, const F& f) {
  const int64_t begin = chunk * kChunkNumel;
  const int64_t end = std::min(begin + kChunkNumel, layout.padded_numel());
  for (int64_t segment = layout.segment_at(begin);
       segment < layout.num_tensors() && layout.offsets[segment] < end; ++segment) {
    const int64_t first = std::max(begin, layout.offsets[segment]);
    const int64_t last = std::min(end, layout.offsets[segment] + layout.numels[segment]);
    if (first < last) {
      f(segment, first - layout.offsets[segment], first, last - first);
    }
  }
}

inline const void* advanced(const void* data, GradType type, int64_t count) {
  return static_cast<const char*>(data) + count * kGradBytes[type];
}

template <typename state_t>
const StateLoops<state_t>& state_loops() {
  if constexpr (sizeof(state_t) == sizeof(double)) {
    return *capability().double_state;
  } else if constexpr (sizeof(state_t) == sizeof(float)) {
    return *capability().float_state;
  } else {
    return *capability().bfloat16_state;
  }
}

template <typename acc_t>
const FoldLoops<acc_t>& fold_loops() {
  if constexpr (sizeof(acc_t) == sizeof(double)) {
    return *capability().double_fold;
  } else {
    return *capability().float_fold;
  }
}

}  // namespace excessmtl::cpu
