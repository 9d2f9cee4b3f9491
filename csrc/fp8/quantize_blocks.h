#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace moe_ep::fp8 {

// Quantises matrices (the weights of experts) in 128x128 blocks, as they are and transposed, in one pass.
struct QuantizeBlocks {
  const void* x;                // [matrices, rows, cols] of `dtype`, on the current device, 16-byte aligned
  DType dtype;                  // of x
  int64_t matrices;             // >= 0
  int64_t rows;                 // >= 0, a multiple of 128
  int64_t cols;                 // >= 0, a multiple of 128
  uint8_t* data;                // out [matrices, rows, cols]: E4M3 bytes; or null
  float* scale_inv;             // out [matrices, rows / 128, scale_stride]; null with data
  int64_t scale_stride;         // >= cols / 128; entries past that are left alone
  uint8_t* transposed;          // out [matrices, cols, rows]; or null
  float* transposed_scale_inv;  // out [matrices, cols / 128, transposed_scale_stride]; null with transposed
  int64_t transposed_scale_stride;  // >= rows / 128
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status quantize_blocks(const QuantizeBlocks& launch);

}  // namespace moe_ep::fp8
