#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/python.h"
#include "fp8/dequantize_rowwise.h"
#include "fp8/quantize_blocks.h"
#include "fp8/quantize_rowwise.h"
#include "fp8/requantize.h"
#include "fp8/transpose_scales.h"

namespace py = pybind11;

namespace moe_ep::fp8 {
namespace {

Experts experts_of(Address counts, int num_experts, int64_t rows) {
  return {pointer<const int64_t>(counts), num_experts, rows};
}

void def_requantize(py::module_& module, const char* name, Status (*function)(const Requantize&),
                    const char* documentation) {
  module.def(
      name,
      [function](Address data, Address scale_inv, int64_t rows, int64_t cols, Address counts, int num_experts,
                 Address out, Address out_scale_inv, Address stream) {
        const Requantize launch{pointer<uint8_t>(data),
                                pointer<float>(scale_inv),
                                cols,
                                experts_of(counts, num_experts, rows),
                                pointer<uint8_t>(out),
                                pointer<float>(out_scale_inv),
                                pointer<CUstream_st>(stream)};
        run([&] { return function(launch); });
      },
      py::kw_only(), py::arg("data"), py::arg("scale_inv"), py::arg("rows"), py::arg("cols"),
      py::arg("counts"), py::arg("num_experts"), py::arg("out"), py::arg("out_scale_inv"), py::arg("stream"),
      documentation);
}

}  // namespace

void bind(py::module_& module) {
  module.def(
      "quantize_rowwise",
      [](Address x, DType dtype, int64_t rows, int64_t cols, Address data, Address scale_inv,
         Address stream) {
        const QuantizeRowwise launch{pointer<void>(x),
                                     dtype,
                                     rows,
                                     cols,
                                     pointer<uint8_t>(data),
                                     pointer<float>(scale_inv),
                                     pointer<CUstream_st>(stream)};
        run([&] { return quantize_rowwise(launch); });
      },
      py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("data"), py::arg("scale_inv"),
      py::arg("stream"),
      "FP8 E4M3 bytes [rows, cols] and float32 scales [rows, ceil(cols / 128)] of the contiguous matrix x.");
  module.def(
      "dequantize_rowwise",
      [](Address data, Address scale_inv, int64_t rows, int64_t cols, Address out, DType dtype,
         Address stream) {
        const DequantizeRowwise launch{
            pointer<uint8_t>(data),      pointer<float>(scale_inv), rows, cols, pointer<void>(out), dtype,
            pointer<CUstream_st>(stream)};
        run([&] { return dequantize_rowwise(launch); });
      },
      py::arg("data"), py::arg("scale_inv"), py::arg("rows"), py::arg("cols"), py::arg("out"),
      py::arg("dtype"), py::arg("stream"),
      "The matrix that data and scale_inv stand for, rounded once to dtype.");
  module.def(
      "quantize_blocks",
      [](Address x, DType dtype, int64_t matrices, int64_t rows, int64_t cols, Address data,
         Address scale_inv, int64_t scale_stride, Address transposed, Address transposed_scale_inv,
         int64_t transposed_scale_stride, Address stream) {
        QuantizeBlocks launch{};
        launch.x = pointer<void>(x);
        launch.dtype = dtype;
        launch.matrices = matrices;
        launch.rows = rows;
        launch.cols = cols;
        launch.data = pointer<uint8_t>(data);
        launch.scale_inv = pointer<float>(scale_inv);
        launch.scale_stride = scale_stride;
        launch.transposed = pointer<uint8_t>(transposed);
        launch.transposed_scale_inv = pointer<float>(transposed_scale_inv);
        launch.transposed_scale_stride = transposed_scale_stride;
        launch.stream = pointer<CUstream_st>(stream);
        run([&] { return quantize_blocks(launch); });
      },
      py::kw_only(), py::arg("x"), py::arg("dtype"), py::arg("matrices"), py::arg("rows"), py::arg("cols"),
      py::arg("data"), py::arg("scale_inv"), py::arg("scale_stride"), py::arg("transposed"),
      py::arg("transposed_scale_inv"), py::arg("transposed_scale_stride"), py::arg("stream"),
      "128x128 blocks of matrices, in FP8 E4M3 with a float32 scale each; as they are, transposed, or both.");
  def_requantize(module, "requantize_columns", requantize_columns,
                 "From rows quantised in 1x128 blocks to columns of each expert's rows in blocks of 128.");
  def_requantize(module, "requantize_tiles", requantize_tiles,
                 "From rows quantised in 1x128 blocks to columns of each expert's rows in tiles of 128x128.");
  module.def(
      "transpose_scales",
      [](Address scale_inv, int64_t rows, int64_t blocks, Address counts, int num_experts, Address out,
         Address stream) {
        const TransposeScales launch{pointer<float>(scale_inv), blocks, experts_of(counts, num_experts, rows),
                                     pointer<float>(out), pointer<CUstream_st>(stream)};
        run([&] { return transpose_scales(launch); });
      },
      py::kw_only(), py::arg("scale_inv"), py::arg("rows"), py::arg("blocks"), py::arg("counts"),
      py::arg("num_experts"), py::arg("out"), py::arg("stream"),
      "Scales [rows, blocks] as a matrix [blocks, rows of the expert] for each expert.");
}

}  // namespace moe_ep::fp8
