// The CUDA ops as CPU ops: their host code and their kernels, unmodified, over simt.h. For tests that call torch.ops.
#include "cuda_runtime.h"
//
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// From here on the dispatch key of the registrations; torch's own headers are behind us.
#define CUDA CPU

#include "../../csrc/cuda/accumulate_excess_risk.cu"
#include "../../csrc/cuda/combine.cu"
#include "../../csrc/cuda/fold.cu"
#include "../../csrc/cuda/fused_step.cu"
#include "../../csrc/cuda/fused_step_combine.cu"
#include "../../csrc/cuda/update_task_risks.cu"
#include "../../csrc/cuda/update_task_weights.cu"
#include "../../csrc/ops.cpp"

extern "C" __attribute__((visibility("default"))) void simt_configure(uint64_t seed,
                                                                      unsigned max_resident,
                                                                      double yield_probability,
                                                                      unsigned num_sms) {
  simt::config() = {seed, max_resident, yield_probability, num_sms};
}
extern "C" __attribute__((visibility("default"))) void simt_configure_device(
    unsigned blocks_per_sm, unsigned l2_bytes, bool launches_cooperatively) {
  simt::config().blocks_per_sm = blocks_per_sm;
  simt::config().l2_bytes = l2_bytes;
  simt::config().launches_cooperatively = launches_cooperatively;
}
extern "C" __attribute__((visibility("default"))) uint64_t simt_num_launches() {
  return simt::counters().launches;
}
