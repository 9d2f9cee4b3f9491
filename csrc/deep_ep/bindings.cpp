// moe_ep._C.deep_ep
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/python.h"
#include "deep_ep/columns.h"
#include "deep_ep/layout.h"

namespace py = pybind11;

namespace moe_ep::deep_ep {
namespace {

// Address, type, and the steps between rows and between columns, in elements.
using PyNumbers = std::tuple<Address, Number, int64_t, int64_t>;
// from, to, ids, rows, rows of `to`, width, how, first, count.
using PyColumn = std::tuple<PyNumbers, PyNumbers, PyNumbers, int64_t, int64_t, int, How, int, int>;

Numbers numbers_of(const PyNumbers& given) {
  const auto& [at, type, row_step, column_step] = given;
  return {pointer<void>(at), type, row_step, column_step};
}

void fill(const std::vector<PyColumn>& columns, Address stream) {
  if (columns.size() > kMaxColumns) {
    throw py::value_error("there are " + std::to_string(columns.size()) + " columns; one call fills up to " +
                          std::to_string(kMaxColumns));
  }
  FillColumns launch{};
  for (const PyColumn& given : columns) {
    const auto& [from, to, ids, rows, to_rows, width, how, first, count] = given;
    launch.columns[launch.num_columns++] = {
        numbers_of(from), numbers_of(to), numbers_of(ids), rows, to_rows, width, how, first, count};
  }
  launch.stream = pointer<CUstream_st>(stream);
  run([&] { return fill_columns(launch); });
}

}  // namespace

void bind(py::module_& module) {
  module.attr("MAX_COLUMNS") = kMaxColumns;
  module.attr("MAX_LAYOUT_RANKS") = kMaxLayoutRanks;
  module.attr("MAX_LAYOUT_COUNTS") = kMaxLayoutCounts;
  py::enum_<Number>(module, "Number")
      .value("int32", Number::int32)
      .value("int64", Number::int64)
      .value("uint8", Number::uint8);
  py::enum_<How>(module, "How")
      .value("copy", How::copy)
      .value("next", How::next)
      .value("place", How::place)
      .value("local", How::local)
      .value("masked", How::masked);
  module.def("fill_columns", &fill, py::arg("columns"), py::arg("stream"),
             "Columns are tuples of the members of csrc/deep_ep/columns.h's Column, in their order.");
  module.def(
      "dispatch_layout",
      [](Address topk_idx, bool is_int64, int64_t num_tokens, int num_topk, int num_ranks, int num_experts,
         int num_nodes, Address counts, Address is_token_in_rank, Address stream) {
        const DispatchLayout launch{pointer<void>(topk_idx),
                                    is_int64,
                                    num_tokens,
                                    num_topk,
                                    num_ranks,
                                    num_experts,
                                    num_nodes,
                                    pointer<int>(counts),
                                    pointer<bool>(is_token_in_rank),
                                    pointer<CUstream_st>(stream)};
        run([&] { return dispatch_layout(launch); });
      },
      py::arg("topk_idx"), py::arg("is_int64"), py::arg("num_tokens"), py::arg("num_topk"),
      py::arg("num_ranks"), py::arg("num_experts"), py::arg("num_nodes"), py::arg("counts"),
      py::arg("is_token_in_rank"), py::arg("stream"));
}

}  // namespace moe_ep::deep_ep
