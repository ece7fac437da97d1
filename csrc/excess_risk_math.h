// Every formula of ExcessMTL (He et al., ICML 2024), once, for the host and for the device: no other C++ file contains one.
//
// Symbols: g gradient of one task, sq_grad_sum = sum over steps of g^2 (diagonal empirical Fisher, Eq. 7), grad_mean = running
// mean of g, E excess risk (Eq. 6, its factor 1/2 dropped), B its baseline, R = E / B (Sec. 3.2), a task weights (Eq. 9).
// Includes no torch header: nvcc, the host compiler and the tests' SIMT shim read the same text.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define EXCESSMTL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EXCESSMTL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace excessmtl {

// ---- per element -----------------------------------------------------------------------------------------------------

// What the element formulas need besides the element. acc_t: float, or double for float64 gradients.
template <typename acc_t>
struct ElementOptions {
  // Added to the Fisher diagonal (inside the root when there is one), > 0.
  acc_t eps;
  acc_t momentum;  // b of grad_mean = b grad_mean + (1 - b) g; 0 switches it off
  // Rounded once from double: 1 - b loses digits in float when b is near 1.
  acc_t one_minus_momentum;
  acc_t inverse_scale;  // 1 / grad_scale (GradScaler), else 1
};

template <typename acc_t>
inline ElementOptions<acc_t> make_element_options(double eps, double momentum, double grad_scale) {
  return {static_cast<acc_t>(eps), static_cast<acc_t>(momentum), static_cast<acc_t>(1.0 - momentum),
          static_cast<acc_t>(1.0 / grad_scale)};
}

template <typename acc_t>
struct LargestFinite;
template <>
struct LargestFinite<float> {
  static constexpr float value = 3.402823466e+38F;
};
template <>
struct LargestFinite<double> {
  static constexpr double value = 1.7976931348623157e+308;
};

// The functions whose fast form depends on the machine. The SIMD loops bring a Math of their own over vectors.
// smaller(a, b) is b where a is NaN.
template <typename acc_t>
struct ScalarMath;
template <>
struct ScalarMath<float> {
  using acc_t = float;
  static EXCESSMTL_HOST_DEVICE float inverse_sqrt(float x) {
#if defined(__CUDA_ARCH__)
    return rsqrtf(x);
#else
    return 1.0F / std::sqrt(x);
#endif
  }
  static EXCESSMTL_HOST_DEVICE float inverse(float x) { return 1.0F / x; }
  static EXCESSMTL_HOST_DEVICE float smaller(float a, float b) {
#if defined(__CUDA_ARCH__)
    return fminf(a, b);
#else
    return a < b ? a : b;
#endif
  }
};
template <>
struct ScalarMath<double> {
  using acc_t = double;
  static EXCESSMTL_HOST_DEVICE double inverse_sqrt(double x) {
#if defined(__CUDA_ARCH__)
    return rsqrt(x);
#else
    return 1.0 / std::sqrt(x);
#endif
  }
  static EXCESSMTL_HOST_DEVICE double inverse(double x) { return 1.0 / x; }
  static EXCESSMTL_HOST_DEVICE double smaller(double a, double b) {
#if defined(__CUDA_ARCH__)
    return fmin(a, b);
#else
    return a < b ? a : b;
#endif
  }
};

// Whether a step may take a gradient in: its square, without the loss scale, is finite in acc_t. A step with any that is not
// writes no state. True of the gradient of largest magnitude (NaN above infinity), it is true of all.
template <typename acc_t>
EXCESSMTL_HOST_DEVICE bool has_finite_square(acc_t scaled_grad, acc_t inverse_scale) {
  const acc_t grad = scaled_grad * inverse_scale;
  return grad * grad <= LargestFinite<acc_t>::value;
}

// Eqs. 6-7 for one coordinate (V: a scalar, or a vector of coordinates): adds g^2 to the Fisher diagonal, moves the running
// mean when kMomentum, and returns this coordinate's share of g^T H^-1 g, H = diag(sqrt(S + eps)) or diag(S + eps).
// A square that is not finite never enters the state; it makes the returned share non-finite, which the sum then carries.
// S stops at the largest finite number, so that no later step divides by infinity.
template <class Math, bool kSqrtFisher, bool kMomentum, typename V>
EXCESSMTL_HOST_DEVICE V
accumulate_excess_risk(V scaled_grad, V& sq_grad_sum, V& grad_mean,
                       const ElementOptions<typename Math::acc_t>& options) {
  constexpr typename Math::acc_t kLargest = LargestFinite<typename Math::acc_t>::value;
  const V grad = scaled_grad * options.inverse_scale;
  const V sq_grad = grad * grad;
  const V sum = sq_grad <= kLargest ? sq_grad_sum + sq_grad : sq_grad_sum;
  sq_grad_sum = Math::smaller(sum, V{} + kLargest);
  V numerator = sq_grad;
  if constexpr (kMomentum) {
    const V mean = grad_mean * options.momentum + grad * options.one_minus_momentum;
    grad_mean = sq_grad <= kLargest ? mean : grad_mean;
    // The difference is 0, or NaN where sq_grad is not finite.
    numerator = grad_mean * grad_mean + (sq_grad - sq_grad);
  }
  const V fisher = sq_grad_sum + options.eps;
  if constexpr (kSqrtFisher) {
    return numerator * Math::inverse_sqrt(fisher);
  } else {
    return numerator * Math::inverse(fisher);
  }
}

// ---- per task, always in double --------------------------------------------------------------------------------------

struct TaskOptions {
  double momentum;           // b, for the bias correction of grad_mean
  int64_t num_warmup_steps;  // steps with resting weights whose mean risk is the baseline
  bool relative;             // divide by the baseline
  // Factor of the risk when not relative: 1, or 1 / P for the linear Fisher.
  double raw_risk_scale;
  double robust_step_size;  // eta_alpha
  double min_weight;        // floor f, at most 1 / T
  double weight_total;      // what the weights sum to
};

// Keeps the exponent finite when a baseline is vanishingly small: E / B <= 1e100 still orders the tasks.
constexpr double kMaxLogStep = 1e100;

struct TaskRisk {
  double excess_risk;
  double relative_excess_risk;
  double baseline_excess_risk;
  int64_t num_task_steps;
};

// The risk of one task from the sum over its coordinates. grad_mean starts at zero, so m / (1 - b^t) is the mean and the sum of
// its squares carries the factor squared. The baseline is the mean over the warm-up, or the task's first non-zero risk after it.
EXCESSMTL_HOST_DEVICE TaskRisk updated_task_risk(double excess_risk_sum,
                                                 double baseline_excess_risk, int64_t num_steps,
                                                 int64_t num_task_steps,
                                                 const TaskOptions& options) {
  if (excess_risk_sum == 0.0 && baseline_excess_risk == 0.0) {
    return {0.0, 0.0, 0.0, num_task_steps};  // the task has not begun: its first gradient is step 1
  }
  const int64_t t = num_task_steps + 1;
  double excess_risk = excess_risk_sum;
  if (options.momentum > 0.0) {
    const double bias_correction = 1.0 - pow(options.momentum, static_cast<double>(t));
    excess_risk /= bias_correction * bias_correction;
  }
  double baseline = baseline_excess_risk;
  if (num_steps < options.num_warmup_steps) {
    baseline += (excess_risk - baseline) / static_cast<double>(t);
  } else if (baseline == 0.0) {
    baseline = excess_risk;
  }
  double relative = excess_risk * options.raw_risk_scale;
  if (options.relative) {
    relative = baseline > 0.0 ? excess_risk / baseline : 0.0;
  }
  return {excess_risk, relative, baseline, t};
}

// Eq. 9 before normalisation, as a log-weight. Weights rest during the warm-up.
EXCESSMTL_HOST_DEVICE double moved_log_weight(double log_task_weight, double relative_excess_risk,
                                              int64_t num_steps, const TaskOptions& options) {
  if (num_steps < options.num_warmup_steps) {
    return log_task_weight;
  }
  const double log_step = options.robust_step_size * relative_excess_risk;
  return log_task_weight + (log_step < kMaxLogStep ? log_step : kMaxLogStep);
}

// The weight of one task from its share exp(l - max) / sum exp(l - max) of the simplex.
EXCESSMTL_HOST_DEVICE double scaled_task_weight(double share, int64_t num_tasks,
                                                const TaskOptions& options) {
  return options.weight_total *
         ((1.0 - static_cast<double>(num_tasks) * options.min_weight) * share + options.min_weight);
}

// ---- gradients at one size, weights within bounds; per task and tensor, always in double ------------------------------

// Steps that a running mean square looks back; the mean of all steps until then.
constexpr double kSizeMemory = 100.0;
// A mean square counts as at most so many times the running one, so that no single batch decides a size.
constexpr double kOutlierRatio = 100.0;
// Gradients of a task until its risk counts in full: three times the 50 steps that momentum 0.98 looks back.
constexpr double kRampSteps = 150.0;
// Least 1 - c at which variance and signal can be told apart: below, the momentum is of one gradient.
constexpr double kLeastEvidence = 1e-6;

struct MoveOptions {
  bool is_bounded;       // the log-weights follow the shares, instead of adding up (Eq. 9)
  double max_log_ratio;  // kappa: how far they can lie apart, besides the priorities
};

// Sums of squares that exceed the type they are added up in count as its largest number, as in sq_grad_sum.
template <typename acc_t>
EXCESSMTL_HOST_DEVICE double bounded_square_sum(double square_sum) {
  constexpr double kLargest = LargestFinite<acc_t>::value;
  return square_sum > kLargest ? kLargest : square_sum;
}

struct TensorSize {
  double mean_square;
  int64_t num_steps;
};

// n <- n + (min(x, 100 n) - n) / min(t, 100) with this step's mean square x. A gradient that is zero in a whole tensor says
// nothing of its size.
EXCESSMTL_HOST_DEVICE TensorSize updated_tensor_size(double mean_square, int64_t num_steps,
                                                     double now) {
  if (!(now > 0.0)) {
    return {mean_square, num_steps};
  }
  const double most = kOutlierRatio * mean_square;
  const double bounded = num_steps == 0 || now < most ? now : most;
  const double t = static_cast<double>(num_steps + 1);
  return {mean_square + (bounded - mean_square) / (t < kSizeMemory ? t : kSizeMemory),
          num_steps + 1};
}

// What the gradient of a task is multiplied by in one tensor: brings it from its own size to the largest one of all tasks.
EXCESSMTL_HOST_DEVICE double tensor_weight(double task_weight, double largest_mean_square,
                                           double mean_square, double now) {
  if (!(mean_square > 0.0)) {
    return task_weight;
  }
  const double least = now / kOutlierRatio;
  return task_weight * std::sqrt(largest_mean_square / (mean_square < least ? least : mean_square));
}

struct SignalShare {
  double share;               // q, in [0, 1]
  int64_t num_gradient_steps;  // t
  double momentum_mass;       // sum of the shares that the t gradients have in m
  double momentum_sq_mass;    // sum of their squares
};

// How much of a task's squared gradient is no variance: (t E / P - c) / (1 - c), where E is the linear Fisher's risk, P the elements
// of all tensors in which the task has had a gradient, and c what pure variance would give. A gradient of zeros moves m as any
// other and is none of those whose mean is wanted. risk_sum: not corrected for the bias of m.
EXCESSMTL_HOST_DEVICE SignalShare updated_signal_share(double risk_sum, bool has_grad,
                                                       double num_reached_params,
                                                       const SignalShare& before, double momentum) {
  const double grad_share = has_grad ? 1.0 - momentum : 0.0;
  SignalShare after = {0.0, before.num_gradient_steps + (has_grad ? 1 : 0),
                       momentum * before.momentum_mass + grad_share,
                       momentum * momentum * before.momentum_sq_mass + grad_share * grad_share};
  const double sq_mass = after.momentum_mass * after.momentum_mass;
  const double variance = after.momentum_sq_mass / sq_mass;
  if (has_grad && 1.0 - variance > kLeastEvidence) {
    const double ratio =
        static_cast<double>(after.num_gradient_steps) * risk_sum / sq_mass / num_reached_params;
    const double share = (ratio - variance) / (1.0 - variance);
    after.share = share > 1.0 ? 1.0 : (share > 0.0 ? share : 0.0);
  }
  return after;
}

// R, between 0 and 1: the sum of a task's shares beside the largest sum.
EXCESSMTL_HOST_DEVICE double bounded_relative_risk(double risk_share_sum, double largest_sum,
                                                   int64_t num_gradient_steps) {
  const double ratio = largest_sum > 0.0 ? risk_share_sum / largest_sum : 1.0;
  const double ramp = static_cast<double>(num_gradient_steps) / kRampSteps;
  return 1.0 + (ratio - 1.0) * (ramp < 1.0 ? ramp : 1.0);
}

// The log-weight of a task before normalisation; the priorities during the warm-up.
EXCESSMTL_HOST_DEVICE double bounded_log_weight(double log_priority, double relative_risk,
                                                int64_t num_steps, int64_t num_warmup_steps,
                                                double max_log_ratio) {
  return num_steps < num_warmup_steps ? log_priority : log_priority + max_log_ratio * relative_risk;
}

// The weight of one task from its share of the simplex, where each task has a floor of its own.
EXCESSMTL_HOST_DEVICE double floored_task_weight(double share, double floor, double total_floor,
                                                 double weight_total) {
  return weight_total * ((1.0 - total_floor) * share + floor);
}

// ---- streaming ---------------------------------------------------------------------------------------------------------

// Streaming: how a running sum, kept relative to exp(largest log-weight so far), takes in one more weighted gradient:
// sum <- keep * sum + add * g. The largest log-weight starts at -inf with an empty sum.
struct FoldFactors {
  double keep;
  double add;
  double log_max;
};

EXCESSMTL_HOST_DEVICE FoldFactors fold_factors(double log_weight, double running_log_max) {
  const double log_max = log_weight > running_log_max ? log_weight : running_log_max;
  return {exp(running_log_max - log_max), exp(log_weight - log_max), log_max};
}

}  // namespace excessmtl
