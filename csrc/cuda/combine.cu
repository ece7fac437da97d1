// combine_ on CUDA: one launch, which reads on the device whether the step counts.
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

template <typename grad_t, typename acc_t>
cudaError_t launch_combine(const CombineArgs& args, const TensorPointers& tensors,
                           const LaunchScope& scope) {
  return launch_with_table(
      combine_kernel<grad_t, acc_t, kSmallTable>, combine_kernel<grad_t, acc_t, kLargeTable>,
      grid_of(args.chunks.num_chunks, 1, scope.num_sms), scope.stream, args, tensors);
}

void combine(CombineCall& call) { run_combine(call, LaunchScope(call.state.task_weights)); }

}  // namespace

void run_combine(CombineCall& call, const LaunchScope& scope) {
  STD_TORCH_CHECK(!call.state.per_tensor(), "Expected `task_weights` [T] on CUDA. excessmtl_ext.functional composes it.");
  const CombineState& state = call.state;
  const std::vector<Tensor>& outputs = call.outputs;
  TaskGrads& grads = call.grads;
  if (call.layout.padded_numel() == 0 || outputs.empty()) {
    return;
  }
  CommonType common;
  add_types(common, grads);
  for (const Tensor& output : outputs) {
    if (output.numel() > 0) {
      common.add(grad_type_of(output));
    }
  }
  const GradType type = common.get();
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
  const CombineArgs args = make_combine_args(plan_of(call, scope), state, true, call.accumulate);
  const auto launch_as = [&](auto launch) { return launch(args, tensors.get(), scope); };
  cudaError_t status = cudaSuccess;
  switch (type) {
    case kFloat64:
      status = launch_as(launch_combine<double, double>);
      break;
    case kFloat32:
      status = launch_as(launch_combine<float, float>);
      break;
    case kBFloat16:
      status = launch_as(launch_combine<__nv_bfloat16, float>);
      break;
    default:
      status = launch_as(launch_combine<__half, float>);
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
