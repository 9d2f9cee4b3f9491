#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "common/python.h"
#include "grouped_gemm/grouped_gemm.h"
#include "grouped_gemm/te_api.h"

namespace py = pybind11;

namespace moe_ep::grouped_gemm {

void bind(py::module_& module) {
  py::enum_<Form>(module, "Form")
      .value("rows", Form::rows)
      .value("columns", Form::columns)
      .value("column_tiles", Form::column_tiles)
      .value("weights", Form::weights);
  py::enum_<Product>(module, "Product")
      .value("rows_by_weights", Product::rows_by_weights)
      .value("rows_by_transposed_weights", Product::rows_by_transposed_weights)
      .value("columns_by_columns", Product::columns_by_columns);
  py::class_<Matrices>(module, "Matrices", "Matrices of all experts, one behind the other.")
      .def(py::init([](Form form, Address data, Address scales, DType dtype, int64_t width, int64_t height,
                       int64_t scale_width, const std::vector<Address>& places) {
             Matrices matrices{form,   pointer<void>(data), pointer<float>(scales), dtype, width,
                               height, scale_width};
             for (const Address place : places) matrices.places.push_back(pointer<void>(place));
             return matrices;
           }),
           py::kw_only(), py::arg("form"), py::arg("data"), py::arg("scales"), py::arg("dtype"),
           py::arg("width"), py::arg("height"), py::arg("scale_width"), py::arg("places"));
  module.def(
      "is_there", [] { return te_api() != nullptr; }, "Whether Transformer Engine's C interface is loaded.");
  module.def(
      "multiply",
      [](Product product, const Matrices& a, const Matrices& b, const Matrices& out, bool adds,
         const std::vector<int64_t>& rows, Address workspace, int64_t workspace_bytes, Address stream) {
        const Call call{product,
                        a,
                        b,
                        out,
                        adds,
                        rows,
                        pointer<void>(workspace),
                        workspace_bytes,
                        pointer<CUstream_st>(stream)};
        run([&] { return multiply(call); });
      },
      py::kw_only(), py::arg("product"), py::arg("a"), py::arg("b"), py::arg("out"), py::arg("adds"),
      py::arg("rows"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("stream"),
      "One product for each expert; see csrc/grouped_gemm/grouped_gemm.h.");
}

}  // namespace moe_ep::grouped_gemm
