// fold_ on the CPU.
//
// Work:     item = chunk of kChunkNumel padded parameters.
// Traffic:  the gradient read once, the running sum read once and written once.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../op_arguments.h"
#include "../param_layout.h"
#include "chunks.h"

namespace excessmtl::cpu {
namespace {

template <typename acc_t>
void fold_as(const TaskGrads& grads, const ParamLayout& layout, const Tensor& running_sum,
             const std::vector<FoldFactors>& factors) {
  const FoldLoops<acc_t>& loops = fold_loops<acc_t>();
  acc_t* sums = running_sum.mutable_data_ptr<acc_t>();
  for_each_item(
      num_chunks(layout), std::min(layout.padded_numel(), kChunkNumel), [&](int64_t chunk) {
        for_each_slice(layout, chunk,
                       [&](int64_t segment, int64_t in_segment, int64_t position, int64_t count) {
                         const FoldFactors& own = factors[factors.size() == 1 ? 0 : segment];
                         const acc_t keep = static_cast<acc_t>(own.keep);
                         const acc_t add = static_cast<acc_t>(own.add);
                         if (grads.data[segment] != nullptr) {
                           loops.fold[grads.types[segment]](
                               advanced(grads.data[segment], grads.types[segment], in_segment),
                               keep, add, sums + position, count);
                         } else {
                           std::transform(sums + position, sums + position + count, sums + position,
                                          [keep](acc_t v) { return v * keep; });
                         }
                       });
      });
}

void fold(const FoldCall& call) {
  const double* const log_weights = call.log_weight.const_data_ptr<double>();
  double* const log_max = call.running_log_max.mutable_data_ptr<double>();
  std::vector<FoldFactors> factors(call.log_weight.numel());
  for (size_t k = 0; k < factors.size(); ++k) {
    factors[k] = fold_factors(log_weights[k], log_max[k]);
  }
  if (call.running_sum.scalar_type() == ScalarType::Double) {
    fold_as<double>(call.grads, call.layout, call.running_sum, factors);
  } else {
    fold_as<float>(call.grads, call.layout, call.running_sum, factors);
  }
  for (size_t k = 0; k < factors.size(); ++k) {
    log_max[k] = factors[k].log_max;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(excessmtl_ext, CPU, m) { m.impl("fold_", TORCH_BOX(&fold_entry<&fold>)); }

}  // namespace excessmtl::cpu
