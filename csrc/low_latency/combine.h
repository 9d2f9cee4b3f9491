#pragma once

#include "low_latency/group.h"

namespace moe_ep::low_latency {

// Brings the experts' rows of a dispatch back: weighted sums in float32, over a rank's experts by ascending k
// and rounded, then over ranks. The two halves of it are one launch or two.
struct Combine {
  bool send, receive;
  const char* rows;           // bfloat16 [L, R * T, H]
  const void* topk_idx;       // [N, K]; -1 leaves its row out
  bool is_int64;              // else int32
  const float* topk_weights;  // [N, K]
  int num_tokens;             // N
  int num_topk;               // K
  int* tables;                // of the dispatch
  Peer* peers;                // out [R]: for the second half
  char* out;                  // bfloat16 [N, H]
  cudaStream_t stream;
};

Status launch_combine(const Group& group, const Combine& combine);

}  // namespace moe_ep::low_latency
