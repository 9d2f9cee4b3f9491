#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"
#include "fp8/experts.h"

namespace moe_ep::fp8 {

// From the scales of rows as they travel, [rows, blocks], to a matrix [blocks, rows of the expert] for each
// expert, one after the other: as cuBLASLt reads them.
struct TransposeScales {
  const float* scale_inv;  // [rows, blocks], on the current device
  int64_t blocks;          // of 128 columns, >= 0
  Experts experts;
  float* out;  // [rows * blocks]
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status transpose_scales(const TransposeScales& launch);

}  // namespace moe_ep::fp8
