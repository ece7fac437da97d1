// The part of CUDA that the kernels and their launches use, over simt.h.
#pragma once

#include <cmath>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Objects, not macros: `gridDim` is also a member of cudaLaunchConfig_t.
namespace simt {
template <auto kGet, unsigned decltype(kGet())::* kAxis>
struct Axis {
  operator unsigned() const { return kGet().*kAxis; }
};
template <auto kGet>
struct Axes {
  using triple_t = decltype(kGet());
  Axis<kGet, &triple_t::x> x;
  Axis<kGet, &triple_t::y> y;
  Axis<kGet, &triple_t::z> z;
};
}  // namespace simt
inline constexpr simt::Axes<simt::thread_index> threadIdx{};
inline constexpr simt::Axes<simt::block_index> blockIdx{};
inline constexpr simt::Axes<simt::block_size> blockDim{};
inline constexpr simt::Axes<simt::grid_size> gridDim{};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- memory ----------------------------------------------------------------------------------------------------------

namespace simt {
template <typename T>
inline T checked_load(const T* address, bool is_read_only, const Site& site) {
  Arena::instance().check(address, sizeof(T), alignof(T), false, is_read_only, site);
  maybe_yield();
  return *address;
}
template <typename T>
inline void checked_store(T* address, const T& value, const Site& site) {
  Arena::instance().check(address, sizeof(T), alignof(T), true, false, site);
  maybe_yield();
  *address = value;
}
}  // namespace simt

template <typename T>
inline T __ldg(const T* address, const simt::Site& site = simt::Site::current()) {
  return simt::checked_load(address, true, site);
}
template <typename T>
inline T __ldcg(const T* address, const simt::Site& site = simt::Site::current()) {
  return simt::checked_load(address, false, site);
}
template <typename T>
inline T __ldcs(const T* address, const simt::Site& site = simt::Site::current()) {
  return simt::checked_load(address, false, site);
}
template <typename T>
inline void __stcg(T* address, T value, const simt::Site& site = simt::Site::current()) {
  simt::checked_store(address, value, site);
}
template <typename T>
inline void __stcs(T* address, T value, const simt::Site& site = simt::Site::current()) {
  simt::checked_store(address, value, site);
}

// ---- threads ---------------------------------------------------------------------------------------------------------

inline void __syncthreads(const simt::Site& site = simt::Site::current()) {
  simt::block_barrier_or(0, site);
}
inline int __syncthreads_or(int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::block_barrier_or(predicate != 0, site) != 0;
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                         const simt::Site& site = simt::Site::current()) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = simt::shuffle(mask, bits, simt::lane() ^ static_cast<unsigned>(lane_mask), site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
[[noreturn]] inline void __trap() { simt::fail("the kernel has stopped itself"); }
inline void __threadfence() { simt::fence(); }
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return simt::atomic_inc(address, limit);
}
inline unsigned atomicOr(unsigned* address, unsigned bits) {
  return simt::atomic_or(address, bits);
}

// ---- runtime ---------------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCooperativeLaunchTooLarge = 720
};
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrCooperativeLaunch = 95
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const simt::Config& config = simt::config();
  *value = which == cudaDevAttrMultiProcessorCount ? static_cast<int>(config.num_sms)
           : which == cudaDevAttrL2CacheSize ? static_cast<int>(config.l2_bytes)
                                             : static_cast<int>(config.launches_cooperatively);
  return cudaSuccess;
}
template <typename... Params>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Params...),
                                                                 int, size_t) {
  *blocks = static_cast<int>(simt::config().blocks_per_sm);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Launches run at once, in the calling thread.
template <typename... Params, typename... Args>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                                      Args&&... args) {
  if (simt::count(config->gridDim) == 0 || simt::count(config->blockDim) == 0 ||
      config->gridDim.y > 65535) {
    return cudaErrorInvalidValue;
  }
  bool is_cooperative = false;
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    is_cooperative |= config->attrs[k].id == cudaLaunchAttributeCooperative &&
                      config->attrs[k].val.cooperative != 0;
  }
  if (is_cooperative &&
      simt::count(config->gridDim) > simt::config().num_sms * simt::config().blocks_per_sm) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  simt::run_grid(config->gridDim, config->blockDim, is_cooperative, [&] { kernel(args...); });
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "an error";
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
