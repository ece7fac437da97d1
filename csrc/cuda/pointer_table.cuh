// Where the tensors of a launch are: a table of pointers inside the kernel's arguments, or in device memory when it is too long.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_config.cuh"

namespace excessmtl::cuda {

template <int kCapacity>
struct PointerTable {
  const unsigned long long* in_device_memory;  // addresses, read instead of `data` unless nullptr
  const void* data[kCapacity];

  __device__ __forceinline__ const void* operator[](int64_t index) const {
    return in_device_memory != nullptr
               ? reinterpret_cast<const void*>(__ldg(in_device_memory + index))
               : data[index];
  }
};

// Copies a piece of a long table from the arguments into device memory.
//
// Grid:     1 block per kThreads pointers of the piece.
// Why so:   arguments are captured when the launch is queued, so nothing on the host has to outlive the call, nothing is pinned, and
//           a CUDA graph replays it; an async copy would read host memory that may be in use again by then.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    write_pointer_table_kernel(const __grid_constant__ PointerTable<kCapacity> piece, int count,
                               unsigned long long* table) {
  const int index = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (index < count) {
    __stcg(table + index, reinterpret_cast<unsigned long long>(piece.data[index]));
  }
}

}  // namespace excessmtl::cuda
