// The Python module moe_ep._C: bindings only. Everything it takes is an address, a size or a stream handle,
// so one build serves every version of torch, and imports on a machine with no GPU and no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "common/dtype.h"
#include "common/status.h"
#include "fp8/dequantize_rowwise.h"
#include "fp8/quantize_rowwise.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;  // tensor.data_ptr(), stream.cuda_stream

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_unless_ok(const moe_ep::Status& status) {
  switch (status.code()) {
    case moe_ep::Status::Code::ok:
      return;
    case moe_ep::Status::Code::invalid_argument:
      throw py::value_error(status.message());
    case moe_ep::Status::Code::cuda_error:
      throw std::runtime_error(status.message());
  }
}

// Runs a launch without the GIL; its failure becomes a ValueError or a RuntimeError.
template <typename Launch>
void run(Launch&& launch) {
  moe_ep::Status status = moe_ep::Status::ok();
  {
    py::gil_scoped_release release;
    status = launch();
  }
  raise_unless_ok(status);
}

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
}
