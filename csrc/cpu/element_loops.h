// The inner loops of the CPU ops, compiled once per instruction set and chosen at run time.
//
// This header and the element_loops_*.cpp behind it include no torch header and no container: a file compiled for AVX-512 must
// not emit an inline function that the linker could then pick for machines without it.
#pragma once

#include <cstdint>

#include "../excess_risk_math.h"
#include "../stochastic_rounding.h"

namespace excessmtl::cpu {

// The order of GradType in param_layout.h; a test reads both.
constexpr int kNumElementTypes = 4;

// Elements whose shares are summed in acc_t before the sum goes to double: with 16 lanes 256 additions each, whose rounding stays
// near 1e-6 of the sum; adding the lanes up costs under 3 % of the block.
constexpr int64_t kBlockNumel = 4096;

// One row of functions per gradient type. n may be any number; pointers need no alignment. State (and the sum of fold) must be
// readable and writable up to the next multiple of kSegmentAlignment elements: the last vector is moved whole.
template <typename state_t>
struct StateLoops {
  using Options = ElementOptions<Accumulation<state_t>>;
  // Adds n coordinates to the state and returns their share of the excess risk. grad_mean is not read without momentum.
  using Accumulate = double (*)(const void* grad, state_t* sq_grad_sum, state_t* grad_mean,
                                int64_t n, const Options& options, const SliceRounding& rounding);

  Accumulate accumulate[kNumElementTypes][2][2];  // [type][sqrt_fisher][has_momentum]
};

template <typename acc_t>
struct FoldLoops {
  // sum <- keep * sum + add * grad, without FMA-dependent reordering across elements.
  using Fold = void (*)(const void* grad, acc_t keep, acc_t add, acc_t* sum, int64_t n);
  // The largest magnitude of n gradients: NaN where any is one.
  using LargestMagnitude = acc_t (*)(const void* grad, int64_t n);

  // The sum of (inverse_scale * grad)^2.
  using SquareSum = double (*)(const void* grad, acc_t inverse_scale, int64_t n);

  Fold fold[kNumElementTypes];
  LargestMagnitude largest_magnitude[kNumElementTypes];
  SquareSum square_sum[kNumElementTypes];
};

struct Capability {
  const char* name;
  const StateLoops<float>* float_state;
  const StateLoops<double>* double_state;
  const StateLoops<BFloat16Bits>* bfloat16_state;
  const FoldLoops<float>* float_fold;
  const FoldLoops<double>* double_fold;
};

// Each is null in a build whose target has no such instruction set.
const Capability* avx512_capability();
const Capability* avx2_capability();
const Capability* default_capability();

// The widest instruction set this machine has. EXCESSMTL_CPU_CAPABILITY=avx2 or =default lowers it (for tests and measurements).
const Capability& capability();

}  // namespace excessmtl::cpu
