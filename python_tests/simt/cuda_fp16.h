// float16 as CUDA spells it, over the compiler's _Float16.
#pragma once

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
}
inline __half __float2half_rn(float value) {
  const auto half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result.bits, &half, sizeof half);
  return result;
}
