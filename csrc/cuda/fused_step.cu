// fused_step_ and accumulate_excess_risk_ on CUDA: arguments in, one launch out. Never waits for the device.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../param_layout.h"
#include "fused_step_launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"

namespace excessmtl::cuda {

static_assert(kMaxTasks == excessmtl::kMaxTasks,
              "The kernels and the argument checks agree on the number of tasks.");

namespace {

// One launch for all present tasks. excess_risk_sum nullptr: the whole step, on `state`.
template <typename acc_t>
void launch_step(TaskGrads& grads, const ParamLayout& layout, const Tensor& chunk_map,
                 const std::optional<Tensor>& grad_scale, Tensor& sq_grad_sum, Tensor& grad_mean,
                 Tensor& ticket, double* excess_risk_sum, const TaskState& state,
                 const TaskOptions& task_options, bool sqrt_fisher, double eps,
                 const LaunchScope& scope) {
  const bool has_momentum = task_options.momentum > 0.0;
  CommonType common;
  common.add_state(sq_grad_sum.scalar_type());
  add_types(common, grads);
  convert_grads(grads, common.get());
  StepArgs<acc_t> args = {};
  args.chunks = read_chunk_map(chunk_map, layout, sq_grad_sum);
  args.grad_scale = read_grad_scale(grad_scale, sq_grad_sum);
  args.sq_grad_sum = sq_grad_sum.mutable_data_ptr<acc_t>();
  args.grad_mean = has_momentum ? grad_mean.mutable_data_ptr<acc_t>() : nullptr;
  args.row_stride = layout.padded_numel();
  Tensor partials = torch::stable::new_empty(
      sq_grad_sum, {grads.num_tasks() * args.chunks.num_chunks}, ScalarType::Double);
  args.partials = partials.mutable_data_ptr<double>();
  args.ticket = reinterpret_cast<unsigned*>(ticket.mutable_data_ptr<int32_t>());
  args.excess_risk_sum = excess_risk_sum;
  args.state = state;
  args.task_options = task_options;
  args.element_options = make_element_options<acc_t>(eps, task_options.momentum, 1.0);
  args.present = present_tasks(grads);
  args.num_tasks = static_cast<int>(grads.num_tasks());
  const DevicePointers pointers(grads.data, sq_grad_sum, scope);
  const dim3 grid = grid_of(args.chunks.num_chunks, grads.num_tasks(), scope.num_sms);
  cudaError_t status = cudaErrorInvalidValue;
  if constexpr (sizeof(acc_t) == sizeof(double)) {
    status = launch_fused_step<double, double>(sqrt_fisher, has_momentum, grid, scope.stream, args,
                                               pointers.get());
  } else if (common.get() == kFloat32) {
    status = launch_fused_step<float, float>(sqrt_fisher, has_momentum, grid, scope.stream, args,
                                             pointers.get());
  } else if (common.get() == kBFloat16) {
    status = launch_fused_step<__nv_bfloat16, float>(sqrt_fisher, has_momentum, grid, scope.stream,
                                                     args, pointers.get());
  } else {
    status = launch_fused_step<__half, float>(sqrt_fisher, has_momentum, grid, scope.stream, args,
                                              pointers.get());
  }
  if (status != cudaSuccess) {
    // A grid that stopped half-way leaves the ticket in between; the next launch must find 0. Its own error is beside the point.
    (void)cudaMemsetAsync(args.ticket, 0, sizeof(unsigned), scope.stream);
  }
  check_cuda(status, "The launch of the fused step");
}

template <class... Args>
void launch_step_for_state(const Tensor& sq_grad_sum, Args&&... args) {
  if (sq_grad_sum.scalar_type() == ScalarType::Double) {
    launch_step<double>(std::forward<Args>(args)...);
  } else {
    launch_step<float>(std::forward<Args>(args)...);
  }
}

void check_step_state(const Tensor& sq_grad_sum, const Tensor& grad_mean, const Tensor& ticket,
                      const ParamLayout& layout, double eps, double gradient_momentum) {
  check_state(sq_grad_sum, grad_mean, layout, gradient_momentum > 0.0);
  check_state_alignment(sq_grad_sum, "sq_grad_sum");
  check_state_alignment(grad_mean, "grad_mean");
  check_num_tasks(sq_grad_sum.size(0));
  check_element_options(eps, gradient_momentum);
  check_vector(ticket, "ticket", 1, ScalarType::Int, sq_grad_sum);
}

void accumulate_excess_risk_op(std::vector<Tensor> task_grads, Tensor param_numels,
                               Tensor chunk_map, std::optional<Tensor> grad_scale,
                               Tensor sq_grad_sum, Tensor grad_mean, Tensor excess_risk_sum,
                               Tensor ticket, bool sqrt_fisher, double eps,
                               double gradient_momentum) {
  const ParamLayout layout = read_param_layout(param_numels);
  check_step_state(sq_grad_sum, grad_mean, ticket, layout, eps, gradient_momentum);
  const int64_t num_tasks = sq_grad_sum.size(0);
  check_vector(excess_risk_sum, "excess_risk_sum", num_tasks, ScalarType::Double, sq_grad_sum);
  const LaunchScope scope(sq_grad_sum);
  TaskGrads grads = read_task_grads(std::move(task_grads), layout, num_tasks, sq_grad_sum);
  check_state_holds(grads, sq_grad_sum);
  if (!grads.any_present()) {
    return;
  }
  TaskOptions task_options = {};
  task_options.momentum = gradient_momentum;
  launch_step_for_state(sq_grad_sum, grads, layout, chunk_map, grad_scale, sq_grad_sum, grad_mean,
                        ticket, excess_risk_sum.mutable_data_ptr<double>(), TaskState{},
                        task_options, sqrt_fisher, eps, scope);
}

void fused_step_op(std::vector<Tensor> task_grads, Tensor param_numels, Tensor chunk_map,
                   std::optional<Tensor> grad_scale, Tensor sq_grad_sum, Tensor grad_mean,
                   Tensor excess_risk, Tensor relative_excess_risk, Tensor baseline_excess_risk,
                   Tensor log_task_weights, Tensor task_weights, Tensor num_steps,
                   Tensor num_task_steps, Tensor num_skipped_steps, Tensor found_nonfinite,
                   Tensor ticket, bool sqrt_fisher, double eps, double gradient_momentum,
                   double robust_step_size, int64_t num_warmup_steps, bool relative,
                   double min_weight, double weight_total) {
  const ParamLayout layout = read_param_layout(param_numels);
  check_step_state(sq_grad_sum, grad_mean, ticket, layout, eps, gradient_momentum);
  const int64_t num_tasks = sq_grad_sum.size(0);
  check_weight_options(robust_step_size, min_weight, weight_total, num_tasks);
  check_vector(excess_risk, "excess_risk", num_tasks, ScalarType::Double, sq_grad_sum);
  check_vector(relative_excess_risk, "relative_excess_risk", num_tasks, ScalarType::Double,
               sq_grad_sum);
  check_vector(baseline_excess_risk, "baseline_excess_risk", num_tasks, ScalarType::Double,
               sq_grad_sum);
  check_vector(log_task_weights, "log_task_weights", num_tasks, ScalarType::Double, sq_grad_sum);
  check_vector(task_weights, "task_weights", num_tasks, ScalarType::Double, sq_grad_sum);
  check_vector(num_steps, "num_steps", 1, ScalarType::Long, sq_grad_sum);
  check_vector(num_task_steps, "num_task_steps", num_tasks, ScalarType::Long, sq_grad_sum);
  check_vector(num_skipped_steps, "num_skipped_steps", 1, ScalarType::Long, sq_grad_sum);
  check_vector(found_nonfinite, "found_nonfinite", num_tasks, ScalarType::Bool, sq_grad_sum);
  const LaunchScope scope(sq_grad_sum);
  TaskGrads grads = read_task_grads(std::move(task_grads), layout, num_tasks, sq_grad_sum);
  check_state_holds(grads, sq_grad_sum);
  TaskState state = {};
  state.excess_risk = excess_risk.mutable_data_ptr<double>();
  state.relative_excess_risk = relative_excess_risk.mutable_data_ptr<double>();
  state.baseline_excess_risk = baseline_excess_risk.mutable_data_ptr<double>();
  state.log_task_weights = log_task_weights.mutable_data_ptr<double>();
  state.task_weights = task_weights.mutable_data_ptr<double>();
  state.num_steps = num_steps.mutable_data_ptr<int64_t>();
  state.num_task_steps = num_task_steps.mutable_data_ptr<int64_t>();
  state.num_skipped_steps = num_skipped_steps.mutable_data_ptr<int64_t>();
  state.found_nonfinite = found_nonfinite.mutable_data_ptr<bool>();
  if (!grads.any_present()) {
    // Nothing happened, so nothing was found; no kernel for that.
    check_cuda(cudaMemsetAsync(state.found_nonfinite, 0, num_tasks * sizeof(bool), scope.stream),
               "cudaMemsetAsync");
    return;
  }
  const double raw_risk_scale =
      sqrt_fisher || layout.num_params == 0 ? 1.0 : 1.0 / static_cast<double>(layout.num_params);
  const TaskOptions task_options = {gradient_momentum, num_warmup_steps, relative,
                                    raw_risk_scale,    robust_step_size, min_weight,
                                    weight_total};
  launch_step_for_state(sq_grad_sum, grads, layout, chunk_map, grad_scale, sq_grad_sum, grad_mean,
                        ticket, nullptr, state, task_options, sqrt_fisher, eps, scope);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fused_step_", TORCH_BOX(&fused_step_op));
  m.impl("accumulate_excess_risk_", TORCH_BOX(&accumulate_excess_risk_op));
}

}  // namespace excessmtl::cuda
