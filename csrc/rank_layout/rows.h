#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/status.h"

// Between rows of the rank layout, one for each token, and of the expert layout, one for each expert of a
// token. Rows are 16-byte aligned, and a multiple of 16 bytes.
namespace moe_ep::rank_layout {

constexpr int kMaxTopk = 32;

// Which copies a row has, as `number` says.
struct Copies {
  const int* slots;  // [rows, num_topk]
  int64_t rows;
  int num_topk;
};

// Copies each row to its places.
struct Expand {
  Copies copies;
  const int* gaps;   // [num_gaps, 2]: places that no row takes and that become padding, the last the most
  int num_gaps;      // 0: there are none
  const void* from;  // [rows, row_bytes]
  void* to;          // [places, row_bytes]; padding 0
  int64_t row_bytes;
  const float* scales;  // [rows, num_scales]; null: none
  float* to_scales;     // [places, num_scales]; padding 1
  int num_scales;
  const float* weights;  // [rows, num_topk]
  float* to_weights;     // [places]; padding 0; null: none
  cudaStream_t stream;
};

// Adds a row's copies up, in ascending k and float32, and rounds once. A sum starts from its first term; an
// empty one is 0.
struct Reduce {
  Copies copies;
  const void* from;  // [places, row_bytes] of `dtype`
  void* to;          // [rows, row_bytes] of `dtype`
  DType dtype;
  int64_t row_bytes;
  const float* weights;  // [places]
  float* to_weights;     // [rows, num_topk]: each copy's, 0 where there is none; null: none
  cudaStream_t stream;
};

// Both launch on the stream and return.
Status expand(const Expand& launch);
Status reduce(const Reduce& launch);

}  // namespace moe_ep::rank_layout
