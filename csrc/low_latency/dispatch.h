#pragma once

#include "low_latency/group.h"

namespace moe_ep::low_latency {

enum class Format : int { bfloat16, fp8, fp8_rounded, fp8_exponents };

// Sends few tokens to their experts; each rank's rows for an expert are by source rank and token. The two
// halves of it are one launch or two.
struct Dispatch {
  bool send, receive;
  const void* x;         // bfloat16 [N, H]
  const void* topk_idx;  // [N, K], -1 for none
  bool is_int64;         // else int32
  int num_tokens;        // N
  int num_topk;          // K
  Format format;
  int* tables;            // out: Tables
  char* rows;             // out [L, R * T, H], of this format
  void* scales;           // out [L, S, R * T]: float32, or with fp8_exponents int32 [L, S / 4, R * T]
  int* tokens_of_expert;  // out [L]
  int* source_token;      // out [L, R * T]
  int64_t* ranges;  // out [L, R]: the first row from a rank in the upper 32 bits, their number in the lower
  int* statistics;  // [L], to which tokens_of_expert is added, or null
  cudaStream_t stream;
};

Status launch_dispatch(const Group& group, const Dispatch& dispatch);

}  // namespace moe_ep::low_latency
