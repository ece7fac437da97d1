// Which memory an op writes, and whether anything else that it takes lies there too.
//
// No op works in place on what it reads at another place, and the CPU threads and CUDA blocks of one write in any order: tensors
// that share memory would give results that nobody can foresee. What is written is sorted once; a look-up is a binary search.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace excessmtl {

struct Extent {
  uintptr_t begin;
  uintptr_t end;
  const char* name;
  int64_t index;  // which of `outputs`; -1 for a tensor of its own
};

inline Extent extent_of(const torch::stable::Tensor& tensor, const char* name, int64_t index = -1) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(tensor.numel() * tensor.element_size()), name,
          index};
}

inline void refuse_overlap(const Extent& a, const Extent& b) {
  const auto spelled = [](const Extent& extent) {
    std::string text = std::string("`") + extent.name + "`";
    return extent.index < 0 ? text : text + " " + std::to_string(extent.index);
  };
  STD_TORCH_CHECK(false, "Expected ", spelled(a), " and ", spelled(b),
                  " not to share memory. Pass a copy of one.");
}

class WrittenMemory {
 public:
  // Raises when two tensors that are written overlap.
  explicit WrittenMemory(std::vector<Extent> extents) : extents_(std::move(extents)) {
    std::erase_if(extents_, [](const Extent& extent) { return extent.begin == extent.end; });
    std::sort(extents_.begin(), extents_.end(),
              [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t k = 1; k < extents_.size(); ++k) {
      if (extents_[k].begin < extents_[k - 1].end) {
        refuse_overlap(extents_[k - 1], extents_[k]);
      }
    }
  }

  // The first extent that [begin, end) reaches into, or nullptr.
  const Extent* find(uintptr_t begin, uintptr_t end) const {
    const auto after =
        std::upper_bound(extents_.begin(), extents_.end(), begin,
                         [](uintptr_t at, const Extent& extent) { return at < extent.end; });
    return after != extents_.end() && after->begin < end ? &*after : nullptr;
  }

  void check_apart(const torch::stable::Tensor& tensor, const char* name) const {
    const Extent read = extent_of(tensor, name);
    const Extent* const written = find(read.begin, read.end);
    if (written != nullptr && read.begin < read.end) {
      refuse_overlap(read, *written);
    }
  }

 private:
  std::vector<Extent> extents_;  // in order, apart from each other
};

}  // namespace excessmtl
