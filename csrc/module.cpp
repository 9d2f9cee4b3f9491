// The Python module moe_ep._C: bindings only. Everything it takes is an address, a size or a stream handle,
// so one build serves every version of torch, and imports on a machine with no GPU and no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "common/dtype.h"

namespace py = pybind11;

namespace moe_ep::fp8 {
void bind(py::module_& module);
}
namespace moe_ep::swiglu {
void bind(py::module_& module);
}
namespace moe_ep::grouped_gemm {
void bind(py::module_& module);
}
namespace moe_ep::router {
void bind(py::module_& module);
}
namespace moe_ep::nvlink {
void bind(py::module_& module);
}
namespace moe_ep::low_latency {
void bind(py::module_& module);
}
namespace moe_ep::on_stream {
void bind(py::module_& module);
}
namespace moe_ep::deep_ep {
void bind(py::module_& module);
}
namespace moe_ep::rank_layout {
void bind(py::module_& module);
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of moe_ep. Calls launch on the current device and on the given stream.";
  module.attr("__version__") = MOE_EP_VERSION;
  module.attr("ARCHS") = MOE_EP_CUDA_ARCHS;      // e.g. "90a": what the kernels were compiled for
  module.attr("CUDA_VERSION") = CUDART_VERSION;  // of the toolkit: 1000 * major + 10 * minor
  py::enum_<moe_ep::DType>(module, "DType")
      .value("float32", moe_ep::DType::float32)
      .value("float16", moe_ep::DType::float16)
      .value("bfloat16", moe_ep::DType::bfloat16);
  moe_ep::fp8::bind(module);
  moe_ep::swiglu::bind(module);
  py::module_ grouped_gemm =
      module.def_submodule("grouped_gemm", "A matrix product for each expert, by Transformer Engine.");
  moe_ep::grouped_gemm::bind(grouped_gemm);
  py::module_ router = module.def_submodule("router", "Experts and weights of tokens, from logits.");
  moe_ep::router::bind(router);
  py::module_ nvlink =
      module.def_submodule("nvlink", "Dispatch and combine between GPUs that reach each other's memory.");
  moe_ep::nvlink::bind(nvlink);
  py::module_ low_latency = module.def_submodule("low_latency", "The same for few tokens in fixed shapes.");
  moe_ep::low_latency::bind(low_latency);
  py::module_ on_stream =
      module.def_submodule("on_stream", "What streams do by themselves, without kernels.");
  moe_ep::on_stream::bind(on_stream);
  py::module_ deep_ep = module.def_submodule("deep_ep", "Numbers around the rows of deep_ep's calls.");
  moe_ep::deep_ep::bind(deep_ep);
  py::module_ rank_layout =
      module.def_submodule("rank_layout", "Rows of one token into rows of its experts, and back.");
  moe_ep::rank_layout::bind(rank_layout);
}
