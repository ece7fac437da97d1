// excessmtl_ext._C: what the ops library beside it was built with. No op lives here: ops go through the dispatcher
// (ops.cpp), which keeps them free of Python; this module is the only one tied to a Python version.

#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of excessmtl_ext._ops.";
  module.def("build_facts", [] {
    namespace py = pybind11;
    py::dict facts;
    facts["has_cuda"] = bool(EXCESSMTL_HAS_CUDA);
    facts["cuda_version"] = EXCESSMTL_CUDA_VERSION;
    facts["cuda_architectures"] = EXCESSMTL_CUDA_ARCHITECTURES;
    facts["torch_version"] = EXCESSMTL_TORCH_VERSION;
    facts["torch_target_version"] = EXCESSMTL_TORCH_TARGET;
    facts["compiler"] = EXCESSMTL_COMPILER;
    facts["cuda_decision"] = EXCESSMTL_CUDA_DECISION;
    facts["source_digest"] = EXCESSMTL_SOURCE_DIGEST;
    return facts;
  });
}
