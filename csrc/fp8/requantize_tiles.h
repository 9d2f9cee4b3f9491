#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"
#include "fp8/experts.h"

namespace moe_ep::fp8 {

// Turns each expert's rows, quantised in 1x128 blocks, into columns with one scale for each tile of 128 rows
// and 128 columns: the largest of its rows' scales, rows of zeros aside. From powers of two nothing is
// rounded but what is more than 2^14 below its tile's largest. matrix units multiply such tiles by columns in
// blocks of 128 faster than two operands of columns.
struct RequantizeTiles {
  const uint8_t* data;     // [rows, cols]: E4M3 bytes, on the current device, 16-byte aligned
  const float* scale_inv;  // [rows, cols / 128]
  int64_t cols;            // >= 0, a multiple of 128
  Experts experts;         // NOTE: counts must be multiples of 16
  uint8_t* out;            // as in RequantizeColumns
  // Expert by expert, a matrix [cols / 128, W]: W tiles of the expert's rows, rounded up to a multiple of 4.
  // What that adds is not written.
  float* out_scale_inv;
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status requantize_tiles(const RequantizeTiles& launch);

}  // namespace moe_ep::fp8
