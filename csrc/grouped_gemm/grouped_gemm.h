#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/status.h"

// One matrix product for each expert, by cuBLASLt through Transformer Engine's C interface.
namespace moe_ep::grouped_gemm {

// Row-major matrices of all experts, one behind the other. Of an expert with m rows:
enum class Form {
  rows,          // [m, width]; FP8 in 1x128 blocks, scales [width / 128, m]
  columns,       // [width, m], only FP8, in blocks of 128 of the rows, scales [ceil(m / 128), width]
  column_tiles,  // [width, m], only FP8, in 128x128 blocks, scales [width / 128, ceil(m / 128) up to a
                 // multiple of 4]
  weights,       // [height, width]; FP8 in 128x128 blocks, scales [height / 128, scale_width]
};

struct Matrices {
  Form form;
  void* data;
  float* scales;  // null: not FP8, but of `dtype`
  DType dtype;
  int64_t width;
  int64_t height;       // only of weights
  int64_t scale_width;  // only of FP8 weights
  // Only of weights that are not FP8: where each expert's lie, if they don't lie one behind the other.
  std::vector<void*> places = {};
};

enum class Product {
  rows_by_weights,             // out [m, height of b] = a b^T;  a: rows, b: weights
  rows_by_transposed_weights,  // out [m, width of b]  = a b;    a: rows, b: weights, not FP8
  columns_by_columns,  // out weights          = a^T b;  a, b: rows; if FP8 columns, and column_tiles for b
};

struct Call {
  Product product;
  Matrices a, b, out;
  bool adds;                         // the product to what out holds
  const std::vector<int64_t>& rows;  // m of each expert
  void* workspace;
  int64_t workspace_bytes;
  cudaStream_t stream;
};

// An expert without rows has no product; its weights-shaped result is zeros, or what it was.
Status multiply(const Call& call);

}  // namespace moe_ep::grouped_gemm
