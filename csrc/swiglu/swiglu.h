#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

namespace moe_ep::swiglu {

// out = silu(gate) * up * weight, computed in float32: rounded once to `dtype`, or quantised to FP8 in 1x128
// blocks.
struct Forward {
  const void* gate_up;  // [rows, 2 * width] of `dtype`: gate, then up; 16-byte aligned, on the current device
  const float* weights;  // [rows]; null: 1
  DType dtype;
  int64_t rows;      // >= 0
  int64_t width;     // >= 0, a multiple of 8; of 128 for FP8
  void* out;         // [rows, width] of `dtype`; null for FP8
  uint8_t* data;     // [rows, width]: E4M3 bytes; null for `dtype`
  float* scale_inv;  // [rows, width / 128], with data
  cudaStream_t stream;
};

// The gradients of gate and up, [rows, 2 * width] like them, from that of out; and of the weights.
struct Backward {
  const void* gate_up;   // as in Forward
  const float* weights;  // [rows]; null: 1
  const void* grad_out;  // [rows, width] of `dtype`, 16-byte aligned
  DType dtype;
  int64_t rows;
  int64_t width;
  void* grad;           // [rows, 2 * width] of `dtype`; null for FP8
  uint8_t* data;        // [rows, 2 * width]: E4M3 bytes; null for `dtype`
  float* scale_inv;     // [rows, 2 * width / 128], with data
  float* grad_weights;  // [rows], or null
  cudaStream_t stream;
};

// Both launch on the stream and return.
Status forward(const Forward& launch);
Status backward(const Backward& launch);

}  // namespace moe_ep::swiglu
