#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/status.h"
#include "fp8/experts.h"

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

// What kernels on tiles of 128 x 128 ask of a matrix whose rows belong to experts.
inline Status check_tiles(const char* function, const Experts& experts, int64_t cols,
                          std::initializer_list<const void*> pointers) {
  constexpr int64_t kMaxTiles = 65535;  // blocks of a grid along y
  const long long numbers[] = {cols, experts.rows, experts.num};
  if (cols % 128 != 0) {
    return Status::invalid("%s: cols must be a multiple of 128, got %lld", function, numbers[0]);
  }
  if (experts.num < 1 || experts.max_tiles() > kMaxTiles) {
    return Status::invalid("%s: %lld rows of %lld experts are more than %lld tiles of 128 rows, or none",
                           function, numbers[1], numbers[2], static_cast<long long>(kMaxTiles));
  }
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
      return Status::invalid("%s: data must be 16-byte aligned", function);
    }
  }
  return Status::ok();
}

}  // namespace moe_ep::fp8
