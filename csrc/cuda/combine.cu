// combine_ on CUDA: one launch, which reads on the device whether it combines or repairs.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "combine.cuh"
#include "launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"
#include "step_phases.h"

namespace excessmtl::cuda {
namespace {

template <typename grad_t, typename state_t>
cudaError_t launch_combine(const CombineArgs<state_t>& args, const TensorPointers& tensors,
                           const LaunchScope& scope) {
  return launch_with_table(
      combine_kernel<grad_t, state_t, kSmallTable>, combine_kernel<grad_t, state_t, kLargeTable>,
      grid_of(args.chunks.num_chunks, 1, scope.num_sms), scope.stream, args, tensors);
}

void combine(CombineCall& call) { run_combine(call, LaunchScope(call.state.task_weights)); }

}  // namespace

void run_combine(CombineCall& call, const LaunchScope& scope) {
  const CombineState& state = call.state;
  const std::vector<Tensor>& outputs = call.outputs;
  TaskGrads& grads = call.grads;
  CommonType common;
  if (state.has_rows()) {
    common.add_state(state.sq_grad_sum.scalar_type());
  }
  add_types(common, grads);
  bool exceeds_state = false;
  for (const Tensor& output : outputs) {
    if (output.numel() > 0) {
      const GradType type = grad_type_of(output);
      common.add(type);
      exceeds_state = exceeds_state || (state.has_rows() && type == kFloat64 &&
                                        state.sq_grad_sum.scalar_type() != ScalarType::Double);
    }
  }
  if (exceeds_state) {
    // float64 outputs beside narrower state: no kernel has both types, so the repair and the sum are a launch each.
    CombineCall repair = call;
    repair.outputs.clear();
    run_combine(repair, scope);
    const Tensor no_rows = torch::stable::new_empty(state.task_weights, {grads.num_tasks(), 0});
    call.state = {state.task_weights, state.found_nonfinite, no_rows, no_rows, 0.0, {}};
    run_combine(call, scope);
    return;
  }
  if (call.layout.padded_numel() == 0 || (outputs.empty() && !state.has_rows())) {
    return;
  }
  const bool is_rounded =
      state.has_rows() && state.sq_grad_sum.scalar_type() == ScalarType::BFloat16;
  const GradType type = launch_type(common, state.sq_grad_sum);
  convert_grads(grads, type);

  // An output of another type than the launch's is written to a copy in that type first, then rounded once.
  std::vector<Tensor> targets = outputs;
  std::vector<const void*> pointers = grads.data;
  for (Tensor& target : targets) {
    if (target.numel() > 0 && target.scalar_type() != kScalarTypes[type]) {
      target = torch::stable::to(target, kScalarTypes[type]);
    }
    pointers.push_back(target.numel() > 0 ? target.mutable_data_ptr() : nullptr);
  }
  const DevicePointers tensors(std::move(pointers), state.task_weights, scope);
  const auto launch_as = [&](auto grad, auto element_of_state) {
    using state_t = decltype(element_of_state);
    return launch_combine<decltype(grad)>(
        make_combine_args<state_t>(plan_of(call, scope), state, !outputs.empty(), call.accumulate),
        tensors.get(), scope);
  };
  cudaError_t status = cudaSuccess;
  switch (type) {
    case kFloat64:
      status = launch_as(double{}, double{});
      break;
    case kFloat32:
      status = is_rounded ? launch_as(float{}, BFloat16Bits{}) : launch_as(float{}, float{});
      break;
    case kBFloat16:
      status = is_rounded ? launch_as(__nv_bfloat16{}, BFloat16Bits{})
                          : launch_as(__nv_bfloat16{}, float{});
      break;
    default:
      status = launch_as(__half{}, float{});
      break;
  }
  check_cuda(status, "The launch of combine_");
  for (size_t index = 0; index < outputs.size(); ++index) {
    if (targets[index].get() != outputs[index].get()) {
      Tensor output = outputs[index];
      torch::stable::copy_(output, targets[index]);
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("combine_", TORCH_BOX(&combine_entry<&combine>));
}

}  // namespace excessmtl::cuda
