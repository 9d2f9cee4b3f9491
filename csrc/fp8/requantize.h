#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"
#include "fp8/experts.h"

namespace moe_ep::fp8 {

// Columns of each expert's rows, of rows that are quantised in 1x128 blocks: what a product over an expert's
// rows (a weight gradient) needs. Both launch on the stream and return.
struct Requantize {
  const uint8_t* data;     // [rows, cols]: E4M3 bytes, on the current device, 16-byte aligned
  const float* scale_inv;  // [rows, cols / 128]
  int64_t cols;            // >= 0, a multiple of 128
  Experts experts;         // NOTE: counts must be multiples of 16
  // 16-byte aligned: expert by expert, a matrix [cols, rows of the expert rounded up to 128], zeros behind
  // its rows.
  uint8_t* out;
  float* out_scale_inv;
  cudaStream_t stream;
};

// In blocks of 128 rows of one column, the last one of an expert shorter. `out_scale_inv` is [tiles, cols]: a
// row for each 128 rows of an expert, expert by expert.
Status requantize_columns(const Requantize& launch);

// In tiles of 128 rows and 128 columns, whose scale is the largest of its rows', rows of zeros aside. From
// powers of two nothing is rounded but what is more than 2^14 below its tile's largest. Matrix units multiply
// such tiles by columns faster than two operands of columns. `out_scale_inv`: expert by expert, a matrix
// [cols / 128, W]: W tiles of the expert's rows, rounded up to a multiple of 4. What that adds is not
// written.
Status requantize_tiles(const Requantize& launch);

}  // namespace moe_ep::fp8
