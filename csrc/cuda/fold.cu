// fold_ on CUDA: the sum in one launch, then its largest log-weight in another.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "fold.cuh"
#include "launch.cuh"
#include "launch_scope.h"
#include "launch_tensors.h"

namespace excessmtl::cuda {
namespace {

template <typename grad_t, typename acc_t>
cudaError_t launch_fold(const ParamChunks& chunks, const Tensor& log_weight, Tensor& running_sum,
                        const Tensor& running_log_max, const TensorPointers& grads,
                        const LaunchScope& scope) {
  const FoldArgs<acc_t> args = {chunks, log_weight.const_data_ptr<double>(),
                                running_log_max.const_data_ptr<double>(),
                                running_sum.mutable_data_ptr<acc_t>(), running_sum.numel()};
  return launch_with_table(fold_kernel<grad_t, acc_t, kSmallTable>,
                           fold_kernel<grad_t, acc_t, kLargeTable>,
                           grid_of(chunks.num_chunks, 1, scope.num_sms), scope.stream, args, grads);
}

void fold(FoldCall& call) {
  STD_TORCH_CHECK(!call.per_tensor(), "Expected `log_weight` [] on CUDA. excessmtl_ext.functional composes it.");
  const Tensor& log_weight = call.log_weight;
  Tensor& running_sum = call.running_sum;
  const Tensor& running_log_max = call.running_log_max;
  TaskGrads& grads = call.grads;
  check_state_alignment(running_sum, "running_sum");
  const LaunchScope scope(running_sum);
  CommonType common;
  common.add_state(running_sum.scalar_type());
  add_types(common, grads);
  convert_grads(grads, common.get());
  const ParamChunks chunks = read_chunk_map(call.chunk_map, call.layout, running_sum);
  if (chunks.num_chunks > 0) {
    const DevicePointers pointers(grads.data, running_sum, scope);
    const auto launch_as = [&](auto launch) {
      check_cuda(launch(chunks, log_weight, running_sum, running_log_max, pointers.get(), scope),
                 "The launch of fold_");
    };
    switch (common.get()) {
      case kFloat64:
        launch_as(launch_fold<double, double>);
        break;
      case kFloat32:
        launch_as(launch_fold<float, float>);
        break;
      case kBFloat16:
        launch_as(launch_fold<__nv_bfloat16, float>);
        break;
      default:
        launch_as(launch_fold<__half, float>);
        break;
    }
  }
  check_cuda(
      launch(update_log_max_kernel, dim3(1), 1, scope.stream, log_weight.const_data_ptr<double>(),
             running_log_max.mutable_data_ptr<double>()),
      "The launch of fold_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CUDA, m) {
  m.impl("fold_", TORCH_BOX(&fold_entry<&fold>));
}

}  // namespace excessmtl::cuda
