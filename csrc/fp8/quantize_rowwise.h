#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace moe_ep::fp8 {

// Quantises each 1x128 block of a contiguous matrix to FP8 E4M3 with a power-of-two scale.
struct QuantizeRowwise {
  const void* x;     // [rows, cols] of `dtype`, on the current device
  DType dtype;       // of x
  int64_t rows;      // >= 0
  int64_t cols;      // >= 0
  uint8_t* data;     // out [rows, cols]: E4M3 bytes
  float* scale_inv;  // out [rows, ceil(cols / 128)]: data * scale_inv is x again, rounded
  cudaStream_t stream;
};

// Launches on the stream and returns; fast where x is 16-byte aligned and cols * sizeof(dtype) is a multiple
// of 16.
Status quantize_rowwise(const QuantizeRowwise& launch);

}  // namespace moe_ep::fp8
