#pragma once

#include <cuda_runtime_api.h>
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

// What kernels of one kind have in common, on its device. Launches leave the thread's current device as it
// was.
template <typename Group>
class OnDevice {
 public:
  OnDevice(int device, const Group& group) : device_(device), group_(group) {}

  const Group& group() const { return group_; }

  template <typename Launch>
  void launch(Launch&& operation) const {
    int current = device_;
    cudaGetDevice(&current);
    if (current != device_) cudaSetDevice(device_);
    const Status status = operation(group_);
    if (current != device_) cudaSetDevice(current);
    raise_unless_ok(status);
  }

 private:
  int device_;
  Group group_;
};

}  // namespace moe_ep
