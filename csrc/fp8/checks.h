#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/status.h"

namespace moe_ep::fp8 {

// What both directions ask of their arguments; `pointers` may be null only where there is nothing to move.
inline Status check_arguments(const char* function, int64_t rows, int64_t cols,
                              std::initializer_list<const void*> pointers, const char* pointer_names) {
  const long long shape[] = {rows, cols};
  if (rows < 0 || cols < 0) {
    return Status::invalid("%s: rows and cols must be >= 0, got %lld and %lld", function, shape[0], shape[1]);
  }
  for (const void* pointer : pointers) {
    if (pointer == nullptr && rows > 0 && cols > 0) {
      return Status::invalid("%s: %s must not be null for %lld x %lld elements", function, pointer_names,
                             shape[0], shape[1]);
    }
  }
  return Status::ok();
}

inline Status check_grid(const char* function, int64_t rows, int64_t cols, int64_t grid) {
  if (grid <= INT32_MAX) return Status::ok();
  const long long numbers[] = {rows, cols, grid};
  return Status::invalid("%s: %lld x %lld elements need %lld thread blocks, at most 2^31 - 1 can run",
                         function, numbers[0], numbers[1], numbers[2]);
}

}  // namespace moe_ep::fp8
