#pragma once

#include <cstdint>

#include "nvlink/plan.h"
#include "nvlink/sync.cuh"

// Exchanging the routing: what each rank writes into all windows before it plans, and where the others find
// it.
namespace moe_ep::nvlink {

constexpr int kPlanThreads = 512;  // of a block

struct Header {
  int num_tokens;
  int bad;
};

__device__ __forceinline__ Header* header_of(const Group& group, int at_rank, int of) {
  return reinterpret_cast<Header*>(group.windows[at_rank] + group.at.headers) + of;
}

__device__ __forceinline__ const int16_t* routing_of(const Group& group, int source) {
  return reinterpret_cast<const int16_t*>(group.windows[group.rank] + group.at.routing +
                                          source * group.at.routing_bytes);
}

// What rank `of` notes for rank `at_rank`: tokens for each rank, rows for each expert of `at_rank`.
__device__ __forceinline__ int* notes_of(const Group& group, const Plan& plan, int at_rank, int of) {
  return reinterpret_cast<int*>(group.windows[at_rank] + group.at.routing +
                                (of + 1) * group.at.routing_bytes - plan.notes.bytes(group));
}

__device__ __forceinline__ int most_tokens(const Group& group, const Plan& plan) {
  return plan.notes.per_rank == nullptr ? group.max_tokens : plan.notes.max_tokens;
}

__device__ __forceinline__ int64_t load_id(const Plan& plan, int64_t at) {
  return plan.is_int64 ? static_cast<const int64_t*>(plan.topk_idx)[at]
                       : static_cast<const int*>(plan.topk_idx)[at];
}

// Whether an earlier k of the token names this expert, `at` being a place in topk_idx.
__device__ inline bool is_repeated(const Group& group, const Plan& plan, int64_t at, int64_t id) {
  bool repeated = false;
  for (int64_t k = at / group.num_topk * group.num_topk; k < at; ++k) repeated |= load_id(plan, k) == id;
  return repeated;
}

constexpr int kIds = 8;  // 16 bytes as they are sent

// The ids from `first` on as they are sent: -1 for what is not an expert, and for what an earlier k names
// already.
__device__ inline bool checked_ids(const Group& group, const Plan& plan, int64_t first, int64_t count,
                                   int16_t (&ids)[kIds]) {
  const int num_topk = group.num_topk;
  const bool whole_tokens = kIds % num_topk == 0;
  int64_t given[kIds];
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kIds; ++i) given[i] = first + i < count ? load_id(plan, first + i) : -1;
#pragma unroll
  for (int i = 0; i < kIds; ++i) {
    bool is_expert = given[i] >= 0 && given[i] < group.num_experts;
    bad |= !is_expert && given[i] != -1;
    if (is_expert && whole_tokens) {
#pragma unroll
      for (int j = 0; j < i; ++j) {
        if (j >= i / num_topk * num_topk && given[j] == given[i]) {
          bad = true;
          is_expert = false;
        }
      }
    } else if (is_expert && is_repeated(group, plan, first + i, given[i])) {
      bad = true;
      is_expert = false;
    }
    ids[i] = static_cast<int16_t>(is_expert ? given[i] : -1);
  }
  return bad;
}

__device__ inline void send_notes(const Group& group, const Plan& plan) {
  const Notes& notes = plan.notes;
  const int experts = notes.experts_of_rank(group), words = group.size + experts;
  for (int i = blockIdx.x * kPlanThreads + threadIdx.x; i < group.size * words;
       i += gridDim.x * kPlanThreads) {
    const int peer = i / words, word = i % words;
    notes_of(group, plan, peer, group.rank)[word] =
        word < group.size ? notes.per_rank[word] : notes.per_expert[peer * experts + word - group.size];
  }
}

// Writes this rank's routing into every window.
__device__ inline bool send_routing(const Group& group, const Plan& plan, uint64_t number) {
  __shared__ unsigned int bad_ids;
  bool ready = true;
  if (threadIdx.x == 0) bad_ids = 0;
  if (threadIdx.x < group.size) {
    const int peer = threadIdx.x;
    ready = wait_for(signal(group, group.rank, group.at.routing_drained, peer), number, group,
                     Phase::send_routing, peer);
  }
  if (!__syncthreads_and(ready)) return false;

  if (plan.notes.per_rank != nullptr) send_notes(group, plan);
  const int num_tokens = plan.num_tokens <= most_tokens(group, plan) ? plan.num_tokens : 0;
  const int64_t count = static_cast<int64_t>(num_tokens) * group.num_topk;
  const int64_t pieces = (count + kIds - 1) / kIds;
  bool bad = false;
  for (int64_t piece = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x; piece < pieces;
       piece += static_cast<int64_t>(gridDim.x) * kPlanThreads) {
    union {
      int16_t ids[kIds];
      uint4 word;
    };
    bad |= checked_ids(group, plan, piece * kIds, count, ids);
    for (int i = 0; i < group.size; ++i) {
      const int peer = (group.rank + i) % group.size;
      char* to = group.windows[peer] + group.at.routing + group.rank * group.at.routing_bytes;
      reinterpret_cast<uint4*>(to)[piece] = word;
    }
  }
  if (bad) atomicOr(&bad_ids, 1u);
  __syncthreads();
  if (threadIdx.x == 0 && bad_ids) atomicOr(&group.workspace->bad_ids, 1u);
  if (is_last_block<true>(&group.workspace->blocks_sent) && threadIdx.x < group.size) {
    const int peer = threadIdx.x;
    *header_of(group, peer, group.rank) = {plan.num_tokens,
                                           static_cast<int>(load_volatile(&group.workspace->bad_ids))};
    store_release(signal(group, peer, group.at.routing_arrived, group.rank), number + 1);
  }
  return true;
}

}  // namespace moe_ep::nvlink
