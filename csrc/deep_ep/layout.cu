#include "deep_ep/layout.h"

#include <climits>

namespace moe_ep::deep_ep {
namespace {

constexpr int kTokens = 128;  // of a block, one for each thread
constexpr int kWords = kMaxLayoutRanks / 32;

__device__ int64_t load_id(const DispatchLayout& launch, int64_t at) {
  return launch.is_int64 ? static_cast<const int64_t*>(launch.topk_idx)[at]
                         : static_cast<const int*>(launch.topk_idx)[at];
}

__global__ void __launch_bounds__(kTokens) count_tokens(const __grid_constant__ DispatchLayout launch) {
  extern __shared__ int counts[];
  __shared__ unsigned int ranks[kTokens][kWords];  // a bit for each rank that the token goes to
  const int num_ranks = launch.num_ranks, num_nodes = launch.num_nodes;
  const int num_counts = num_ranks + num_nodes + launch.num_experts;
  for (int i = threadIdx.x; i < num_counts; i += kTokens) counts[i] = 0;
  for (int word = 0; word < kWords; ++word) ranks[threadIdx.x][word] = 0;
  __syncthreads();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int64_t token = first + threadIdx.x;
  if (token < launch.num_tokens) {
    const int per_rank = launch.num_experts / num_ranks;
#pragma unroll 8
    for (int k = 0; k < launch.num_topk; ++k) {
      const int64_t id = load_id(launch, token * launch.num_topk + k);
      if (id < 0 || id >= launch.num_experts) continue;
      atomicAdd(&counts[num_ranks + num_nodes + id], 1);
      const int rank = static_cast<int>(id) / per_rank;
      ranks[threadIdx.x][rank / 32] |= 1u << rank % 32;
    }
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (ranks[threadIdx.x][rank / 32] >> rank % 32 & 1) atomicAdd(&counts[rank], 1);
    }
    for (int node = 0; node < num_nodes; ++node) {  // whose ranks' bits lie in one word
      constexpr unsigned int kOfNode = (1u << kNodeRanks) - 1;
      const int rank = node * kNodeRanks;
      if (ranks[threadIdx.x][rank / 32] >> rank % 32 & kOfNode) atomicAdd(&counts[num_ranks + node], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_counts; i += kTokens) {
    if (counts[i]) atomicAdd(&launch.counts[i], counts[i]);
  }
  const int64_t left = launch.num_tokens - first;
  const int marks = static_cast<int>(left < kTokens ? left : kTokens) * num_ranks;
  for (int i = threadIdx.x; i < marks; i += kTokens) {
    const int rank = i % num_ranks;
    launch.is_token_in_rank[first * num_ranks + i] = ranks[i / num_ranks][rank / 32] >> rank % 32 & 1;
  }
}

}  // namespace

Status dispatch_layout(const DispatchLayout& launch) {
  const int num_counts = launch.num_ranks + launch.num_nodes + launch.num_experts;
  if (launch.num_ranks < 1 || launch.num_ranks > kMaxLayoutRanks || num_counts > kMaxLayoutCounts) {
    return Status::invalid(
        "there are %d ranks and %d experts; the kernel counts for up to %d ranks, and up to %d "
        "ranks, nodes and experts together",
        launch.num_ranks, launch.num_experts, kMaxLayoutRanks, kMaxLayoutCounts);
  }
  const Status cleared = Status::from_cuda(
      cudaMemsetAsync(launch.counts, 0, num_counts * sizeof(int), launch.stream), "clearing the counts");
  const int64_t blocks = (launch.num_tokens + kTokens - 1) / kTokens;
  if (!cleared.is_ok() || blocks == 0) return cleared;
  if (blocks > INT_MAX) {
    return Status::invalid("there are %lld tokens; the kernel counts up to %lld",
                           static_cast<long long>(launch.num_tokens),
                           static_cast<long long>(INT_MAX) * kTokens);
  }
  count_tokens<<<static_cast<unsigned int>(blocks), kTokens, num_counts * sizeof(int), launch.stream>>>(
      launch);
  return Status::from_cuda(cudaGetLastError(), "launching the kernel that counts tokens");
}

}  // namespace moe_ep::deep_ep
