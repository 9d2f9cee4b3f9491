#pragma once

#include "common/dtype.h"
#include "nvlink/group.h"

namespace moe_ep::nvlink {

// Moves the rows of all ranks' tokens to where a plan wants them; and with `quantises`, quantises them on the
// way, to FP8 by fp8/formulas.cuh.
struct Dispatch {
  const char* rows;   // [T] of row_bytes, 16-byte aligned; with `quantises` [T, row_bytes] of `dtype`
  int64_t row_bytes;  // as they travel: a multiple of 16
  bool quantises;
  DType dtype;
  const float* scales;  // [T, scale_words], or null
  int scale_words;
  float scale_padding;   // of rows without a token
  const float* weights;  // [T, K], or null
  const int* tables;     // PlanTables
  char* out_rows;        // [N] of row_bytes
  float* out_scales;     // [N, scale_words]
  float* out_weights;    // [N], in the rank layout [N, K]
  int64_t num_rows;      // N
  bool expert_layout;
  bool has_padding;  // there may be rows without a token
  int num_blocks;
  int send_blocks;  // of these; 0 in a group of one rank
  cudaStream_t stream;
  bool meets = false;  // first waits for all ranks, on one multiprocessor: launch_meet
};

Status launch_dispatch(const Group& group, const Dispatch& dispatch);

}  // namespace moe_ep::nvlink
