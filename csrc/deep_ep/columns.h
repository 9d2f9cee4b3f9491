#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

// Numbers that belong to rows, between the tensors of a call and the words that travel with its rows.
namespace moe_ep::deep_ep {

enum class Number { int32, int64, uint8 };

// What becomes of a number v in column c.
enum class How {
  copy,   // v
  next,   // v + 1: ids as they travel, so that rows without a token, which are zeros, name none
  place,  // c where v is not 0, else -1
  local,  // v - 1 - first if that is from 0 to count - 1, else -1: ids that have travelled
  masked  // v where `ids` has one that is `local`, else 0
};

// An array of numbers; steps in elements.
struct Numbers {
  void* at;
  Number type;
  int64_t row_step, column_step;
};

// From [rows, width] to [to_rows, width], of which the rows behind the others become 0.
struct Column {
  Numbers from;
  Numbers to;   // int32 or int64
  Numbers ids;  // int32, for How::masked
  int64_t rows, to_rows;
  int width;
  How how;
  int first, count;
};

constexpr int kMaxColumns = 8;

// All columns in one kernel.
struct FillColumns {
  Column columns[kMaxColumns];
  int num_columns;
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status fill_columns(const FillColumns& launch);

}  // namespace moe_ep::deep_ep
