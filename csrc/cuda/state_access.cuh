// How rows of the state are read and written: as they are, or in bfloat16, widened on the way in and rounded stochastically on the
// way out.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../stochastic_rounding.h"
#include "element_access.cuh"

namespace excessmtl::cuda {

// What the random bits of a launch are drawn from.
struct LaunchRounding {
  int64_t seed;
  const int64_t* num_steps;  // []
  int first_task;            // whose row is the first
};

// The 16 bits of a position's word that each of the two rows draws.
enum class RandomHalf { kSqGradSum, kGradMean };

__device__ __forceinline__ uint32_t random_bits(uint32_t word, RandomHalf half) {
  return half == RandomHalf::kSqGradSum ? word & 0xffffU : word >> 16;
}

// Of a launch whose state is stored as it is; a word has no bits to give then.
struct NoRounding {};

template <typename state_t>
struct StateAccess : StateVector<state_t> {
  using acc_t = state_t;
  using Rounding = NoRounding;
  static constexpr int kWidth = StateVector<state_t>::kWidth;
  using vector_t = typename StateVector<state_t>::vector_t;
  static __device__ __forceinline__ RoundingKey row_key(const NoRounding& /*source*/, int /*row*/) {
    return {};
  }
  static __device__ __forceinline__ uint32_t word_at(const SliceRounding& /*rounding*/,
                                                     int /*at*/) {
    return 0;
  }
  static __device__ __forceinline__ acc_t widen(state_t v) { return v; }
  static __device__ __forceinline__ state_t narrow(acc_t v, uint32_t /*word*/,
                                                   RandomHalf /*half*/) {
    return v;
  }
  static __device__ __forceinline__ vector_t pack_state(const acc_t (&in)[kWidth],
                                                        const uint32_t (& /*words*/)[kWidth],
                                                        RandomHalf /*half*/) {
    return StateVector<state_t>::pack(in);
  }
};

template <>
struct StateAccess<BFloat16Bits> {
  using acc_t = float;
  using Rounding = LaunchRounding;
  static constexpr int kWidth = StateVector<float>::kWidth;
  using vector_t = uint2;
  // Read on the device: the host never waits for the number of the step.
  static __device__ __forceinline__ RoundingKey row_key(const LaunchRounding& source, int row) {
    return rounding_key(source.seed, __ldcg(source.num_steps), source.first_task + row);
  }
  static __device__ __forceinline__ uint32_t word_at(const SliceRounding& rounding, int at) {
    return rounding_words(rounding.position + static_cast<uint32_t>(at), rounding.key);
  }
  static __device__ __forceinline__ float widen(BFloat16Bits bits) {
    return BFloat16Conversion::from_bits(bits);
  }
  static __device__ __forceinline__ BFloat16Bits narrow(float v, uint32_t word, RandomHalf half) {
    return static_cast<BFloat16Bits>(
        rounded_to_bfloat16(__float_as_uint(v), random_bits(word, half)));
  }
  static __device__ __forceinline__ void unpack(const uint2& v, float (&out)[kWidth]) {
    HalfWidthVector<BFloat16Conversion>::unpack(v, out);
  }
  static __device__ __forceinline__ uint2 pack_state(const float (&in)[kWidth],
                                                     const uint32_t (&words)[kWidth],
                                                     RandomHalf half) {
    unsigned bits[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      bits[k] = narrow(in[k], words[k], half);
    }
    return make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
};

}  // namespace excessmtl::cuda
