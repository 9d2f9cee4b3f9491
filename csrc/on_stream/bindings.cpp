// moe_ep._C.on_stream
#include <pybind11/pybind11.h>

#include "common/python.h"
#include "on_stream/on_stream.h"

namespace py = pybind11;

namespace moe_ep::on_stream {

void bind(py::module_& module) {
  module.def(
      "copy",
      [](Address to, Address from, int64_t bytes, Address stream) {
        raise_unless_ok(copy(pointer<void>(to), pointer<void>(from), bytes, pointer<CUstream_st>(stream)));
      },
      py::arg("to"), py::arg("source"), py::arg("num_bytes"), py::arg("stream"), "By a copy engine.");
  module.def(
      "write_value",
      [](Address to, uint32_t value, Address stream) {
        raise_unless_ok(write_value(pointer<uint32_t>(to), value, pointer<CUstream_st>(stream)));
      },
      py::arg("to"), py::arg("value"), py::arg("stream"), "Once the stream's earlier work is visible.");
  module.def(
      "wait_value",
      [](Address at, uint32_t value, Address stream) {
        raise_unless_ok(wait_value(pointer<uint32_t>(at), value, pointer<CUstream_st>(stream)));
      },
      py::arg("at"), py::arg("value"), py::arg("stream"), "Until there is that value or a larger one.");
}

}  // namespace moe_ep::on_stream
