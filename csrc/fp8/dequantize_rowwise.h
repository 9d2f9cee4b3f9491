#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace moe_ep::fp8 {

// The inverse of QuantizeRowwise: out = float(data) * scale_inv, rounded once to `dtype`.
struct DequantizeRowwise {
  const uint8_t* data;     // [rows, cols]: E4M3 bytes, on the current device
  const float* scale_inv;  // [rows, ceil(cols / 128)]
  int64_t rows;            // >= 0
  int64_t cols;            // >= 0
  void* out;               // [rows, cols] of `dtype`
  DType dtype;             // of out
  cudaStream_t stream;
};

// Launches on the stream and returns; fast where out is 16-byte aligned and cols * sizeof(dtype) is a
// multiple of 16.
Status dequantize_rowwise(const DequantizeRowwise& launch);

}  // namespace moe_ep::fp8
