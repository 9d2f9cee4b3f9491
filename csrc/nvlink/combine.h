#pragma once

#include "common/dtype.h"
#include "nvlink/group.h"

namespace moe_ep::nvlink {

constexpr int kMaxBiases = 2;

// Brings rows back to the ranks of their tokens and adds them up: the transpose of Dispatch.
struct Combine {
  const char* rows;  // [N, width] of dtype, 16-byte aligned
  DType dtype;
  int64_t row_bytes;               // a multiple of 16
  const float* row_weights;        // [N], in the rank layout [N, K]; or null
  const char* biases[kMaxBiases];  // [T, width] of dtype, or null
  const int* tables;               // PlanTables
  int num_tokens;                  // T
  char* out;                       // [T, width] of dtype
  float* out_weights;              // [T, K], or [T, num_added]
  bool expert_layout;
  int num_blocks;
  int send_blocks;  // of these; 0 in a group of one rank, else enough for a warp for each peer
  cudaStream_t stream;
  // Not 0, in the rank layout: row_weights are numbers [N, num_added] that are added up over ranks, by the
  // order of the last k of each, as the rows are; out_weights are the sums. Up to 32.
  int num_added = 0;
  bool meets = false;  // as in Dispatch
};

Status launch_combine(const Group& group, const Combine& combine);

}  // namespace moe_ep::nvlink
