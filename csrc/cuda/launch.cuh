// From a kernel and its arguments to a launch, without torch: which pointer table, and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "launch_config.cuh"
#include "pointer_table.cuh"

namespace excessmtl::cuda {

// Where a launch finds its tensors. in_device_memory is set when they do not fit into the arguments; `pointers` lie on the host.
struct TensorPointers {
  const void* const* pointers;
  int64_t count;
  const unsigned long long* in_device_memory;

  static bool fits_arguments(int64_t count) { return count <= kLargeTable; }
};

template <typename... Params>
inline cudaError_t launch_with(const cudaLaunchConfig_t& config, void (*kernel)(Params...),
                               const Params&... args) {
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  // Cleared, so that it is not blamed on someone else's next call.
  const cudaError_t latest = cudaGetLastError();
  return status != cudaSuccess ? status : latest;
}

inline cudaLaunchConfig_t launch_config(dim3 grid, unsigned threads, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads, 1, 1);
  config.stream = stream;
  return config;
}

template <typename... Params>
inline cudaError_t launch(void (*kernel)(Params...), dim3 grid, unsigned threads,
                          cudaStream_t stream, const Params&... args) {
  return launch_with(launch_config(grid, threads, stream), kernel, args...);
}

// A launch whose blocks may wait for each other: all of them are resident at once. Blocks per task: enough to fill the GPU, no more
// than fit and no more than there are chunks. cudaErrorCooperativeLaunchTooLarge, and nothing has run: not even one block per task
// fits.
template <typename... Params>
inline cudaError_t launch_cooperative(void (*kernel)(Params...), int64_t num_chunks,
                                      int64_t num_tasks, int num_sms, cudaStream_t stream,
                                      const Params&... args) {
  int blocks_per_sm = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kThreads, 0);
  if (status != cudaSuccess) {
    (void)cudaGetLastError();
    return status;
  }
  const dim3 grid = cooperative_grid_of(num_chunks, num_tasks, num_sms, blocks_per_sm);
  if (grid.x == 0) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = launch_config(grid, kThreads, stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return launch_with(config, kernel, args...);
}

template <int kCapacity>
inline PointerTable<kCapacity> make_table(const TensorPointers& tensors) {
  PointerTable<kCapacity> table;
  table.in_device_memory = tensors.in_device_memory;
  if (tensors.in_device_memory == nullptr) {
    std::copy_n(tensors.pointers, tensors.count, table.data);
  }
  return table;
}

// Launches the instantiation whose table fits: small_kernel up to kSmallTable pointers and for tables in device memory, else
// large_kernel.
template <class Args>
inline cudaError_t launch_with_table(void (*small_kernel)(Args, PointerTable<kSmallTable>),
                                     void (*large_kernel)(Args, PointerTable<kLargeTable>),
                                     dim3 grid, cudaStream_t stream, const Args& args,
                                     const TensorPointers& tensors) {
  if (tensors.in_device_memory != nullptr || tensors.count <= kSmallTable) {
    return launch(small_kernel, grid, kThreads, stream, args, make_table<kSmallTable>(tensors));
  }
  return launch(large_kernel, grid, kThreads, stream, args, make_table<kLargeTable>(tensors));
}

// Fills a table in device memory, kLargeTable pointers per launch.
inline cudaError_t write_pointer_table(const void* const* pointers, int64_t count,
                                       unsigned long long* in_device_memory, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kLargeTable) {
    const int piece = static_cast<int>(std::min<int64_t>(kLargeTable, count - first));
    const auto table = make_table<kLargeTable>({pointers + first, piece, nullptr});
    const cudaError_t status =
        launch(write_pointer_table_kernel<kLargeTable>, dim3((piece + kThreads - 1) / kThreads),
               kThreads, stream, table, piece, in_device_memory + first);
    if (status != cudaSuccess) {
      return status;
    }
  }
  return cudaSuccess;
}

}  // namespace excessmtl::cuda
