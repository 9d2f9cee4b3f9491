#include "low_latency/combine.h"

#include <cuda_bf16.h>

#include "low_latency/signals.cuh"

namespace moe_ep::low_latency {
namespace {

constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
constexpr int kWarps = kThreads / 32;
constexpr int kExpertsAhead = 8;  // rows of a token that a thread loads at once
constexpr int kRanksAhead = 4;

struct Shared {
  Peers peers;
  int order[kWarps][kMaxTopk];
  unsigned int arrived[kRankWords];
};

// 8 channels of a row, in float32.
struct Sum {
  float at[8];

  __device__ __forceinline__ static Sum of(uint4 row) {
    const unsigned int words[4] = {row.x, row.y, row.z, row.w};
    Sum sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum.at[2 * i] = __uint_as_float(words[i] << 16);
      sum.at[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
    return sum;
  }

  __device__ __forceinline__ void add(const Sum& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = __fadd_rn(at[i], other.at[i]);
  }

  // The product is rounded before it is added.
  __device__ __forceinline__ void add(const Sum& other, float weight) {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = __fadd_rn(at[i], __fmul_rn(other.at[i], weight));
  }

  __device__ __forceinline__ uint4 rounded() const {
    __nv_bfloat162 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(at[2 * i], at[2 * i + 1]);
    uint4 row;
    memcpy(&row, pairs, sizeof(row));
    return row;
  }
};

__device__ __forceinline__ bool is_served(const Tables& tables, int token, int rank) {
  return tables.served[token * kRankWords + rank / 32] >> rank % 32 & 1;
}

// The weights of this rank's tokens, to the ranks that have their experts' rows.
__device__ void send_weights(const Group& group, const Combine& call, const Tables& tables) {
  for (int token = blockIdx.x; token < call.num_tokens; token += group.num_blocks) {
    for (int i = threadIdx.x; i < group.size * call.num_topk; i += kThreads) {
      const int to = i / call.num_topk, k = i % call.num_topk;
      const int64_t at = static_cast<int64_t>(token) * call.num_topk + k;
      const Peer peer = next_call(group, Operation::combine, to);
      const float weight = call.topk_weights[at];
      const int expert = expert_id(group, call.topk_idx, call.is_int64, at);
      if (!peer.takes_part || !is_served(tables, token, to)) continue;
      const Turn turn = turn_of(peer.call);
      send(group.signals(group.at.weights, to, group.rank, turn.half) + token * kMaxTopk + k,
           signal(turn.number, expert >= 0, __float_as_uint(weight)));
    }
  }
}

// The sum of the rows that this rank has for a token, to the token's rank. Its rows are under way already
// while the weights are waited for. False if these don't come.
__device__ bool send_sum(const Group& group, const Combine& call, const Shared& shared, int to, int token,
                         unsigned int experts, int slot, int* order) {
  const int lane = threadIdx.x % 32;
  if (slot >= 0) order[__popc(experts & ((1u << lane) - 1))] = lane;
  __syncwarp();
  const int count = __popc(experts);
  const int k = lane < count ? order[lane] : 0;
  slot = __shfl_sync(kAllLanes, slot, k);
  const Turn turn = shared.peers.turn[to];
  auto* sums = reinterpret_cast<uint4*>(group.place(group.at.sums, to, group.rank, turn.half) +
                                        token * group.row_bytes());
  const int words = group.hidden / 8;
  bool has_weights = false;
  float weight = 0;
  unsigned int asked = 0;
  for (int first = threadIdx.x - lane; first < words; first += kThreads) {
    const int at = first + lane;
    Sum sum{};
    for (int begin = 0; begin < count; begin += kExpertsAhead) {
      uint4 rows[kExpertsAhead] = {};
#pragma unroll
      for (int i = 0; i < kExpertsAhead; ++i) {
        const int row = __shfl_sync(kAllLanes, slot, (begin + i) % 32);
        if (begin + i < count && at < words) {
          rows[i] = __ldg(reinterpret_cast<const uint4*>(call.rows + row * group.row_bytes()) + at);
        }
      }
      if (!has_weights) {
        const uint64_t* of_token =
            group.signals(group.at.weights, group.rank, to, turn.half) + token * kMaxTopk;
        uint64_t seen = 0;
        const bool came =
            lane >= count || wait(of_token + k, turn.number, group, Phase::combine_send, to, seen);
        if (!__all_sync(kAllLanes, came)) return false;
        asked = __ballot_sync(kAllLanes, lane < count && is_yes(seen));
        weight = __uint_as_float(value_in(seen));
        has_weights = true;
      }
#pragma unroll
      for (int i = 0; i < kExpertsAhead; ++i) {
        const float by = __shfl_sync(kAllLanes, weight, (begin + i) % 32);
        if (begin + i < count && asked >> (begin + i) & 1) sum.add(Sum::of(rows[i]), by);
      }
    }
    if (at < words) sums[at] = sum.rounded();
  }
  return true;
}

__device__ void send_sums(const Group& group, const Combine& call, const Tables& tables, Shared& shared) {
  const int lane = threadIdx.x % 32;
  for (int item = blockIdx.x; item < group.capacity(); item += group.num_blocks) {
    // This rank's own tokens last: their sums have no way to go.
    const int to = (group.rank + 1 + item / group.max_tokens) % group.size;
    const int token = item % group.max_tokens;
    if (!shared.peers.takes_part[to]) continue;
    const int* slots = tables.slots + (static_cast<int64_t>(to) * group.max_tokens + token) * call.num_topk;
    const int slot = lane < call.num_topk ? slots[lane] : -1;
    const unsigned int experts = __ballot_sync(kAllLanes, slot >= 0);
    if (experts == 0) continue;
    const bool sent = send_sum(group, call, shared, to, token, experts, slot, shared.order[threadIdx.x / 32]);
    if (!__syncthreads_and(sent) || threadIdx.x != 0) continue;
    const Turn turn = shared.peers.turn[to];
    nvlink::store_release(group.signals(group.at.sums_there, to, group.rank, turn.half) + token,
                          signal(turn.number, true));
  }
}

__device__ void send_all(const Group& group, const Combine& call, const Tables& tables, Shared& shared) {
  send_weights(group, call, tables);
  Peer peer{};
  if (threadIdx.x < group.size) {
    peer = next_call(group, Operation::combine, threadIdx.x);
    shared.peers.set(threadIdx.x, peer);
  }
  __syncthreads();
  if (threadIdx.x < group.size) {
    if (peer.takes_part) *calls_with(group, Operation::combine, threadIdx.x) = peer.call + 1;
    if (blockIdx.x == 0) call.peers[threadIdx.x] = peer;
  }
  send_sums(group, call, tables, shared);
}

// Adds what the ranks have sent for a token, by ascending rank.
__device__ void add_sums(const Group& group, const Combine& call, const Shared& shared, int token) {
  auto* out = reinterpret_cast<uint4*>(call.out + token * group.row_bytes());
  for (int at = threadIdx.x; at < group.hidden / 8; at += kThreads) {
    Sum sum{};
    bool is_first = true;
    for (int word = 0; word < kRankWords; ++word) {
      for (unsigned int left = shared.arrived[word]; left != 0;) {
        uint4 rows[kRanksAhead];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kRanksAhead; ++i) {
          if (left == 0) continue;
          const int from = 32 * word + __ffs(left) - 1;
          left &= left - 1;
          const char* row = group.place(group.at.sums, group.rank, from, shared.peers.turn[from].half) +
                            token * group.row_bytes();
          rows[i] = __ldcg(reinterpret_cast<const uint4*>(row) + at);
          count = i + 1;
        }
#pragma unroll
        for (int i = 0; i < kRanksAhead; ++i) {
          if (i >= count) continue;
          // From the first term on, not from zero: the sign of a zero stays.
          if (is_first) {
            sum = Sum::of(rows[i]);
          } else {
            sum.add(Sum::of(rows[i]));
          }
          is_first = false;
        }
      }
    }
    out[at] = sum.rounded();
  }
}

__device__ void receive_all(const Group& group, const Combine& call, const Tables& tables, Shared& shared) {
  for (int token = blockIdx.x; token < call.num_tokens; token += group.num_blocks) {
    const int from = threadIdx.x;
    if (from < 32 * kRankWords) {
      bool arrived = false;
      if (from < group.size && shared.peers.takes_part[from] && is_served(tables, token, from)) {
        const Turn turn = shared.peers.turn[from];
        const uint64_t* there = group.signals(group.at.sums_there, group.rank, from, turn.half) + token;
        arrived = wait_and_acquire(there, turn.number, group, Phase::combine_receive, from);
      }
      const unsigned int ranks = __ballot_sync(kAllLanes, arrived);
      if (from % 32 == 0) shared.arrived[from / 32] = ranks;
    }
    __syncthreads();
    add_sums(group, call, shared, token);
    __syncthreads();
  }
}

// Blocks send their weights before they wait for others', and all that they have to before they wait for
// sums; all blocks are resident.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    combine_kernel(const __grid_constant__ Group group, const __grid_constant__ Combine call) {
  __shared__ Shared shared;
  const Tables tables(call.tables, group);
  if (call.send) {
    send_all(group, call, tables, shared);
  } else if (threadIdx.x < group.size) {
    shared.peers.set(threadIdx.x, begun_call(group, call.peers, threadIdx.x));
  }
  __syncthreads();
  if (call.receive) receive_all(group, call, tables, shared);
}

}  // namespace

Status launch_combine(const Group& group, const Combine& combine) {
  const Status status = divide_memory(reinterpret_cast<const void*>(&combine_kernel));
  if (!status.is_ok()) return status;
  combine_kernel<<<group.num_blocks, kThreads, 0, combine.stream>>>(group, combine);
  return Status::from_cuda(cudaGetLastError(), "launching the low-latency combine kernel");
}

}  // namespace moe_ep::low_latency
