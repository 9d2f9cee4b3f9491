// The module moe_ep._cpu: rows on a CPU. Raw pointers and sizes in; what they point to is the caller's
// business.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/rows.h"

namespace py = pybind11;
using namespace moe_ep::cpu;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using ListOfTerms = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;

void gather(uintptr_t source, uintptr_t index, int64_t count, int64_t row_bytes, uintptr_t target,
            int64_t result_bytes) {
  py::gil_scoped_release unlocked;
  gather_rows({pointer<const char>(source), pointer<const int64_t>(index), count, row_bytes,
               pointer<char>(target), result_bytes});
}

void sum(uintptr_t out, int64_t rows, int64_t width, DType dtype, const std::vector<ListOfTerms>& lists) {
  py::gil_scoped_release unlocked;
  Sum sum{pointer<char>(out), rows, width, dtype, {}};
  for (const auto& [from, targets, sources, count] : lists) {
    sum.lists.push_back(
        {pointer<const char>(from), pointer<const int64_t>(targets), pointer<const int64_t>(sources), count});
  }
  sum_rows(sum);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::float32)
      .value("float64", DType::float64)
      .value("bfloat16", DType::bfloat16);
  m.def("gather_rows", &gather, py::arg("source"), py::arg("index"), py::arg("count"), py::arg("row_bytes"),
        py::arg("target"), py::arg("result_bytes"),
        "target[i] = source[index[i]], rows of row_bytes bytes; index is int64. result_bytes: of the whole "
        "result, of which this may be a part.");
  m.def("sum_rows", &sum, py::arg("out"), py::arg("rows"), py::arg("width"), py::arg("dtype"),
        py::arg("lists"),
        "Sums of rows. lists: (rows, targets, sources, count); targets ascend, none twice in a list; int64.");
}
