// Module init of oss_ext._C.
//
// Loading the module registers the kernels of torch.ops.oss (each device's file ends with its own
// registrations); Python sees build_info() alone. Keep torch's headers out of this file: pybind11
// is slow enough to compile.

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

// What was built and what it runs on; documented in oss_ext/ops/native.py.
py::dict build_info() {
  py::list cpu_capabilities;
  cpu_capabilities.append("plain");
#ifdef OSS_HAVE_AVX2
  cpu_capabilities.append("avx2");
#endif
#ifdef OSS_HAVE_AVX512
  cpu_capabilities.append("avx512");
#endif

  py::dict info;
  info["version"] = OSS_VERSION;
  info["compiler"] = OSS_COMPILER;
  info["torch"] = OSS_TORCH_VERSION;
  info["cuda"] = OSS_CUDA;
  info["cuda_reason"] = OSS_CUDA_REASON;
  info["cuda_architectures"] = py::str(OSS_CUDA_ARCHITECTURES).attr("split")();
  info["cpu_capability"] = oss::cpu_capability();
  info["cpu_capabilities"] = cpu_capabilities;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of oss_ext; loading this module registers them with torch.";
  module.def("build_info", &build_info, "What was built and what it runs on, as a dict.");
}
