// The Python module moe_ep._C: bindings only. Everything it takes is an address, a size or a stream handle,
// so one build serves every version of torch, and imports on a machine with no GPU and no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/python.h"
#include "fp8/dequantize_rowwise.h"
#include "fp8/quantize_rowwise.h"

namespace py = pybind11;

namespace moe_ep::nvlink {
void bind(py::module_& module);
}

namespace {

using moe_ep::Address;
using moe_ep::pointer;
using moe_ep::run;

void bind_fp8(py::module_& module) {
  using namespace moe_ep;
  module.def(
      "quantize_rowwise",
      [](Address x, DType dtype, int64_t rows, int64_t cols, Address data, Address scale_inv,
         Address stream) {
        const fp8::QuantizeRowwise launch{pointer<void>(x),
                                          dtype,
                                          rows,
                                          cols,
                                          pointer<uint8_t>(data),
                                          pointer<float>(scale_inv),
                                          pointer<CUstream_st>(stream)};
        run([&] { return fp8::quantize_rowwise(launch); });
      },
      py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("data"), py::arg("scale_inv"),
      py::arg("stream"),
      "FP8 E4M3 bytes [rows, cols] and float32 scales [rows, ceil(cols / 128)] of the contiguous matrix x.");
  module.def(
      "dequantize_rowwise",
      [](Address data, Address scale_inv, int64_t rows, int64_t cols, Address out, DType dtype,
         Address stream) {
        const fp8::DequantizeRowwise launch{
            pointer<uint8_t>(data),      pointer<float>(scale_inv), rows, cols, pointer<void>(out), dtype,
            pointer<CUstream_st>(stream)};
        run([&] { return fp8::dequantize_rowwise(launch); });
      },
      py::arg("data"), py::arg("scale_inv"), py::arg("rows"), py::arg("cols"), py::arg("out"),
      py::arg("dtype"), py::arg("stream"),
      "The matrix that data and scale_inv stand for, rounded once to dtype.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of moe_ep. Calls launch on the current device and on the given stream.";
  module.attr("__version__") = MOE_EP_VERSION;
  module.attr("ARCHS") = MOE_EP_CUDA_ARCHS;      // e.g. "90a": what the kernels were compiled for
  module.attr("CUDA_VERSION") = CUDART_VERSION;  // of the toolkit: 1000 * major + 10 * minor
  py::enum_<moe_ep::DType>(module, "DType")
      .value("float32", moe_ep::DType::float32)
      .value("float16", moe_ep::DType::float16)
      .value("bfloat16", moe_ep::DType::bfloat16);
  bind_fp8(module);
  py::module_ nvlink =
      module.def_submodule("nvlink", "Dispatch and combine between GPUs that reach each other's memory.");
  moe_ep::nvlink::bind(nvlink);
}
