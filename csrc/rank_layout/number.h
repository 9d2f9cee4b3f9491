#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

namespace moe_ep::rank_layout {

constexpr int kMaxExperts = 1024;  // of a rank
constexpr int kMaxCountBlocks = 128;

// Where the copies of rows lie when there is one for each expert of a row, sorted by expert and inside an
// expert by (row, k), and every expert's begin at a multiple of `alignment`.
struct Number {
  const int64_t* topk_idx;  // [rows, num_topk] local experts; another number is none
  int64_t rows;             // >= 0
  int num_topk;
  int num_experts;
  int64_t alignment;  // >= 1
  int64_t num_slots;  // places that there are
  int* counts;        // workspace [kMaxCountBlocks, num_experts]
  int* slots;         // out [rows, num_topk]: the copy's place; -1 for none, and where there is no place
  int* gaps;  // out [num_experts + 1, 2]: first and end of the places behind each expert's copies; then the
              // rest
  int64_t* tokens_per_expert;  // out [num_experts]: places, those that no copy takes included
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status number(const Number& launch);

}  // namespace moe_ep::rank_layout
