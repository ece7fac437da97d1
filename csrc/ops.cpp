// The schemas of torch.ops.excessmtl_ext, and nothing else. Each backend registers its kernels in its own files.
//
// T tasks, L shared parameters of n_l elements each. task_grads: T * L tensors, task-major; one without elements where n_l > 0
// stands for "no gradient". State is flat [T, padded P]: every parameter's segment is padded to kSegmentAlignment elements.
// bfloat16 state is rounded stochastically: rounding_seed, the step (num_steps) and the row's task, counted from first_task, say how.
// A step with a gradient that is not finite writes no state.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {

// How the gradients lie, what CUDA launches, and by what a GradScaler multiplied them.
const std::string kPlan = "Tensor param_numels, Tensor chunk_map, Tensor? grad_scale, ";

// The numbers per task, and the counters of steps.
const std::string kTaskState = R"(
  Tensor(c!) excess_risk,
  Tensor(d!) relative_excess_risk,
  Tensor(e!) baseline_excess_risk,
  Tensor(f!) log_task_weights,
  Tensor(g!) task_weights,
  Tensor(h!) num_steps,
  Tensor(i!) num_task_steps,
  Tensor(j!) num_skipped_steps,
  Tensor(k!) found_nonfinite)";

// StepTensors and StepChoices in step_state.h.
const std::string kState = R"(
  Tensor(a!) sq_grad_sum,
  Tensor(b!) grad_mean,)" + kTaskState +
                           R"(,
  Tensor(l!) ticket)";
const std::string kChoices = R"(
  bool sqrt_fisher,
  float eps,
  float gradient_momentum,
  float robust_step_size,
  int num_warmup_steps,
  bool relative,
  float min_weight,
  float weight_total)";
const std::string kLateChoices = R"(
  int rounding_seed=0)";

// MoveArguments in move_arguments.h: of weights within bounds and gradients at one size; the state all or none.
const std::string kMoves = R"(
  Tensor(n!)? risk_share_sum=None,
  Tensor(o!)? num_gradient_steps=None,
  Tensor(p!)? momentum_mass=None,
  Tensor(q!)? momentum_sq_mass=None,
  Tensor(r!)? tensor_mean_square=None,
  Tensor(s!)? num_tensor_steps=None,
  Tensor(t!)? tensor_weights=None,
  Tensor? log_priorities=None,
  Tensor? weight_floors=None,
  float? max_log_ratio=None,
  bool per_tensor=False)";

// Of state that is given without the step it belongs to; only bfloat16 needs them.
const std::string kRounding = R"(
  Tensor? num_steps=None,
  Tensor? num_skipped_steps=None,
  int rounding_seed=0,
  int first_task=0)";

}  // namespace

STABLE_TORCH_LIBRARY(excessmtl_ext, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };

  // One step: S += g * g, excess risks, baseline, weights. Two launches on CUDA: a look for gradients that are not finite, the step.
  define("fused_step_(Tensor[] task_grads, " + kPlan + kState + ", *, " + kChoices + ", " +
         kLateChoices + ", " + kMoves + ") -> ()");

  // fused_step_, then combine_ with its weights: one launch of both on CUDA where the gradients stay in the L2 cache.
  define("fused_step_combine_(Tensor[] task_grads, Tensor(m!)[] outputs, " + kPlan + kState +
         ", *, " + kChoices + ", bool accumulate, " + kLateChoices + ", " + kMoves + ") -> ()");

  // The three parts of fused_step_, for streaming and for sums over ranks in between. known_nonfinite [R]: where gradients of any
  // rank are not finite; without it the op looks at its own.
  define("accumulate_excess_risk_(Tensor[] task_grads, " + kPlan + R"(
      Tensor(a!) sq_grad_sum,
      Tensor(b!) grad_mean,
      Tensor(c!) excess_risk_sum,
      Tensor(d!) ticket,
      *,
      bool sqrt_fisher,
      float eps,
      float gradient_momentum, )" +
         kRounding + ", Tensor? known_nonfinite=None, Tensor(e!)? square_sums=None) -> ()");
  define(R"(update_task_risks_(
      Tensor excess_risk_sum,
      int[] tasks,
      Tensor(a!) excess_risk,
      Tensor(b!) relative_excess_risk,
      Tensor(c!) baseline_excess_risk,
      Tensor num_steps,
      Tensor(d!) num_task_steps,
      Tensor(e!) found_nonfinite,
      *,
      float gradient_momentum,
      int num_warmup_steps,
      bool relative,
      float raw_risk_scale) -> ())");
  define(R"(update_task_weights_(
      int[] tasks,
      Tensor relative_excess_risk,
      Tensor(a!) log_task_weights,
      Tensor(b!) task_weights,
      Tensor(c!) num_steps,
      Tensor(d!) num_skipped_steps,
      Tensor found_nonfinite,
      *,
      float robust_step_size,
      int num_warmup_steps,
      float min_weight,
      float weight_total) -> ())");

  // What update_task_risks_ and update_task_weights_ do, and the state of kMoves: from the sums of a step to weights and factors.
  // Without sums: the weights alone. With risk_share [T] the shares of signal go there and not into their sum.
  define(R"(commit_step_(
      Tensor? excess_risk_sum,
      Tensor? square_sums,
      int[] tasks,
      Tensor param_numels,
      Tensor chunk_map, )" +
         kTaskState + R"(,
      Tensor(u!)? risk_share,
      *,
      float gradient_momentum,
      float robust_step_size,
      int num_warmup_steps,
      bool relative,
      float raw_risk_scale,
      float min_weight,
      float weight_total,
      bool moves_weights, )" +
         kMoves + ") -> ()");

  // outputs (+)= sum_i task_weights_i * task_grads_i, with weights [T] or, one per tensor, [T, L]; after a non-finite step: NaN.
  // State is not used.
  define("combine_(Tensor[] task_grads, Tensor(a!)[] outputs, " + kPlan + R"(
      Tensor task_weights,
      Tensor found_nonfinite,
      Tensor(b!) sq_grad_sum,
      Tensor(c!) grad_mean,
      *,
      float gradient_momentum,
      bool accumulate, )" +
         kRounding + ") -> ()");

  // Streaming: running_sum (+)= exp(log_weight) * task_grads of one task, kept relative to the largest log-weight so far; [] or,
  // one per tensor, [L].
  define(R"(fold_(
      Tensor[] task_grads,
      Tensor param_numels,
      Tensor chunk_map,
      Tensor log_weight,
      Tensor(a!) running_sum,
      Tensor(b!) running_log_max) -> ())");

  // Which of the CPU code paths this machine runs: "avx512", "avx2" or "default".
  define("cpu_capability() -> str");
}
