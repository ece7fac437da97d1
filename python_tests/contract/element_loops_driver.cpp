// Judges the element loops of every instruction set this machine has against scalar sums in double. Run by test_portability.py,
// which compiles it together with csrc/cpu/element_loops_*.cpp, also for processors that only an emulator has.
//
// Prints one line per instruction set; exits with 1 when a value is off, after naming the first ones.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/element_loops.h"

namespace excessmtl::cpu {
namespace {

enum Type { kFloat64, kFloat32, kBFloat16, kFloat16 };  // the order of GradType in param_layout.h
constexpr const char* kTypeNames[] = {"float64", "float32", "bfloat16", "float16"};
constexpr double kTypeLargest[] = {1.7976931348623157e308, 3.4028234663852886e38,
                                   3.3895313892515355e38, 65504.0};

constexpr int64_t kPadding = 32;  // kSegmentAlignment: what the loops may touch behind the end
// Nothing, every tail of every vector width, one block of the sums and its neighbours, several blocks.
const std::vector<int64_t> kSizes = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,   9,   10,  11,   12,   13,   14,   15,   16,   17, 18,
    19, 20, 21, 22, 23, 24, 25, 26, 27,  28,  29,  30,   31,   32,   33,   47,   48,   49, 63,
    64, 65, 66, 79, 95, 96, 97, 99, 127, 128, 129, 1000, 4095, 4096, 4097, 4111, 10007};
// Near 1, with some not finite, or over the whole range of the type: squares that vanish in the state, and that fill it.
enum Content { kOrdinary, kNonFinite, kExtreme };

int64_t num_values = 0;
int64_t num_faults = 0;

void expect_near(double actual, double expected, double tolerance, const std::string& what,
                 int64_t n, int64_t k) {
  ++num_values;
  const bool is_right = std::isfinite(expected) ? std::fabs(actual - expected) <= tolerance
                        : std::isnan(expected)  ? std::isnan(actual)
                                                : actual == expected;
  if (!is_right && ++num_faults <= 20) {
    std::printf("%s, n = %lld, element %lld: expected %.17g +- %.3g, but got %.17g\n", what.c_str(),
                static_cast<long long>(n), static_cast<long long>(k), expected, tolerance, actual);
  }
}

double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int fraction = bits & 0x3ff;
  double magnitude =
      std::ldexp(exponent == 0 ? fraction : fraction + 1024, (exponent == 0 ? 1 : exponent) - 25);
  if (exponent == 31) {
    magnitude = fraction == 0 ? std::numeric_limits<double>::infinity()
                              : std::numeric_limits<double>::quiet_NaN();
  }
  return bits >> 15 ? -magnitude : magnitude;
}

double value_of_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

uint16_t nearest_half(double value) {  // by search: the driver shares no trick with what it judges
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) {
    return 0x7e00;
  }
  int low = 0;
  int high = 0x7c00;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (value_of_half(static_cast<uint16_t>(middle)) <= magnitude ? low : high) = middle;
  }
  const int nearest = std::isinf(value) || value_of_half(0x7bff) < magnitude ? 0x7c00 : low;
  return static_cast<uint16_t>(nearest | (std::signbit(value) ? 0x8000 : 0));
}

uint16_t nearest_bfloat16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t word;
  std::memcpy(&word, &narrow, sizeof word);
  return static_cast<uint16_t>(word >> 16);
}

// Gradients of one type, without a byte behind the last one, and off every alignment but the element's own. A sanitizer sees a
// read behind the end.
class Grads {
 public:
  Grads(Type type, int64_t n) : type_(type), bytes_(static_cast<size_t>((n + 1) * size())) {}
  const void* data() const { return bytes_.data() + size(); }
  void set(int64_t k, double value) {
    const float as_float = static_cast<float>(value);
    const uint16_t as_half = type_ == kFloat16 ? nearest_half(value) : nearest_bfloat16(value);
    const void* from = type_ == kFloat64   ? static_cast<const void*>(&value)
                       : type_ == kFloat32 ? static_cast<const void*>(&as_float)
                                           : static_cast<const void*>(&as_half);
    std::memcpy(bytes_.data() + (k + 1) * size(), from, static_cast<size_t>(size()));
  }
  void set_bits(int64_t k, uint16_t bits) { std::memcpy(bytes_.data() + (k + 1) * 2, &bits, 2); }
  double value(int64_t k) const {
    const char* at = bytes_.data() + (k + 1) * size();
    double as_double;
    float as_float;
    uint16_t bits;
    switch (type_) {
      case kFloat64:
        std::memcpy(&as_double, at, 8);
        return as_double;
      case kFloat32:
        std::memcpy(&as_float, at, 4);
        return as_float;
      default:
        std::memcpy(&bits, at, 2);
        return type_ == kFloat16 ? value_of_half(bits) : value_of_bfloat16(bits);
    }
  }

 private:
  int64_t size() const { return type_ == kFloat64 ? 8 : type_ == kFloat32 ? 4 : 2; }
  Type type_;
  std::vector<char> bytes_;
};

Grads random_grads(Type type, int64_t n, Content content, std::mt19937_64& random) {
  Grads grads(type, n);
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> exponent(-1.0, 1.0);
  const double decades = type == kFloat16 ? 4.5 : type == kFloat64 ? 150.0 : 19.0;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t kind = static_cast<int64_t>(random() % 8);
    double value = content == kExtreme ? normal(random) * std::pow(10.0, decades * exponent(random))
                                       : normal(random);
    value = kind == 0 ? 0.0 : value;
    if (content == kNonFinite && kind <= 2) {
      const double infinity = std::numeric_limits<double>::infinity();
      value = kind == 0   ? std::numeric_limits<double>::quiet_NaN()
              : kind == 1 ? infinity
                          : -infinity;
    }
    grads.set(k, std::isfinite(value)
                     ? std::fmax(-kTypeLargest[type], std::fmin(value, kTypeLargest[type]))
                     : value);
  }
  return grads;
}

template <typename state_t>
state_t stored_as(double value) {
  if constexpr (sizeof(state_t) == 2) {
    return nearest_bfloat16(value);
  } else {
    return static_cast<state_t>(value);
  }
}

// State as the ops keep it: padded, with junk in the padding that must not reach any sum.
template <typename state_t>
std::vector<state_t> random_state(int64_t n, bool is_signed, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<state_t> state(static_cast<size_t>((n + kPadding - 1) / kPadding * kPadding),
                             stored_as<state_t>(1e3));
  for (int64_t k = 0; k < n; ++k) {
    const double value = k % 7 == 0 ? 0.0 : normal(random);
    state[static_cast<size_t>(k)] = stored_as<state_t>(is_signed ? value : value * value);
  }
  return state;
}

template <typename state_t>
std::vector<double> values_of(const std::vector<state_t>& state) {
  std::vector<double> values;
  for (const state_t element : state) {
    if constexpr (sizeof(state_t) == 2) {
      values.push_back(value_of_bfloat16(element));
    } else {
      values.push_back(element);
    }
  }
  return values;
}

template <typename state_t>
void check_accumulate(const StateLoops<state_t>& loops, const char* name, Type type,
                                 bool sqrt_fisher, bool has_momentum, Content content,
                                 std::mt19937_64& random) {
  using acc_t = Accumulation<state_t>;
  constexpr bool kIsRounded = sizeof(state_t) == 2;
  constexpr double kUnit = std::numeric_limits<acc_t>::epsilon();  // one rounding is half of it
  // To one of two neighbours: off by less than the distance between them, 2^-7 of the number.
  constexpr double kStoredUnit = kIsRounded ? 0x1p-7 : kUnit;
  constexpr double kLargest = std::numeric_limits<acc_t>::max();
  constexpr double kSmallest =
      std::numeric_limits<acc_t>::min();  // results below it have fewer digits, or none
  const double momentum = has_momentum ? 0.98 : 0.0;
  const double scale = content == kExtreme ? 1.0 : 3.0;
  const ElementOptions<acc_t> options = make_element_options<acc_t>(1e-7, momentum, scale);
  const std::string what = std::string(name) +
                           (kIsRounded           ? ", bfloat16 state, "
                            : sizeof(acc_t) == 4 ? ", float32 state, "
                                                 : ", float64 state, ") +
                           kTypeNames[type] + (sqrt_fisher ? ", sqrt" : ", linear") +
                           (has_momentum ? ", momentum" : "") +
                           (content == kNonFinite ? ", not finite"
                            : content == kExtreme ? ", extreme"
                                                  : "");
  for (const int64_t n : kSizes) {
    const Grads grads = random_grads(type, n, content, random);
    const SliceRounding rounding = {rounding_key(7, n, 1), 0};
    std::vector<state_t> stored_sums = random_state<state_t>(n, false, random);
    std::vector<state_t> stored_means = random_state<state_t>(n, true, random);
    for (size_t at = 3; content == kExtreme && at < static_cast<size_t>(n); at += 5) {
      // Full: it stays there, and no infinity divides.
      stored_sums[at] = stored_as<state_t>(std::numeric_limits<acc_t>::max());
    }
    const std::vector<double> sums_before = values_of(stored_sums);
    const std::vector<double> means_before = values_of(stored_means);
    const double risk = loops.accumulate[type][sqrt_fisher][has_momentum](
        grads.data(), stored_sums.data(), has_momentum ? stored_means.data() : nullptr, n, options,
        rounding);
    const std::vector<double> sums = values_of(stored_sums);
    const std::vector<double> means = values_of(stored_means);

    long double exact_risk =
        0.0;  // thousands of roundings in double would be the larger error of the two
    double cancelled_risk = 0.0;
    bool is_finite = true;
    for (int64_t k = 0; k < n; ++k) {
      const size_t at = static_cast<size_t>(k);
      const double grad = grads.value(k) / scale;
      // The square in the accumulation type says whether the element counts.
      const bool is_counted =
          static_cast<acc_t>(grad) * static_cast<acc_t>(grad) <= std::numeric_limits<acc_t>::max();
      const double sq_grad = is_counted ? grad * grad : 0.0;
      const double sum = std::fmin(sums_before[at] + sq_grad, kLargest);
      expect_near(sums[at], sum, 4 * kStoredUnit * sum + kSmallest, what + ", sq_grad_sum", n, k);
      double numerator = sq_grad;
      if (has_momentum) {
        const double kept = momentum * means_before[at];
        const double added = (1.0 - momentum) * grad;
        const double mean = is_counted ? kept + added : means_before[at];
        const double magnitude = is_counted ? std::fabs(kept) + std::fabs(added) : 0.0;
        expect_near(means[at], mean, 4 * kStoredUnit * magnitude + kSmallest, what + ", grad_mean",
                    n, k);
        // As rounded to float: a mean near 0 has no digits to compare. bfloat16 rounds after the risk is known.
        numerator = kIsRounded ? mean * mean : means[at] * means[at];
        cancelled_risk +=
            8 * kUnit * magnitude * magnitude / (sqrt_fisher ? std::sqrt(sum + 1e-7) : sum + 1e-7);
      }
      const double fisher = (kIsRounded ? sum : sums[at]) + 1e-7;
      exact_risk += numerator / (sqrt_fisher ? std::sqrt(fisher) : fisher);
      is_finite &= is_counted;
    }
    const double expected_risk = static_cast<double>(exact_risk);
    // The shares are positive: the sum is as exact as they are, but for up to 512 additions per lane, whose errors wander.
    const double tolerance = (n <= 129 ? 16 : 64) * kUnit * expected_risk +
                             static_cast<double>(n) * kSmallest * 1e4 +
                             (kIsRounded ? cancelled_risk : 0.0);
    if (is_finite) {
      expect_near(risk, expected_risk, tolerance, what + ", excess risk", n, -1);
    } else {
      expect_near(std::isfinite(risk) ? 1.0 : 0.0, 0.0, 0.0, what + ", excess risk is finite", n,
                  -1);
    }
  }
}

// Gradients and momentum with so few digits that float32 rounds at most once: every bit of the state is known.
void check_rounding(const StateLoops<BFloat16Bits>& loops, const char* name,
                    std::mt19937_64& random) {
  const auto options = make_element_options<float>(1e-7, 0.5, 1.0);
  const std::string what = std::string(name) + ", rounding to bfloat16";
  for (const int64_t n : kSizes) {
    for (const uint32_t position : {0U, 96U, 0xffffff00U}) {
      const SliceRounding rounding = {rounding_key(3, 1000, 2), position};
      const Grads grads = random_grads(kBFloat16, n, kOrdinary, random);
      std::vector<BFloat16Bits> sums = random_state<BFloat16Bits>(n, false, random);
      std::vector<BFloat16Bits> means = random_state<BFloat16Bits>(n, true, random);
      const std::vector<double> sums_before = values_of(sums);
      const std::vector<double> means_before = values_of(means);
      loops.accumulate[kBFloat16][1][1](grads.data(), sums.data(), means.data(), n, options,
                                        rounding);
      for (int64_t k = 0; k < n; ++k) {
        const size_t at = static_cast<size_t>(k);
        const double grad = grads.value(k);
        const uint32_t word = rounding_words(position + static_cast<uint32_t>(k), rounding.key);
        const auto rounded = [](double value, uint32_t random_16_bits) {
          const float exact = static_cast<float>(value);
          uint32_t bits;
          std::memcpy(&bits, &exact, sizeof bits);
          return value_of_bfloat16(
              static_cast<uint16_t>(rounded_to_bfloat16(bits, random_16_bits)));
        };
        expect_near(value_of_bfloat16(sums[at]),
                    rounded(sums_before[at] + grad * grad, word & 0xffffU), 0.0,
                    what + ", sq_grad_sum", n, k);
        expect_near(value_of_bfloat16(means[at]),
                    rounded(0.5 * means_before[at] + 0.5 * grad, word >> 16), 0.0,
                    what + ", grad_mean", n, k);
      }
    }
  }
}

template <typename acc_t>
void check_fold(const FoldLoops<acc_t>& loops, const char* name, Type type,
                std::mt19937_64& random) {
  constexpr double kUnit = std::numeric_limits<acc_t>::epsilon();
  const std::string what = std::string(name) + ", fold of " + kTypeNames[type];
  for (const int64_t n : kSizes) {
    const Grads grads = random_grads(type, n, kOrdinary, random);
    std::vector<acc_t> sums = random_state<acc_t>(n, true, random);
    const std::vector<acc_t> before = sums;
    loops.fold[type](grads.data(), acc_t(0.75), acc_t(0.5), sums.data(), n);  // exact factors
    for (int64_t k = 0; k < n; ++k) {
      const double kept = 0.75 * before[static_cast<size_t>(k)];
      const double added = 0.5 * grads.value(k);
      expect_near(sums[static_cast<size_t>(k)], kept + added,
                  2 * kUnit * (std::fabs(kept) + std::fabs(added)), what, n, k);
    }
  }
  if (type == kBFloat16 ||
      type == kFloat16) {  // every number of 16 bits, subnormal ones too, arrives unrounded
    constexpr int64_t kCount = 1 << 16;
    Grads all(type, kCount);
    std::vector<acc_t> sums(kCount, acc_t(0));
    for (int64_t k = 0; k < kCount; ++k) {
      all.set_bits(k, static_cast<uint16_t>(k));
    }
    loops.fold[type](all.data(), acc_t(1), acc_t(1), sums.data(), kCount);
    for (int64_t k = 0; k < kCount; ++k) {
      expect_near(sums[static_cast<size_t>(k)], all.value(k), 0.0, what + ", all bit patterns",
                  kCount, k);
    }
  }
}

// The largest of n magnitudes, wherever it stands, and infinity and NaN above all others.
template <typename acc_t>
void check_largest_magnitude(const FoldLoops<acc_t>& loops, const char* name, Type type,
                             std::mt19937_64& random) {
  const std::string what = std::string(name) + ", largest magnitude of " + kTypeNames[type];
  for (const int64_t n : kSizes) {
    for (const Content content : {kOrdinary, kNonFinite, kExtreme}) {
      const Grads grads = random_grads(type, n, content, random);
      double expected = 0.0;
      bool has_nan = false;
      for (int64_t k = 0; k < n; ++k) {
        const double magnitude = std::fabs(grads.value(k));
        has_nan |= std::isnan(magnitude);
        expected = magnitude > expected ? magnitude : expected;
      }
      const double largest = static_cast<double>(loops.largest_magnitude[type](grads.data(), n));
      if (has_nan) {
        expect_near(std::isnan(largest) ? 1.0 : 0.0, 1.0, 0.0, what + ", NaN", n, -1);
      } else if (std::isinf(expected)) {
        expect_near(std::isinf(largest) ? 1.0 : 0.0, 1.0, 0.0, what + ", infinity", n, -1);
      } else {
        expect_near(largest, expected, 0.0, what, n, -1);
      }
    }
    for (int64_t at = 0; at < n; at += n > 200 ? 97 : 1) {
      Grads grads = random_grads(type, n, kOrdinary, random);
      grads.set(at, std::numeric_limits<double>::infinity());
      const double largest = static_cast<double>(loops.largest_magnitude[type](grads.data(), n));
      expect_near(std::isinf(largest) ? 1.0 : 0.0, 1.0, 0.0, what + ", one infinity", n, at);
    }
  }
}

template <typename state_t>
void check_loops(const StateLoops<state_t>& loops, const FoldLoops<Accumulation<state_t>>& folds,
                 const char* name) {
  std::mt19937_64 random(0);
  for (const Type type : {kFloat64, kFloat32, kBFloat16, kFloat16}) {
    if (type == kFloat64 && sizeof(state_t) < 8) {
      continue;  // such gradients get float64 state
    }
    for (const bool sqrt_fisher : {false, true}) {
      for (const bool has_momentum : {false, true}) {
        for (const Content content : {kOrdinary, kNonFinite, kExtreme}) {
          check_accumulate(loops, name, type, sqrt_fisher, has_momentum, content,
                                      random);
        }
      }
    }
    check_fold(folds, name, type, random);
    check_largest_magnitude(folds, name, type, random);
  }
}

bool runs_here(const char* name) {  // as chunks.h chooses
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(name, "default") == 0;
}

}  // namespace
}  // namespace excessmtl::cpu

int main() {
  using namespace excessmtl::cpu;
  for (const Capability* capability :
       {default_capability(), avx2_capability(), avx512_capability()}) {
    if (capability == nullptr) {
      continue;
    }
    if (!runs_here(capability->name)) {
      std::printf("%s: not on this processor\n", capability->name);
      continue;
    }
    num_values = 0;
    num_faults = 0;
    check_loops(*capability->float_state, *capability->float_fold, capability->name);
    check_loops(*capability->double_state, *capability->double_fold, capability->name);
    check_loops(*capability->bfloat16_state, *capability->float_fold, capability->name);
    std::mt19937_64 random(1);
    check_rounding(*capability->bfloat16_state, capability->name, random);
    std::printf("%s: %lld of %lld values off\n", capability->name,
                static_cast<long long>(num_faults), static_cast<long long>(num_values));
    if (num_faults != 0) {
      return 1;
    }
  }
  return 0;
}
