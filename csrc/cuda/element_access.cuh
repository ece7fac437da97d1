// How elements travel: 16 bytes of float32 or float64 at a time, 8 bytes (4 elements) of the 16-bit types, or one by one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace excessmtl::cuda {

// State and sums: kWidth numbers are 16 bytes.
template <typename acc_t>
struct StateVector;

template <>
struct StateVector<float> {
  static constexpr int kWidth = 4;
  using vector_t = float4;
  static __device__ __forceinline__ void unpack(const float4& v, float (&out)[4]) {
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
  }
  static __device__ __forceinline__ float4 pack(const float (&in)[4]) {
    return make_float4(in[0], in[1], in[2], in[3]);
  }
};

template <>
struct StateVector<double> {
  static constexpr int kWidth = 2;
  using vector_t = double2;
  static __device__ __forceinline__ void unpack(const double2& v, double (&out)[2]) {
    out[0] = v.x;
    out[1] = v.y;
  }
  static __device__ __forceinline__ double2 pack(const double (&in)[2]) {
    return make_double2(in[0], in[1]);
  }
};

// Gradients: as many elements per access as the state has, whatever their size. widen is exact, narrow rounds to nearest even.
template <typename grad_t>
struct GradVector;

template <>
struct GradVector<float> : StateVector<float> {
  using acc_t = float;
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};

template <>
struct GradVector<double> : StateVector<double> {
  using acc_t = double;
  static __device__ __forceinline__ double widen(double v) { return v; }
  static __device__ __forceinline__ double narrow(double v) { return v; }
};

// The 16-bit types share everything but the conversion of one element.
template <class Conversion>
struct HalfWidthVector {
  static constexpr int kWidth = 4;
  using acc_t = float;
  using vector_t = uint2;
  static __device__ __forceinline__ void unpack(const uint2& v, float (&out)[4]) {
    out[0] = Conversion::from_bits(static_cast<unsigned short>(v.x & 0xffffU));
    out[1] = Conversion::from_bits(static_cast<unsigned short>(v.x >> 16));
    out[2] = Conversion::from_bits(static_cast<unsigned short>(v.y & 0xffffU));
    out[3] = Conversion::from_bits(static_cast<unsigned short>(v.y >> 16));
  }
  static __device__ __forceinline__ uint2 pack(const float (&in)[4]) {
    return make_uint2(
        Conversion::to_bits(in[0]) | static_cast<unsigned>(Conversion::to_bits(in[1])) << 16,
        Conversion::to_bits(in[2]) | static_cast<unsigned>(Conversion::to_bits(in[3])) << 16);
  }
};

struct BFloat16Conversion {
  static __device__ __forceinline__ float from_bits(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  static __device__ __forceinline__ unsigned short to_bits(float v) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  }
};

struct Float16Conversion {
  static __device__ __forceinline__ float from_bits(unsigned short bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ unsigned short to_bits(float v) {
    return __half_as_ushort(__float2half_rn(v));
  }
};

template <>
struct GradVector<__nv_bfloat16> : HalfWidthVector<BFloat16Conversion> {
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
};

template <>
struct GradVector<__half> : HalfWidthVector<Float16Conversion> {
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
};

template <typename vector_t>
__device__ __forceinline__ bool is_aligned_for(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(vector_t) == 0;
}

// The loss scale of a GradScaler as a factor, read where it lies: the host never waits for it.
struct GradScale {
  const void* data;  // one float, or one double; nullptr: 1
  bool is_double;

  __device__ __forceinline__ double value() const {
    if (data == nullptr) {
      return 1.0;
    }
    return is_double ? __ldg(static_cast<const double*>(data))
                     : static_cast<double>(__ldg(static_cast<const float*>(data)));
  }
};

}  // namespace excessmtl::cuda
