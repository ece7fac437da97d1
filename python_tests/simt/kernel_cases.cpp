// Runs the CUDA kernels over simt.h against a plain float64 reference, many schedules per case, and compares bits between them.
//
//   kernel_cases SEEDS [CASE...]     exit status 0: every case agrees under every seed
//
// With -DONLY_FLOAT32 the other gradient types are left out (quicker to compile, for planted faults), with -DNO_BFLOAT16_STATE that
// state, with -DSIMT_OS_THREADS the cases shrink to what one thread of the operating system per CUDA thread can do.
#include "cuda_runtime.h"
//
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cuda/combine.cuh"
#include "cuda/fold.cuh"
#include "cuda/fused_step_combine_launch.cuh"
#include "cuda/fused_step_launch.cuh"
#include "cuda/update_task_risks.cuh"
#include "cuda/update_task_weights.cuh"

namespace excessmtl::cuda {

EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(float, float)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(float, float)
#if !defined(NO_BFLOAT16_STATE)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(float, BFloat16Bits)
#endif
#if !defined(ONLY_FLOAT32)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(double, double)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(double, double)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__nv_bfloat16, BFloat16Bits)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__nv_bfloat16, float)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(__nv_bfloat16, float)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP(__half, float)
EXCESSMTL_DEFINE_LAUNCH_FUSED_STEP_COMBINE(__half, float)
#endif

namespace {

using simt::Arena;

enum class Table { kByCount, kDevice };

struct Case {
  std::string name;
  int num_tasks;
  std::vector<int64_t> numels;
  int64_t chunk_numel = 4096;
  int num_steps = 4;
  bool sqrt_fisher = true;
  double momentum = 0.0;
  int64_t num_warmup_steps = 1;
  bool relative = true;
  double min_weight = 0.0;
  double weight_total = 1.0;
  double grad_scale = 0.0;  // 0: none
  bool misaligned = false;  // every third gradient starts one element past a vector
  bool has_absent = false;  // some tasks skip a step, some tensors always
  int nonfinite_step = -1;
  // In the last task's first tensor; -1: every eleventh element of the task.
  int64_t nonfinite_at = -1;
  bool in_place = false;  // outputs are gradients of task 0
  bool accumulate = false;
  bool split =
      false;  // accumulate + update_task_risks + update_task_weights instead of the fused step
  Table table = Table::kByCount;
  unsigned num_sms = 2;
  bool one_launch = false;  // both phases in a cooperative launch
  unsigned blocks_per_sm = 4;
  bool is_rounded =
      false;  // bfloat16 state, with gradients and options of so few digits that every bit is known
};

constexpr int64_t kSeed = 12345;

int num_failures = 0;
void report(const Case& c, const char* format, ...) {
  if (++num_failures > 20) {
    return;
  }
  std::va_list args;
  va_start(args, format);
  std::printf("%s: ", c.name.c_str());
  std::vprintf(format, args);
  std::printf("\n");
  va_end(args);
}

// NaN never counts as close.
void expect_close(const Case& c, const char* what, int64_t at, double actual, double expected,
                  double rtol, double atol) {
  if (!(std::fabs(actual - expected) <= atol + rtol * std::fabs(expected))) {
    report(c, "%s[%lld] is %.9g, expected %.9g", what, static_cast<long long>(at), actual,
           expected);
  }
}

template <typename T>
T* allocate(int64_t count, size_t misalignment = 0) {
  return static_cast<T*>(Arena::instance().allocate(count * sizeof(T), misalignment));
}
template <typename T>
T* allocate_filled(int64_t count, T value) {
  T* data = allocate<T>(count);
  std::fill(data, data + count, value);
  return data;
}

// ---- the reference: one task, one parameter, one element at a time, all in double ---------------------------------------

// The rounding of bfloat16 state once more, so that a fault in stochastic_rounding.h is seen: splitmix64 and a keyed 32-bit hash on
// integers, the rounding itself in doubles.
uint64_t mix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15ULL;
  z ^= z >> 30;
  z *= 0xbf58476d1ce4e5b9ULL;
  z ^= z >> 27;
  z *= 0x94d049bb133111ebULL;
  return z ^ z >> 31;
}

uint32_t word_of(int64_t step, int task, int64_t position) {
  const uint64_t key = mix64(mix64(mix64(kSeed) + static_cast<uint64_t>(step)) + 2ULL * task);
  uint32_t word = static_cast<uint32_t>(position) ^ static_cast<uint32_t>(key);
  word = (word ^ word >> 16) * 0x7feb352dU;
  word ^= static_cast<uint32_t>(key >> 32);
  word = (word ^ word >> 15) * 0x846ca68bU;
  return word ^ word >> 16;
}

double value_of_bits(BFloat16Bits bits) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(bits) << 16));
}

// One of the two neighbours of x: the farther from zero where the part beyond the nearer one and random_bits / 2^16 make a whole.
double rounded_by_hand(double x, uint32_t random_bits) {
  const auto value = static_cast<float>(x);
  if (value == 0.0F) {
    return 0.0;
  }
  const double distance = std::ldexp(1.0, std::max(std::ilogb(value), -126) - 7);
  const double magnitude = std::fabs(static_cast<double>(value));
  const double below = std::floor(magnitude / distance) * distance;
  const bool goes_up = (magnitude - below) / distance * 65536.0 + random_bits >= 65536.0;
  return std::copysign(below + (goes_up ? distance : 0.0), value);
}

struct Reference {
  std::vector<std::vector<std::vector<double>>> S, m;  // [T][L][n_l]
  std::vector<double> E, R, B, log_w, w;
  std::vector<int64_t> task_steps;
  std::vector<bool> flags;
  int64_t steps = 0, skipped = 0;
  std::vector<int64_t> offsets;  // of the parameters in a row

  // What the state keeps of S and m.
  void store(const Case& c, int i, size_t l, size_t k, double sum, double mean) {
    if (c.is_rounded) {
      const uint32_t word = word_of(steps, i, offsets[l] + static_cast<int64_t>(k));
      sum = rounded_by_hand(sum, word & 0xffffU);
      mean = rounded_by_hand(mean, word >> 16);
    }
    S[i][l][k] = sum;
    m[i][l][k] = mean;
  }

  explicit Reference(const Case& c)
      : E(c.num_tasks),
        R(c.num_tasks),
        B(c.num_tasks),
        log_w(c.num_tasks, -std::log(c.num_tasks)),
        w(c.num_tasks, c.weight_total / c.num_tasks),
        task_steps(c.num_tasks),
        flags(c.num_tasks) {
    for (int i = 0; i < c.num_tasks; ++i) {
      S.emplace_back();
      for (const int64_t n : c.numels) {
        S.back().emplace_back(n, 0.0);
      }
    }
    m = S;
    int64_t offset = 0;
    for (const int64_t n : c.numels) {
      offsets.push_back(offset);
      offset += (n + 31) / 32 * 32;
    }
  }
};

using Grads = std::vector<std::vector<std::vector<double>>>;  // [T][L], empty: no gradient

bool is_present(const std::vector<std::vector<double>>& task) {
  return std::any_of(task.begin(), task.end(), [](const auto& g) { return !g.empty(); });
}

void reference_step(const Case& c, Reference& r, const Grads& raw, bool square_overflows_as_float) {
  const double scale = c.grad_scale > 0.0 ? c.grad_scale : 1.0;
  const double largest = square_overflows_as_float ? std::numeric_limits<float>::max()
                                                   : std::numeric_limits<double>::max();
  std::vector<double> sums(c.num_tasks, 0.0);
  std::set<int> present;
  bool any = false;
  r.flags.assign(c.num_tasks, false);
  int64_t num_params = 0;
  for (const int64_t n : c.numels) {
    num_params += n;
  }
  for (int i = 0; i < c.num_tasks; ++i) {
    for (const auto& grads : raw[i]) {
      for (const double value : grads) {
        const double g = value / scale;
        r.flags[i] = r.flags[i] || !(g * g <= largest);
      }
    }
    any = any || r.flags[i];
  }
  if (any) {
    r.skipped++;
    return;
  }
  for (int i = 0; i < c.num_tasks; ++i) {
    if (!is_present(raw[i])) {
      continue;
    }
    present.insert(i);
    for (size_t l = 0; l < c.numels.size(); ++l) {
      for (size_t k = 0; k < raw[i][l].size(); ++k) {
        const double g = raw[i][l][k] / scale;
        const double sq = g * g;
        const double sum = r.S[i][l][k] + sq;
        double mean = r.m[i][l][k];
        if (c.momentum > 0.0) {
          mean = c.momentum * mean + (1.0 - c.momentum) * g;
        }
        r.store(c, i, l, k, sum, mean);
        const double numerator = c.momentum > 0.0 ? mean * mean : sq;
        const double h = c.sqrt_fisher ? std::sqrt(sum + 1e-7) : sum + 1e-7;
        sums[i] += numerator / h;
      }
    }
  }
  double old_mass = 0.0, new_mass = 0.0;
  std::vector<double> moved(c.num_tasks);
  for (const int i : present) {
    const int64_t t = r.task_steps[i] + 1;
    r.E[i] = sums[i];
    if (c.momentum > 0.0) {
      r.E[i] /= std::pow(1.0 - std::pow(c.momentum, static_cast<double>(t)), 2.0);
    }
    if (r.steps < c.num_warmup_steps) {
      r.B[i] += (r.E[i] - r.B[i]) / static_cast<double>(t);
    } else if (r.B[i] == 0.0) {
      r.B[i] = r.E[i];
    }
    r.R[i] = c.relative ? (r.B[i] > 0.0 ? r.E[i] / r.B[i] : 0.0)
                        : r.E[i] / (c.sqrt_fisher ? 1.0 : static_cast<double>(num_params));
    r.task_steps[i] = t;
    moved[i] = std::exp(r.log_w[i]) * std::exp(0.4 * r.R[i]);
    old_mass += std::exp(r.log_w[i]);
    new_mass += moved[i];
  }
  if (r.steps >= c.num_warmup_steps) {
    for (const int i : present) {
      r.log_w[i] = std::log(moved[i] / new_mass * old_mass);
    }
  }
  double total = 0.0;
  for (const double l : r.log_w) {
    total += std::exp(l);
  }
  for (int i = 0; i < c.num_tasks; ++i) {
    r.w[i] = c.weight_total *
             ((1.0 - c.num_tasks * c.min_weight) * std::exp(r.log_w[i]) / total + c.min_weight);
  }
  r.steps++;
}

// ---- one case under one schedule ------------------------------------------------------------------------------------------

template <typename grad_t, typename state_t>
class Run {
  using acc_t = Accumulation<state_t>;

 public:
  explicit Run(const Case& c)
      : c_(c), reference_(c), num_tensors_(static_cast<int64_t>(c.numels.size())) {
    simt::config().num_sms = c.num_sms;
    simt::config().blocks_per_sm = c.blocks_per_sm;
    Arena::instance().clear();
    int64_t offset = 0;
    for (const int64_t n : c.numels) {
      offsets_.push_back(offset);
      offset += (n + 31) / 32 * 32;
    }
    offsets_.push_back(offset);
    padded_ = offset;
    num_chunks_ = (padded_ + c.chunk_numel - 1) / c.chunk_numel;
    std::vector<int64_t> map = {c.chunk_numel, num_chunks_, num_tensors_, padded_};
    map.insert(map.end(), offsets_.begin(), offsets_.end());
    map.insert(map.end(), c.numels.begin(), c.numels.end());
    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
      int64_t first = 0;
      while (offsets_[first + 1] <= chunk * c.chunk_numel) {
        ++first;
      }
      map.push_back(first);
    }
    chunks_.map = static_cast<int64_t*>(
        std::memcpy(allocate<int64_t>(map.size()), map.data(), map.size() * 8));
    chunks_.num_chunks = num_chunks_;
    chunks_.num_tensors = num_tensors_;
    const int tasks = c.num_tasks;
    sq_grad_sum_ = allocate_filled<state_t>(tasks * padded_, state_t(0));
    grad_mean_ = c.momentum > 0.0 ? allocate_filled<state_t>(tasks * padded_, state_t(0)) : nullptr;
    state_ = {allocate_filled<double>(tasks, 0.0),
              allocate_filled<double>(tasks, 0.0),
              allocate_filled<double>(tasks, 0.0),
              allocate_filled<double>(tasks, -std::log(tasks)),
              allocate_filled<double>(tasks, c.weight_total / tasks),
              allocate_filled<int64_t>(1, 0),
              allocate_filled<int64_t>(tasks, 0),
              allocate_filled<int64_t>(1, 0),
              allocate_filled<bool>(tasks, true)};  // stale flags must not survive a step
    ticket_ = allocate_filled<unsigned>(1, 0U);
    partials_ = allocate<double>(tasks * num_chunks_);
    found_nonfinite_ = allocate_filled<unsigned>(tasks, 0U);
    risk_sums_ = allocate<double>(tasks);
    grad_scale_ =
        c.grad_scale > 0.0 ? allocate_filled<float>(1, static_cast<float>(c.grad_scale)) : nullptr;
    for (int i = 0; i < tasks; ++i) {
      for (int64_t l = 0; l < num_tensors_; ++l) {
        const bool shifted = c.misaligned && (i + l) % 3 == 1;
        grads_.push_back(allocate<grad_t>(c.numels[l], shifted ? sizeof(grad_t) : 0));
      }
    }
    for (int64_t l = 0; l < num_tensors_; ++l) {
      outputs_.push_back(
          c.in_place
              ? grads_[l]
              : allocate<grad_t>(c.numels[l], c.misaligned && l % 4 == 2 ? sizeof(grad_t) : 0));
    }
    table_memory_ = allocate<unsigned long long>((tasks + 1) * num_tensors_);
  }

  // All bits that must not depend on the schedule.
  std::vector<uint8_t> execute() {
    std::mt19937_64 random(99);
    for (int step = 0; step < c_.num_steps; ++step) {
      draw_grads(step, random);
      draw_outputs();
      reference_step(c_, reference_, raw_, sizeof(acc_t) == 4);
      if (c_.one_launch) {
        fused_step_combine();
      } else {
        fused_step();
        compare_state("after the step");
        combine();
      }
      compare_outputs();
      compare_state("after combine");
      keep_state_bits();
      if (*ticket_ != 0) {
        report(c_, "the ticket is %u after a launch", *ticket_);
        *ticket_ = 0;
      }
    }
    fold();
    return std::move(bits_);
  }

 private:
  void draw_grads(int step, std::mt19937_64& random) {
    std::normal_distribution<double> normal;
    raw_.assign(c_.num_tasks, std::vector<std::vector<double>>(num_tensors_));
    pointers_.assign(c_.num_tasks * num_tensors_, nullptr);
    present_ = {};
    for (int i = 0; i < c_.num_tasks; ++i) {
      for (int64_t l = 0; l < num_tensors_; ++l) {
        const bool task_absent = c_.has_absent && i % 3 == 1 && step % 2 == 1;
        const bool tensor_absent = c_.has_absent && (i + l) % 5 == 3;
        grad_t* const data = grads_[i * num_tensors_ + l];
        // Risks that move from step to step, differently per task: only then do the weights say anything.
        const double size =
            (1.0 + 0.3 * ((i * 7 + step * 3) % 5)) * (c_.grad_scale > 0.0 ? c_.grad_scale : 1.0);
        std::vector<double> values(c_.numels[l]);
        for (int64_t k = 0; k < c_.numels[l]; ++k) {
          double value = normal(random) * size;
          const bool is_place =
              c_.nonfinite_at < 0 ? (k + l) % 11 == 5 : l == 0 && k == c_.nonfinite_at;
          if (step == c_.nonfinite_step && i == 0 && k == 0 && c_.grad_scale > 0.0) {
            value = 1e18 * c_.grad_scale;  // finite without the scale
          }
          if (step == c_.nonfinite_step && i == c_.num_tasks - 1 && is_place) {
            value = k % 2 == 0 ? std::numeric_limits<double>::infinity()
                               : std::numeric_limits<double>::quiet_NaN();
          }
          if (c_.is_rounded) {
            value = GradVector<__nv_bfloat16>::widen(
                GradVector<__nv_bfloat16>::narrow(static_cast<float>(value)));
          }
          data[k] = GradVector<grad_t>::narrow(static_cast<acc_t>(value));
          values[k] = static_cast<double>(GradVector<grad_t>::widen(data[k]));
        }
        if (task_absent || tensor_absent || c_.numels[l] == 0) {
          continue;
        }
        raw_[i][l] = std::move(values);
        pointers_[i * num_tensors_ + l] = data;
        present_.insert(i);
      }
    }
  }

  TensorPointers tensors(const std::vector<const void*>& pointers) {
    if (c_.table == Table::kDevice) {
      write_pointer_table(pointers.data(), static_cast<int64_t>(pointers.size()), table_memory_,
                          nullptr);
      return {pointers.data(), static_cast<int64_t>(pointers.size()), table_memory_};
    }
    return {pointers.data(), static_cast<int64_t>(pointers.size()), nullptr};
  }

  TaskOptions task_options() const {
    int64_t num_params = 0;
    for (const int64_t n : c_.numels) {
      num_params += n;
    }
    return {c_.momentum,
            c_.num_warmup_steps,
            c_.relative,
            c_.sqrt_fisher ? 1.0 : 1.0 / static_cast<double>(num_params),
            0.4,
            c_.min_weight,
            c_.weight_total};
  }

  void set_rounding(NoRounding& /*rounding*/) const {}
  void set_rounding(LaunchRounding& rounding) const {
    rounding = {kSeed, state_.num_steps, 0};
  }

  StepArgs<state_t> step_args() {
    std::fill(partials_, partials_ + c_.num_tasks * num_chunks_,
              std::numeric_limits<double>::quiet_NaN());
    StepArgs<state_t> args = {};
    set_rounding(args.rounding);
    args.chunks = chunks_;
    args.grad_scale = {grad_scale_, false};
    args.sq_grad_sum = sq_grad_sum_;
    args.grad_mean = grad_mean_;
    args.row_stride = padded_;
    std::fill(found_nonfinite_, found_nonfinite_ + c_.num_tasks, 0U);
    args.found_nonfinite = found_nonfinite_;
    args.finds_nonfinite = true;
    args.partials = partials_;
    args.ticket = ticket_;
    args.excess_risk_sum = c_.split ? risk_sums_ : nullptr;
    args.state = state_;
    args.task_options = task_options();
    args.element_options = make_element_options<acc_t>(1e-7, c_.momentum, 1.0);
    args.present = present_;
    args.num_tasks = c_.num_tasks;
    return args;
  }

  CombineArgs combine_args() const {
    CombineArgs args = {};
    args.chunks = chunks_;
    args.task_weights = state_.task_weights;
    args.found_nonfinite = state_.found_nonfinite;
    args.row_stride = padded_;
    args.num_tasks = c_.num_tasks;
    args.has_outputs = true;
    args.accumulate = c_.accumulate;
    return args;
  }

  std::vector<const void*> grads_and_outputs() const {
    std::vector<const void*> pointers = pointers_;
    for (int64_t l = 0; l < num_tensors_; ++l) {
      pointers.push_back(c_.numels[l] > 0 ? outputs_[l] : nullptr);
    }
    return pointers;
  }

  void fused_step_combine() {
    if constexpr (std::is_same_v<state_t, acc_t>) {
      const std::vector<const void*> pointers = grads_and_outputs();
      const cudaError_t status = launch_fused_step_combine<grad_t, acc_t>(
          c_.sqrt_fisher, c_.momentum > 0.0, static_cast<int>(c_.num_sms), nullptr,
          {step_args(), combine_args()}, tensors(pointers));
      if (status != cudaSuccess) {
        report(c_, "the cooperative launch failed with status %d", status);
      }
    }
  }

  void fused_step() {
    const StepArgs<state_t> args = step_args();
    const dim3 grid = grid_of(num_chunks_, c_.num_tasks, static_cast<int>(c_.num_sms));
    launch_fused_step<grad_t, state_t>(c_.sqrt_fisher, c_.momentum > 0.0, grid, nullptr, args,
                                       tensors(pointers_));
    if (c_.split) {
      std::fill(state_.found_nonfinite, state_.found_nonfinite + c_.num_tasks, false);
      launch(update_task_risks_kernel, dim3(1), kThreads, nullptr,
             static_cast<const double*>(risk_sums_), present_, c_.num_tasks, state_,
             task_options());
      launch(update_task_weights_kernel, dim3(1), kThreads, nullptr, present_, c_.num_tasks, state_,
             task_options());
    }
  }

  void draw_outputs() {
    before_.assign(num_tensors_, {});
    for (int64_t l = 0; l < num_tensors_; ++l) {
      for (int64_t k = 0; k < c_.numels[l]; ++k) {
        if (!c_.in_place) {
          outputs_[l][k] = GradVector<grad_t>::narrow(acc_t(0.25));
        }
        before_[l].push_back(static_cast<double>(GradVector<grad_t>::widen(outputs_[l][k])));
      }
    }
  }

  void combine() {
    const std::vector<const void*> pointers = grads_and_outputs();
    launch_with_table(combine_kernel<grad_t, acc_t, kSmallTable>,
                      combine_kernel<grad_t, acc_t, kLargeTable>,
                      grid_of(num_chunks_, 1, static_cast<int>(c_.num_sms)), nullptr,
                      combine_args(), tensors(pointers));
  }

  void compare_outputs() {
    const bool is_skipped =
        std::find(reference_.flags.begin(), reference_.flags.end(), true) != reference_.flags.end();
    const double rtol = sizeof(grad_t) == 8              ? 1e-12
                        : sizeof(grad_t) == 4            ? 2e-6
                        : std::is_same_v<grad_t, __half> ? 1e-3
                                                         : 8e-3;
    for (int64_t l = 0; l < num_tensors_; ++l) {
      for (int64_t k = 0; k < c_.numels[l]; ++k) {
        const double actual = static_cast<double>(GradVector<grad_t>::widen(outputs_[l][k]));
        if (is_skipped) {
          if (actual == actual) {
            report(c_, "output %lld is not NaN after a non-finite step", static_cast<long long>(l));
          }
          continue;
        }
        double expected = c_.accumulate ? before_[l][k] : 0.0;
        double size = std::fabs(expected);
        for (int i = 0; i < c_.num_tasks; ++i) {
          if (!raw_[i][l].empty()) {
            expected += reference_.w[i] * raw_[i][l][k];
            size += std::fabs(reference_.w[i] * raw_[i][l][k]);
          }
        }
        const double smallest =
            std::is_same_v<grad_t, __half> ? 6e-8 : 0.0;  // float16 has a last subnormal
        expect_close(c_, "output", k, actual, expected, rtol, 2e-6 * size + smallest);
      }
      keep_bits(outputs_[l], c_.numels[l]);
    }
  }

  // Takes the last step's gradients in one task at a time; the end must be the weighted sum.
  void fold() {
    double* const log_weight = allocate<double>(1);
    double* const log_max = allocate_filled<double>(1, -std::numeric_limits<double>::infinity());
    acc_t* const sum = allocate_filled<acc_t>(padded_, acc_t(0));
    if (c_.in_place) {
      return;  // the gradients are gone
    }
    for (int i = 0; i < c_.num_tasks; ++i) {
      *log_weight = std::log(reference_.w[i]) + (i % 2 == 0 ? 3.0 : 0.0);
      const std::vector<const void*> row(pointers_.begin() + i * num_tensors_,
                                         pointers_.begin() + (i + 1) * num_tensors_);
      const FoldArgs<acc_t> args = {chunks_, log_weight, log_max, sum, padded_};
      launch_with_table(
          fold_kernel<grad_t, acc_t, kSmallTable>, fold_kernel<grad_t, acc_t, kLargeTable>,
          grid_of(num_chunks_, 1, static_cast<int>(c_.num_sms)), nullptr, args, tensors(row));
      launch(update_log_max_kernel, dim3(1), 1, nullptr, static_cast<const double*>(log_weight),
             log_max);
    }
    for (int64_t l = 0; l < num_tensors_; ++l) {
      for (int64_t k = 0; k < c_.numels[l]; ++k) {
        double expected = 0.0, size = 0.0;
        for (int i = 0; i < c_.num_tasks; ++i) {
          if (!raw_[i][l].empty()) {
            const double term =
                reference_.w[i] * (i % 2 == 0 ? std::exp(3.0) : 1.0) * raw_[i][l][k];
            expected += term;
            size += std::fabs(term);
          }
        }
        const double actual = static_cast<double>(sum[offsets_[l] + k]) * std::exp(*log_max);
        if (std::isfinite(expected)) {
          expect_close(c_, "folded sum", k, actual, expected, 0.0,
                       (sizeof(acc_t) == 8 ? 1e-12 : 1e-5) * size);
        }
      }
    }
    keep_bits(sum, padded_);
    keep_bits(log_max, 1);
  }

  static double value_of(state_t element) {
    if constexpr (std::is_same_v<state_t, acc_t>) {
      return static_cast<double>(element);
    } else {
      return value_of_bits(element);
    }
  }

  void compare_state(const char* when) {
    const double rtol = sizeof(acc_t) == 8 ? 1e-11 : 2e-5;
    const double state_rtol = c_.is_rounded ? 0.0 : rtol;
    for (int i = 0; i < c_.num_tasks; ++i) {
      for (int64_t l = 0; l < num_tensors_; ++l) {
        for (int64_t k = 0; k < c_.numels[l]; ++k) {
          const int64_t at = i * padded_ + offsets_[l] + k;
          expect_close(c_, when, at, value_of(sq_grad_sum_[at]), reference_.S[i][l][k], state_rtol,
                       state_rtol);
          if (grad_mean_ != nullptr) {
            expect_close(c_, when, at, value_of(grad_mean_[at]), reference_.m[i][l][k], state_rtol,
                         state_rtol);
          }
        }
        for (int64_t k = offsets_[l] + c_.numels[l]; k < offsets_[l + 1]; ++k) {
          if (sq_grad_sum_[i * padded_ + k] != state_t(0)) {
            report(c_, "padding of the state was written, %s", when);
          }
        }
      }
      expect_close(c_, "excess_risk", i, state_.excess_risk[i], reference_.E[i], rtol, 0.0);
      expect_close(c_, "relative_excess_risk", i, state_.relative_excess_risk[i], reference_.R[i],
                   rtol, 0.0);
      expect_close(c_, "baseline_excess_risk", i, state_.baseline_excess_risk[i], reference_.B[i],
                   rtol, 0.0);
      expect_close(c_, "log_task_weights", i, state_.log_task_weights[i], reference_.log_w[i], rtol,
                   1e-4 * rtol / 2e-5);
      expect_close(c_, "task_weights", i, state_.task_weights[i], reference_.w[i], 10 * rtol, 0.0);
      if (state_.num_task_steps[i] != reference_.task_steps[i] ||
          state_.found_nonfinite[i] != reference_.flags[i]) {
        report(c_, "num_task_steps or found_nonfinite of task %d is wrong, %s", i, when);
      }
    }
    if (*state_.num_steps != reference_.steps || *state_.num_skipped_steps != reference_.skipped) {
      report(c_, "num_steps %lld or num_skipped_steps %lld is wrong, %s",
             static_cast<long long>(*state_.num_steps),
             static_cast<long long>(*state_.num_skipped_steps), when);
    }
  }

  void keep_state_bits() {
    keep_bits(sq_grad_sum_, c_.num_tasks * padded_);
    if (grad_mean_ != nullptr) {
      keep_bits(grad_mean_, c_.num_tasks * padded_);
    }
    keep_bits(state_.excess_risk, c_.num_tasks);
    keep_bits(state_.log_task_weights, c_.num_tasks);
    keep_bits(state_.task_weights, c_.num_tasks);
  }

  template <typename T>
  void keep_bits(const T* data, int64_t count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(data);
    bits_.insert(bits_.end(), bytes, bytes + count * sizeof(T));
  }

  const Case& c_;
  Reference reference_;
  int64_t num_tensors_, padded_ = 0, num_chunks_ = 0;
  std::vector<int64_t> offsets_;
  ParamChunks chunks_ = {};
  state_t* sq_grad_sum_;
  state_t* grad_mean_;
  TaskState state_ = {};
  unsigned* ticket_;
  unsigned* found_nonfinite_;
  double* partials_;
  double* risk_sums_;
  float* grad_scale_;
  std::vector<grad_t*> grads_, outputs_;
  unsigned long long* table_memory_;
  Grads raw_;
  std::vector<std::vector<double>> before_;  // the outputs
  std::vector<const void*> pointers_;
  TaskSet present_ = {};
  std::vector<uint8_t> bits_;
};

// The same case in one cooperative launch, where there is one: it has no split, its table holds kSmallTable pointers, and 512 blocks
// are more threads than a test can have. Two or more blocks per task where there are chunks for them.
bool has_one_launch(const Case& c) {
  const int64_t num_pointers = (c.num_tasks + 1) * static_cast<int64_t>(c.numels.size());
  return !c.split && c.num_tasks <= 64 &&
         (c.table == Table::kDevice || num_pointers <= kSmallTable);
}
Case in_one_launch(const Case& c) {
  Case one = c;
  one.name += ", one launch";
  one.one_launch = true;
  one.num_sms = std::max(c.num_sms, 1U);
  one.blocks_per_sm = std::max(4U, (c.num_tasks + one.num_sms - 1) / one.num_sms);
  return one;
}

template <typename grad_t, typename state_t>
void check(const Case& c, const char* type, int num_seeds) {
  std::vector<Case> variants = {c};
  if (!std::is_same_v<state_t, Accumulation<state_t>>) {
    variants[0].is_rounded = true;
    variants[0].momentum = c.momentum > 0.0 ? 0.5 : 0.0;  // with an exact inverse
  } else if (has_one_launch(c)) {
    variants.push_back(in_one_launch(c));
  }
  std::vector<uint8_t> first;
  for (Case& variant : variants) {
    variant.name += std::string(" ") + type;
    for (int seed = 1; seed <= num_seeds; ++seed) {
      simt::config().seed = static_cast<uint64_t>(seed) * 7919;
      const int failures_before = num_failures;
      std::vector<uint8_t> bits = Run<grad_t, state_t>(variant).execute();
      if (first.empty()) {
        first = std::move(bits);
      } else if (bits != first) {
        report(variant, "seed %d gives other bits", seed);
      }
      if (num_failures != failures_before) {
        return;
      }
    }
  }
}

std::vector<int64_t> many_tensors(int count) {
  std::vector<int64_t> numels;
  for (int k = 0; k < count; ++k) {
    numels.push_back(1 + k % 7);
  }
  return numels;
}

std::vector<Case> all_cases() {
#if defined(SIMT_OS_THREADS)
  // Two chunks per block, several blocks at once, more than one step; the kernels' code is all there is to see.
  return {
      {.name = "threads",
       .num_tasks = 2,
       .numels = {1100, 3, 40},
       .chunk_numel = 384,
       .num_steps = 2,
       .num_sms = 0},
      {.name = "threads momentum split",
       .num_tasks = 1,
       .numels = {1500, 5},
       .chunk_numel = 1024,
       .num_steps = 2,
       .momentum = 0.9,
       .split = true},
      {.name = "threads non-finite",
       .num_tasks = 2,
       .numels = {300},
       .chunk_numel = 288,
       .num_steps = 2,
       .nonfinite_step = 1,
       .in_place = true},
  };
#else
  const std::vector<int64_t> ragged = {5000, 7, 0, 33, 1023, 1024, 2500, 1, 4096 + 5, 2, 3, 64, 6};
  return {
      {.name = "one element", .num_tasks = 1, .numels = {1}},
      {.name = "one chunk", .num_tasks = 2, .numels = {1000}},
      {.name = "tails",
       .num_tasks = 1,
       .numels = {1025, 1026, 1027, 1028, 1029, 1030, 1031, 33, 34, 35, 36, 37, 38, 39}},
      {.name = "ragged", .num_tasks = 2, .numels = ragged},
      {.name = "ragged, misaligned, absent",
       .num_tasks = 7,
       .numels = ragged,
       .misaligned = true,
       .has_absent = true},
      {.name = "linear, momentum, warm-up",
       .num_tasks = 3,
       .numels = ragged,
       .num_steps = 5,
       .sqrt_fisher = false,
       .momentum = 0.9,
       .num_warmup_steps = 2,
       .misaligned = true,
       .has_absent = true},
      {.name = "sqrt, momentum, floor",
       .num_tasks = 3,
       .numels = {9000, 40},
       .momentum = 0.98,
       .min_weight = 0.05,
       .weight_total = 3.0},
      {.name = "not relative",
       .num_tasks = 2,
       .numels = {300},
       .sqrt_fisher = false,
       .num_warmup_steps = 0,
       .relative = false},
      {.name = "the last element not finite",
       .num_tasks = 2,
       .numels = {5003},
       .nonfinite_step = 1,
       .nonfinite_at = 5002},
      {.name = "one element past the batches not finite",
       .num_tasks = 2,
       .numels = {3072},
       .nonfinite_step = 1,
       .nonfinite_at = 2501},
      {.name = "grad_scale",
       .num_tasks = 2,
       .numels = {3000, 5},
       .momentum = 0.5,
       .grad_scale = 1024.0,
       .nonfinite_step = 2},
      {.name = "non-finite",
       .num_tasks = 3,
       .numels = ragged,
       .misaligned = true,
       .has_absent = true,
       .nonfinite_step = 2},
      {.name = "non-finite, momentum, in place",
       .num_tasks = 2,
       .numels = ragged,
       .num_steps = 5,
       .momentum = 0.9,
       .nonfinite_step = 2,
       .in_place = true},
      {.name = "non-finite at the first step",
       .num_tasks = 2,
       .numels = {700, 50},
       .nonfinite_step = 0},
      {.name = "in place", .num_tasks = 3, .numels = ragged, .misaligned = true, .in_place = true},
      {.name = "accumulate",
       .num_tasks = 3,
       .numels = ragged,
       .misaligned = true,
       .has_absent = true,
       .accumulate = true},
      {.name = "split",
       .num_tasks = 5,
       .numels = ragged,
       .has_absent = true,
       .nonfinite_step = 1,
       .split = true},
      {.name = "many chunks on few blocks",
       .num_tasks = 2,
       .numels = {9001, 37, 4000},
       .chunk_numel = 32,
       .num_steps = 3,
       .num_sms = 1},
      {.name = "many chunks, one task",
       .num_tasks = 1,
       .numels = {20000},
       .chunk_numel = 64,
       .num_steps = 3,
       .num_sms = 1},
      {.name = "device table",
       .num_tasks = 3,
       .numels = ragged,
       .misaligned = true,
       .has_absent = true,
       .table = Table::kDevice},
      {.name = "64 tasks", .num_tasks = 64, .numels = {100, 3}, .num_steps = 3, .has_absent = true},
      {.name = "512 tasks",
       .num_tasks = 512,
       .numels = {5},
       .num_steps = 3,
       .has_absent = true,
       .nonfinite_step = 2,  // the last task is absent in odd ones
       .nonfinite_at = 2},
      {.name = "large table",
       .num_tasks = 2,
       .numels = many_tensors(250),
       .chunk_numel = 1024,
       .num_steps = 2},
      {.name = "tables written in pieces",
       .num_tasks = 3,
       .numels = many_tensors(1400),
       .chunk_numel = 8192,
       .num_steps = 2,
       .table = Table::kDevice},
  };
#endif
}

// More tasks than blocks fit at once: the launch says so, and the op then takes two.
void expect_too_large_where_no_block_fits() {
  const Case c = {.name = "more tasks than blocks", .num_tasks = 3, .numels = {5}};
  simt::config().num_sms = 1;
  simt::config().blocks_per_sm = 2;
  StepCombineArgs<float> args = {};
  args.step.num_tasks = c.num_tasks;
  args.step.chunks.num_chunks = 1;
  const uint64_t before = simt::counters().launches;
  const cudaError_t status =
      launch_fused_step_combine<float, float>(true, false, 1, nullptr, args, {nullptr, 0, nullptr});
  if (status != cudaErrorCooperativeLaunchTooLarge || simt::counters().launches != before) {
    report(c, "a cooperative launch of 3 tasks on 2 blocks gave status %d", status);
  }
}

}  // namespace
}  // namespace excessmtl::cuda

int main(int argc, char** argv) {
  using namespace excessmtl::cuda;
  const int num_seeds = argc > 1 ? std::atoi(argv[1]) : 3;
  int num_cases = 0;
  expect_too_large_where_no_block_fits();
  for (const Case& c : all_cases()) {
    if (argc > 2 && std::find(argv + 2, argv + argc, c.name) == argv + argc) {
      continue;
    }
    if (num_failures != 0) {
      break;  // one failing case says enough
    }
    ++num_cases;
    check<float, float>(c, "float32", num_seeds);
#if !defined(NO_BFLOAT16_STATE)
    check<float, excessmtl::BFloat16Bits>(c, "float32 with bfloat16 state", num_seeds);
#endif
#if !defined(ONLY_FLOAT32)
    if (c.grad_scale ==
        0.0) {  // 1,024 times a normal number and its square leave float16; float32 shows the scale
      check<__half, float>(c, "float16", num_seeds);
    }
    check<double, double>(c, "float64", num_seeds);
    check<__nv_bfloat16, float>(c, "bfloat16", num_seeds);
    check<__nv_bfloat16, excessmtl::BFloat16Bits>(c, "bfloat16 with bfloat16 state", num_seeds);
#endif
  }
  const auto& n = simt::counters();
  std::printf(
      "%s: %d cases x %d schedules, %llu launches, %llu barriers, %llu shuffles, %d failures\n",
      num_failures == 0 ? "PASS" : "FAIL", num_cases, num_seeds,
      static_cast<unsigned long long>(n.launches), static_cast<unsigned long long>(n.barriers),
      static_cast<unsigned long long>(n.shuffles), num_failures);
  return num_failures == 0 ? 0 : 1;
}
