#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"
#include "fp8/experts.h"

namespace moe_ep::fp8 {

// Quantises the columns of each expert's rows, given rows that are quantised in 1x128 blocks: blocks of 128
// rows of one column, the last one of an expert shorter. What a product over an expert's rows (a weight
// gradient) needs.
struct RequantizeColumns {
  const uint8_t* data;     // [rows, cols]: E4M3 bytes, on the current device, 16-byte aligned
  const float* scale_inv;  // [rows, cols / 128]
  int64_t cols;            // >= 0, a multiple of 128
  Experts experts;         // NOTE: counts must be multiples of 16
  // Both expert by expert, of the tiles of up to 128 rows that an expert has:
  uint8_t* out;          // matrices [cols, 128 * tiles], 16-byte aligned; zeros behind the expert's rows
  float* out_scale_inv;  // matrices [tiles, cols]
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status requantize_columns(const RequantizeColumns& launch);

}  // namespace moe_ep::fp8
