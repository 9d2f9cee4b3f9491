#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <tuple>

#include "common/status.h"

namespace moe_ep {

// Gives a kernel an attribute of at least this value on the current device. Only a larger value than before
// is passed on, since that costs the host about as much as half a launch.
inline Status raise_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> values;
  int device = 0;
  const Status found = Status::from_cuda(cudaGetDevice(&device), "asking for the current device");
  if (!found.is_ok()) return found;
  const std::lock_guard<std::mutex> lock(mutex);
  int& known = values[{kernel, static_cast<int>(attribute), device}];
  if (value <= known) return Status::ok();
  const Status status =
      Status::from_cuda(cudaFuncSetAttribute(kernel, attribute, value), "asking for shared memory");
  if (status.is_ok()) known = value;
  return status;
}

}  // namespace moe_ep
