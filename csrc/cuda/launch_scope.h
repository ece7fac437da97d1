// Device, stream and errors of an op: the only place that asks torch about CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace excessmtl::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status), ".");
}

// While it lives, the device of a tensor is the current one, and `stream` is torch's current stream there.
class LaunchScope {
 public:
#if defined(__CUDACC__)
  explicit LaunchScope(const torch::stable::Tensor& tensor) : guard_(cuda_index_of(tensor)) {
    device = tensor.get_device_index();
    // This library carries a CUDA runtime of its own (static), which has to hear of the device too.
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    num_sms = attribute(cudaDevAttrMultiProcessorCount);
#if TORCH_FEATURE_VERSION >= 0x020d000000000000ULL  // 2.13; older headers have no name for it
    stream = static_cast<cudaStream_t>(
        torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
    // A symbol of libtorch_cuda: a build for these versions needs a CUDA build of torch.
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
#endif
  }
#else
  // The tests' host build runs the ops on CPU tensors: no device to choose.
  explicit LaunchScope(const torch::stable::Tensor&) : num_sms(static_cast<int>(simt::num_sms())) {}
#endif

  bool can_launch_cooperatively() const { return attribute(cudaDevAttrCooperativeLaunch) != 0; }
  int64_t l2_bytes() const { return attribute(cudaDevAttrL2CacheSize); }

  cudaStream_t stream = nullptr;
  int32_t device = 0;
  int num_sms = 0;

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
  }

#if defined(__CUDACC__)
  // One CUDA tensor among CPU tensors is enough to be sent here.
  static int32_t cuda_index_of(const torch::stable::Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "Expected the state on a CUDA device, like the gradients.");
    return tensor.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace excessmtl::cuda
