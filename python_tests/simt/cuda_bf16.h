// bfloat16 as CUDA spells it.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  unsigned short bits;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) {
    return {0x7fff};
  }
  return {static_cast<unsigned short>((bits + 0x7fffU + (bits >> 16 & 1U)) >>
                                      16)};  // to nearest, ties to even
}
