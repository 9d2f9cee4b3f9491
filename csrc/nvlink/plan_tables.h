#pragma once

#include <cstdint>

#include "nvlink/group.h"

namespace moe_ep::nvlink {

constexpr int kTokensPerBlock = 128;  // whose routing is counted together

inline __host__ __device__ int token_blocks(int max_tokens) {
  return (max_tokens + kTokensPerBlock - 1) / kTokensPerBlock;
}

// What is counted for each block of tokens: rows of each local expert; tokens that arrive here; and, of this
// rank's own tokens, those that go to each rank.
inline __host__ __device__ int count_columns(int size, int num_local) {
  return num_local + 1 + size;
}

// A routing as the kernels use it, in one int32 tensor: part of a handle. `Arrival j of s` is the j-th token
// of rank s that has an expert here.
struct PlanTables {
  int* send_count;    // [R] own tokens that go to each rank (itself included)
  int* recv_count;    // [R] arrivals from each rank
  int* recv_start;    // [R + 1] arrivals of all ranks before
  int* expert_begin;  // [L + 1] first row of each expert, in the expert layout
  int* expert_count;  // [L]
  int* send_tokens;   // [R][max_tokens] the token that is arrival j at rank r
  int* sources;       // [R * max_tokens] the token, on its rank, of each arrival of all ranks, s after s
  int* arrival_rows;  // [R][max_tokens][K] the rows of arrival j of s, by k; -1: none here, or dropped
  int* entries;       // [T][K] where the row of (t, k) is: see below

  static constexpr int kNone = -1;                     // no expert
  static constexpr int kLast = 1 << (kIndexBits + 1);  // no higher k of this token has an expert on that rank
  static constexpr int kRemote = 1 << kIndexBits;      // index: rank << kArrivalBits | arrival there
  static constexpr int kIndex = kRemote - 1;           // otherwise: a row here,
  static constexpr int kDropped = kIndex;              // or none, since it was dropped

  __host__ __device__ PlanTables(int* words, const Group& group) {
    const int64_t size = group.size, num_local = group.num_local;
    const int64_t pairs = size * group.max_tokens;
    send_count = words;
    recv_count = send_count + size;
    recv_start = recv_count + size;
    expert_begin = recv_start + size + 1;
    expert_count = expert_begin + num_local + 1;
    send_tokens = expert_count + num_local;
    sources = send_tokens + pairs;
    arrival_rows = sources + pairs;
    entries = arrival_rows + pairs * group.num_topk;
  }

  static int64_t words(const Group& group, int num_tokens) {
    int* const base = nullptr;
    return PlanTables(base, group).entries - base + static_cast<int64_t>(num_tokens) * group.num_topk;
  }
};

}  // namespace moe_ep::nvlink
