// State in bfloat16: what a step computes in float32 is rounded to one of its two bfloat16 neighbours at random, so that the mean of
// the result is the number itself. To nearest, a sum stops growing where its increments are below half a unit in the last place.
//
// The bits are a function of (seed, step, task, position in the row) and of nothing else: equal on every
// device, for any number of threads, chunks and blocks, and again after a checkpoint. reference.py has the same in PyTorch.
// Includes no torch header, as excess_risk_math.h.
#pragma once

#include <cstdint>

#include "excess_risk_math.h"

namespace excessmtl {

// The bits of a bfloat16: a type of state that is computed with in float32.
using BFloat16Bits = uint16_t;

// What state of a type is computed with in.
template <typename state_t>
struct AccumulationOf {
  using type = state_t;
};
template <>
struct AccumulationOf<BFloat16Bits> {
  using type = float;
};
template <typename state_t>
using Accumulation = typename AccumulationOf<state_t>::type;

// Of one row of the state in one step. Two words, so that no two rows and steps walk through one sequence.
struct RoundingKey {
  uint32_t low;
  uint32_t high;
};

// The output function of SplitMix64 (Steele, Lea, Flood 2014).
EXCESSMTL_HOST_DEVICE uint64_t mixed(uint64_t z) {
  z += 0x9e3779b97f4a7c15U;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
  return z ^ (z >> 31);
}

// step: num_steps, the steps that counted so far. A skipped step rounds nothing, so the next one draws its bits.
EXCESSMTL_HOST_DEVICE RoundingKey rounding_key(int64_t seed, int64_t step, int64_t task) {
  const uint64_t of_step = mixed(mixed(static_cast<uint64_t>(seed)) + static_cast<uint64_t>(step));
  const uint64_t key = mixed(of_step + 2 * static_cast<uint64_t>(task));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The key of the 2^32 positions around this one, which rounding_words() then tells apart. Chunks and slices never cross from one
// such range into the next: their sizes are powers of two.
EXCESSMTL_HOST_DEVICE RoundingKey key_around(const RoundingKey& key, int64_t position) {
  const auto range = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  return {key.low + range * 0x9e3779b9U, key.high};
}

// Where the random bits of a slice of bfloat16 state come from; other state does not read it.
struct SliceRounding {
  RoundingKey key;    // key_around() the slice
  uint32_t position;  // of the slice's first element, the low 32 bits
};

EXCESSMTL_HOST_DEVICE SliceRounding slice_rounding(const RoundingKey& row_key, int64_t position) {
  return {key_around(row_key, position), static_cast<uint32_t>(position)};
}

// 32 random bits for every position (W: uint32_t, or a vector of it): the low half rounds sq_grad_sum, the high half grad_mean. Two
// rounds of multiply and xorshift with the constants of C. Wellons' hash-prospector, the second word of the key between them.
template <typename W>
EXCESSMTL_HOST_DEVICE W rounding_words(W position, const RoundingKey& key) {
  W word = position ^ key.low;
  word ^= word >> 16;
  word *= 0x7feb352dU;
  word ^= key.high;
  word ^= word >> 15;
  word *= 0x846ca68bU;
  return word ^ (word >> 16);
}

// The bits of a float, rounded to bfloat16 with 16 random bits: away from zero when the bits cut off and the random ones carry,
// which happens in as many of the 65,536 cases as the bits cut off say. From the largest finite bfloat16 on the rest is cut off
// instead, so that nothing finite becomes infinite; a NaN stays one.
template <typename W>
EXCESSMTL_HOST_DEVICE W rounded_to_bfloat16(W float_bits, W random_16_bits) {
  const W magnitude = float_bits & 0x7fffffffU;
  W rounded = magnitude < 0x7f7f0000U ? float_bits + random_16_bits : float_bits;
  rounded = magnitude > 0x7f800000U ? rounded | 0x00400000U : rounded;
  return rounded >> 16;
}

}  // namespace excessmtl
