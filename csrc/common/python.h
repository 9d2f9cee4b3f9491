#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "common/status.h"

// What every binding needs.
namespace moe_ep {

using Address = std::uintptr_t;  // tensor.data_ptr(), stream.cuda_stream

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void raise_unless_ok(const Status& status) {
  switch (status.code()) {
    case Status::Code::ok:
      return;
    case Status::Code::invalid_argument:
      throw pybind11::value_error(status.message());
    case Status::Code::cuda_error:
      throw std::runtime_error(status.message());
  }
}

// Runs a launch without the GIL; its failure becomes a ValueError or a RuntimeError.
template <typename Launch>
void run(Launch&& launch) {
  Status status = Status::ok();
  {
    pybind11::gil_scoped_release release;
    status = launch();
  }
  raise_unless_ok(status);
}

}  // namespace moe_ep
