#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/python.h"
#include "swiglu/swiglu.h"

namespace py = pybind11;

namespace moe_ep::swiglu {

void bind(py::module_& module) {
  module.def(
      "swiglu",
      [](Address gate_up, Address weights, DType dtype, int64_t rows, int64_t width, Address out,
         Address data, Address scale_inv, Address stream) {
        const Forward launch{pointer<void>(gate_up),
                             pointer<float>(weights),
                             dtype,
                             rows,
                             width,
                             pointer<void>(out),
                             pointer<uint8_t>(data),
                             pointer<float>(scale_inv),
                             pointer<CUstream_st>(stream)};
        run([&] { return forward(launch); });
      },
      py::kw_only(), py::arg("gate_up"), py::arg("weights"), py::arg("dtype"), py::arg("rows"),
      py::arg("width"), py::arg("out"), py::arg("data"), py::arg("scale_inv"), py::arg("stream"),
      "silu(gate) * up * weight: into out in dtype, or into data and scale_inv as FP8; the other 0.");
  module.def(
      "swiglu_backward",
      [](Address gate_up, Address weights, Address grad_out, DType dtype, int64_t rows, int64_t width,
         Address grad, Address data, Address scale_inv, Address grad_weights, Address stream) {
        const Backward launch{pointer<void>(gate_up),
                              pointer<float>(weights),
                              pointer<void>(grad_out),
                              dtype,
                              rows,
                              width,
                              pointer<void>(grad),
                              pointer<uint8_t>(data),
                              pointer<float>(scale_inv),
                              pointer<float>(grad_weights),
                              pointer<CUstream_st>(stream)};
        run([&] { return backward(launch); });
      },
      py::kw_only(), py::arg("gate_up"), py::arg("weights"), py::arg("grad_out"), py::arg("dtype"),
      py::arg("rows"), py::arg("width"), py::arg("grad"), py::arg("data"), py::arg("scale_inv"),
      py::arg("grad_weights"), py::arg("stream"),
      "The gradient of gate and up, into grad or as FP8, and of the weights (0: not wanted).");
}

}  // namespace moe_ep::swiglu
