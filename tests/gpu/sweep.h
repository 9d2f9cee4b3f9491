#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#include "common/status.h"

// What programs that time kernels have in common: an error ends them.

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

inline void check(const moe_ep::Status& status) {
  if (status.is_ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

// Filled with a byte that shows where nothing was written.
template <typename T>
T* allocate(size_t count, int byte = 0) {
  void* memory;
  check(cudaMalloc(&memory, count * sizeof(T)));
  check(cudaMemset(memory, byte, count * sizeof(T)));
  return static_cast<T*>(memory);
}
