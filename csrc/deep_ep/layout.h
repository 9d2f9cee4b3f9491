#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

namespace moe_ep::deep_ep {

constexpr int kMaxLayoutRanks = 128;
constexpr int kMaxLayoutCounts = 8192;  // of ranks, nodes and experts together
constexpr int kNodeRanks = 8;           // of an "rdma rank"

// Who gets how many tokens. An id outside [0, E) names no expert; a token counts once for a rank and a node.
struct DispatchLayout {
  const void* topk_idx;  // [T, K]
  bool is_int64;         // else int32
  int64_t num_tokens;
  int num_topk;
  int num_ranks;
  int num_experts;         // a multiple of num_ranks
  int num_nodes;           // to be counted; may be 0
  int* counts;             // out: tokens for each rank, for each node, for each expert
  bool* is_token_in_rank;  // out [T, R]
  cudaStream_t stream;
};

// Launches on the stream and returns.
Status dispatch_layout(const DispatchLayout& launch);

}  // namespace moe_ep::deep_ep
