#include "low_latency/dispatch.h"

#include "common/vector.cuh"
#include "low_latency/quantize.cuh"
#include "low_latency/signals.cuh"

namespace moe_ep::low_latency {
namespace {

constexpr unsigned int kAllLanes = 0xFFFFFFFFu;

struct Shared {
  Peers peers;
  int counts[kMaxExperts];  // sending: this rank's tokens of each expert; receiving: [R][L]
  int expert[kMaxTopk];     // of the token that is sent, -1 for none
  int rank[kMaxTopk];       // that holds it
  int earlier[kMaxTopk];    // tokens with this expert before it
  int list[kMaxTopk];       // sending: the ranks that get the token; receiving: where its rows go
  int list_length;
};

__device__ __forceinline__ int lower_bits(unsigned int lanes, int lane) {
  return __popc(lanes & ((1u << lane) - 1));
}

// Puts the lanes' values that are wanted into the list, in order. By one warp.
__device__ __forceinline__ void make_list(Shared& shared, bool wanted, int value) {
  const int lane = threadIdx.x % 32;
  const unsigned int lanes = __ballot_sync(kAllLanes, wanted);
  if (wanted) shared.list[lower_bits(lanes, lane)] = value;
  if (lane == 0) shared.list_length = __popc(lanes);
}

// What makes 16 bytes of a row that travels.
template <bool kFp8>
struct Piece {
  static constexpr int kChannels = kFp8 ? 16 : 8;
  uint4 words[kFp8 ? 2 : 1];
};

template <bool kFp8>
__device__ __forceinline__ Piece<kFp8> load_piece(const Group& group, const Dispatch& call, int token,
                                                  int index) {
  Piece<kFp8> piece{};
  if (index * Piece<kFp8>::kChannels < group.hidden) {
    const auto* from = static_cast<const __nv_bfloat16*>(call.x) +
                       static_cast<int64_t>(token) * group.hidden + index * Piece<kFp8>::kChannels;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(piece) / 16); ++i) {
      piece.words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    }
  }
  return piece;
}

// Scales follow the row's FP8 channels.
__device__ __forceinline__ int64_t scales_offset(const Group& group) {
  return nvlink::align16(group.hidden);
}

// Quantises a piece and writes it to all ranks of the list. By whole warps.
template <bool kFp8>
__device__ __forceinline__ void send_piece(const Group& group, const Dispatch& call, const Shared& shared,
                                           int token, int index, const Piece<kFp8>& piece) {
  uint4 bytes = piece.words[0];
  float scale = 0;
  if constexpr (kFp8) {
    const auto quantized = quantize(piece.words, call.format != Format::fp8, scale);
    memcpy(&bytes, &quantized, sizeof(bytes));
  }
  if (index * Piece<kFp8>::kChannels >= group.hidden) return;
  for (int i = 0; i < shared.list_length; ++i) {
    const int to = shared.list[i];
    if (!shared.peers.takes_part[to]) continue;
    char* row =
        group.place(group.at.rows, to, group.rank, shared.peers.turn[to].half) + token * group.row_bytes();
    reinterpret_cast<uint4*>(row)[index] = bytes;
    constexpr int kPieces = kScaleBlock / Piece<kFp8>::kChannels;
    if (kFp8 && index % kPieces == 0) {
      reinterpret_cast<float*>(row + scales_offset(group))[index / kPieces] = scale;
    }
  }
}

// A token, or word that there is none, to all ranks.
template <bool kFp8>
__device__ void send_token(const Group& group, const Dispatch& call, const Tables& tables, Shared& shared,
                           int token, Peer& peer) {
  const int lane = threadIdx.x % 32, thread = threadIdx.x;
  const int end = token < call.num_tokens ? token * call.num_topk : 0;  // of the earlier tokens' ids
  const bool exists = token < call.num_tokens;

  // All that has to be loaded, before anything waits for it.
  const uint64_t* read[2] = {};
  uint64_t seen[2] = {};
  if (thread < group.size) {
#pragma unroll
    for (unsigned int half = 0; half < 2; ++half) {
      read[half] = group.signals(group.at.rows_read, group.rank, thread, half) + token;
      seen[half] = nvlink::load_relaxed(read[half]);
    }
  }
  Piece<kFp8> pieces[kAhead] = {};
  int ids[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (exists) pieces[i] = load_piece<kFp8>(group, call, token, thread + i * kThreads);
    const int at = thread + i * kThreads;
    ids[i] = at < end ? expert_id(group, call.topk_idx, call.is_int64, at) : -1;
  }

  if (thread < 32) {
    const int64_t at = static_cast<int64_t>(token) * call.num_topk + lane;
    const int expert =
        exists && lane < call.num_topk ? expert_id(group, call.topk_idx, call.is_int64, at) : -1;
    const int rank = expert < 0 ? -1 : expert / group.num_local;
    shared.expert[lane] = expert;
    shared.rank[lane] = rank;
    shared.earlier[lane] = 0;
    const unsigned int same = __match_any_sync(kAllLanes, rank);
    make_list(shared, rank >= 0 && lower_bits(same, lane) == 0, rank);
  }
  if (thread < group.size) {
    const Turn turn = turn_of(peer.call);
    uint64_t signal = turn.half ? seen[1] : seen[0];
    peer.takes_part = peer.takes_part && wait_for(turn.half ? read[1] : read[0], before(turn.number), group,
                                                  Phase::dispatch_send, thread, signal);
    shared.peers.set(thread, peer);
  }
  __syncthreads();

  const int warp_begin = thread - lane;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    const int first = warp_begin + i * kThreads;
    if (first * Piece<kFp8>::kChannels < group.hidden) {
      send_piece(group, call, shared, token, first + lane, pieces[i]);
    }
  }
  for (int first = warp_begin + kAhead * kThreads; first * Piece<kFp8>::kChannels < group.hidden;
       first += kThreads) {
    send_piece(group, call, shared, token, first + lane,
               load_piece<kFp8>(group, call, exists ? token : 0, first + lane));
  }

  const auto count = [&](int id) {
    if (id < 0) return;
    for (int k = 0; k < call.num_topk; ++k) {
      if (shared.expert[k] == id) atomicAdd(&shared.earlier[k], 1);
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) count(ids[i]);
  for (int at = thread + kAhead * kThreads; at < end; at += kThreads) {
    count(expert_id(group, call.topk_idx, call.is_int64, at));
  }
  __syncthreads();

  if (thread < 32) {
    // What all threads wrote comes before these.
    for (int i = lane; i < shared.list_length; i += 32) {
      const int to = shared.list[i];
      const Turn turn = shared.peers.turn[to];
      uint64_t* there = group.signals(group.at.rows_there, to, group.rank, turn.half) + token;
      if (shared.peers.takes_part[to]) nvlink::store_release(there, signal(turn.number, true));
    }
    const int rank = shared.rank[lane];
    const bool served = rank >= 0 && shared.peers.takes_part[rank];
    for (int word = 0; word < kRankWords; ++word) {
      const unsigned int bits =
          __reduce_or_sync(kAllLanes, served && rank / 32 == word ? 1u << rank % 32 : 0);
      if (exists && lane == 0) tables.served[token * kRankWords + word] = bits;
    }
    return;
  }
  for (int i = thread - 32; i < group.size * call.num_topk; i += kThreads - 32) {
    const int to = i / call.num_topk, k = i % call.num_topk;
    if (!shared.peers.takes_part[to]) continue;
    const Turn turn = shared.peers.turn[to];
    const int earlier = shared.earlier[k];
    // A token that names an expert twice, which none may, has no second place.
    const bool goes = shared.rank[k] == to && earlier < group.max_tokens;
    const unsigned int value = earlier << kExpertBits | (shared.expert[k] - to * group.num_local);
    send(group.signals(group.at.routes, to, group.rank, turn.half) + token * kMaxTopk + k,
         signal(turn.number, goes, goes ? value : 0));
  }
}

// This rank's tokens of each expert, to the ranks that hold them.
__device__ void send_counts(const Group& group, const Dispatch& call, Shared& shared, Peer& peer) {
  if (threadIdx.x < group.size) shared.peers.set(threadIdx.x, peer);
  for (int i = threadIdx.x; i < group.num_experts; i += kThreads) shared.counts[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < call.num_tokens * call.num_topk; i += kThreads) {
    const int expert = expert_id(group, call.topk_idx, call.is_int64, i);
    if (expert >= 0) atomicAdd(&shared.counts[expert], 1);
  }
  // Counts are read by all blocks there, each before it reads rows.
  const int per_rank = group.max_tokens + 1;
  for (int i = threadIdx.x; i < group.size * per_rank; i += kThreads) {
    const int from = i / per_rank;
    if (!shared.peers.takes_part[from]) continue;
    const Turn turn = shared.peers.turn[from];
    const uint64_t* read = group.signals(group.at.rows_read, group.rank, from, turn.half) + i % per_rank;
    uint64_t seen;
    if (!wait(read, before(turn.number), group, Phase::dispatch_send, from, seen)) {
      shared.peers.takes_part[from] = 0;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group.num_experts; i += kThreads) {
    const int to = i / group.num_local;
    if (!shared.peers.takes_part[to]) continue;
    const Turn turn = shared.peers.turn[to];
    send(group.signals(group.at.counts, to, group.rank, turn.half) + i % group.num_local,
         signal(turn.number, true, min(shared.counts[i], group.max_tokens)));
  }
  if (threadIdx.x < group.size) peer.takes_part = shared.peers.takes_part[threadIdx.x];
}

template <bool kFp8>
__device__ void send_all(const Group& group, const Dispatch& call, const Tables& tables, Shared& shared) {
  Peer peer{};
  if (threadIdx.x < group.size) peer = next_call(group, Operation::dispatch, threadIdx.x);
  const Peer begun = peer;
  for (int item = blockIdx.x; item <= group.max_tokens; item += group.num_blocks) {
    if (item == 0) {
      send_counts(group, call, shared, peer);
    } else {
      send_token<kFp8>(group, call, tables, shared, item - 1, peer);
    }
    __syncthreads();
  }
  if (threadIdx.x < group.size) {
    shared.peers.set(threadIdx.x, peer);
    if (begun.takes_part) *calls_with(group, Operation::dispatch, threadIdx.x) = begun.call + 1;
    if (blockIdx.x == 0) tables.peers[threadIdx.x] = peer;
  }
}

__device__ void read_counts(const Group& group, Shared& shared) {
  for (int i = threadIdx.x; i < group.num_experts; i += kThreads) {
    const int from = i / group.num_local;
    uint64_t seen = 0;
    if (shared.peers.takes_part[from]) {
      const Turn turn = shared.peers.turn[from];
      const uint64_t* count =
          group.signals(group.at.counts, group.rank, from, turn.half) + i % group.num_local;
      if (!wait(count, turn.number, group, Phase::dispatch_receive, from, seen)) {
        shared.peers.takes_part[from] = 0;
      }
    }
    shared.counts[i] = static_cast<int>(value_in(seen));
  }
  __syncthreads();
}

__device__ __forceinline__ int count_of(const Group& group, const Shared& shared, int from, int expert) {
  return shared.peers.takes_part[from] ? shared.counts[from * group.num_local + expert] : 0;
}

__device__ void write_counts(const Group& group, const Dispatch& call, const Shared& shared) {
  for (int expert = threadIdx.x; expert < group.num_local; expert += kThreads) {
    int total = 0;
    for (int from = 0; from < group.size; ++from) {
      const int count = count_of(group, shared, from, expert);
      call.ranges[expert * group.size + from] = static_cast<int64_t>(total) << 32 | count;
      total += count;
    }
    call.tokens_of_expert[expert] = total;
    if (call.statistics) call.statistics[expert] += total;
  }
}

// Finds the places of a token's rows, and waits for it. By one warp.
__device__ void find_places(const Group& group, const Dispatch& call, const Tables& tables, Shared& shared,
                            int from, int token) {
  const int lane = threadIdx.x % 32;
  int slot = -1;
  if (shared.peers.takes_part[from]) {
    const Turn turn = shared.peers.turn[from];
    if (lane < call.num_topk) {
      const uint64_t* route =
          group.signals(group.at.routes, group.rank, from, turn.half) + token * kMaxTopk + lane;
      uint64_t seen;
      if (wait(route, turn.number, group, Phase::dispatch_receive, from, seen) && is_yes(seen)) {
        const int expert = value_in(seen) & (kMaxExperts - 1);
        int place = value_in(seen) >> kExpertBits;
        for (int source = 0; source < from; ++source) place += count_of(group, shared, source, expert);
        slot = expert * group.capacity() + place;
      }
    }
    if (__any_sync(kAllLanes, slot >= 0)) {
      bool is_there = true;
      if (lane == 0) {
        const uint64_t* there = group.signals(group.at.rows_there, group.rank, from, turn.half) + token;
        is_there = wait_and_acquire(there, turn.number, group, Phase::dispatch_receive, from);
      }
      if (!__all_sync(kAllLanes, is_there)) slot = -1;
    }
  }
  make_list(shared, slot >= 0, slot);
  if (slot >= 0) call.source_token[slot] = token;
  if (lane < call.num_topk) {
    tables.slots[(static_cast<int64_t>(from) * group.max_tokens + token) * call.num_topk + lane] = slot;
  }
}

// Copies a token's row to all its places.
template <bool kFp8>
__device__ void copy_row(const Group& group, const Dispatch& call, const Shared& shared, int from,
                         int token) {
  const char* row =
      group.place(group.at.rows, group.rank, from, shared.peers.turn[from].half) + token * group.row_bytes();
  const int64_t row_bytes = kFp8 ? group.hidden : group.row_bytes();
  const int words = static_cast<int>(row_bytes / 16);
  for (int first = threadIdx.x; first < words; first += kAhead * kThreads) {
    uint4 bytes[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = first + i * kThreads;
      if (at < words) bytes[i] = __ldcg(reinterpret_cast<const uint4*>(row) + at);
    }
    for (int place = 0; place < shared.list_length; ++place) {
      auto* to = reinterpret_cast<uint4*>(call.rows + shared.list[place] * row_bytes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int at = first + i * kThreads;
        if (at < words) to[at] = bytes[i];
      }
    }
  }
  if constexpr (kFp8) {
    const auto* scales = reinterpret_cast<const unsigned int*>(row + scales_offset(group));
    const bool as_exponents = call.format == Format::fp8_exponents;
    const int columns = (group.hidden + kScaleBlock - 1) / kScaleBlock / (as_exponents ? 4 : 1);
    for (int i = threadIdx.x; i < columns * shared.list_length; i += kThreads) {
      const int column = i % columns, slot = shared.list[i / columns];
      const int expert = slot / group.capacity(), place = slot % group.capacity();
      unsigned int word;
      if (as_exponents) {
        const uint4 four = __ldcg(reinterpret_cast<const uint4*>(scales) + column);
        word = four.x >> 23 | four.y >> 23 << 8 | four.z >> 23 << 16 | four.w >> 23 << 24;
      } else {
        word = __ldcg(scales + column);
      }
      const int64_t line = static_cast<int64_t>(expert) * columns + column;
      static_cast<unsigned int*>(call.scales)[line * group.capacity() + place] = word;
    }
  }
}

template <bool kFp8>
__device__ void receive_all(const Group& group, const Dispatch& call, const Tables& tables, Shared& shared) {
  const int num_items = group.capacity() + 1;
  if (blockIdx.x >= num_items) return;
  read_counts(group, shared);
  for (int item = blockIdx.x; item < num_items; item += group.num_blocks) {
    if (item == 0) {
      write_counts(group, call, shared);
      __syncthreads();
      const int to = threadIdx.x;
      if (to < group.size && shared.peers.takes_part[to]) {
        const Turn turn = shared.peers.turn[to];
        nvlink::store_release(group.signals(group.at.rows_read, to, group.rank, turn.half) + group.max_tokens,
                              signal(turn.number, true));
      }
      continue;
    }
    // This rank's own rows first: they are there first.
    const int from = (group.rank + (item - 1) / group.max_tokens) % group.size;
    const int token = (item - 1) % group.max_tokens;
    if (threadIdx.x < 32) find_places(group, call, tables, shared, from, token);
    __syncthreads();
    copy_row<kFp8>(group, call, shared, from, token);
    __syncthreads();
    if (threadIdx.x == 0 && shared.peers.takes_part[from]) {
      const Turn turn = shared.peers.turn[from];
      nvlink::store_release(group.signals(group.at.rows_read, from, group.rank, turn.half) + token,
                            signal(turn.number, true));
    }
  }
}

// Blocks send all that they have to before they wait for others' rows, and all blocks are resident.
template <bool kFp8>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    dispatch_kernel(const __grid_constant__ Group group, const __grid_constant__ Dispatch call) {
  __shared__ Shared shared;
  const Tables tables(call.tables, group);
  if (call.send) {
    send_all<kFp8>(group, call, tables, shared);
  } else if (threadIdx.x < group.size) {
    shared.peers.set(threadIdx.x, begun_call(group, tables.peers, threadIdx.x));
  }
  __syncthreads();
  if (call.receive) receive_all<kFp8>(group, call, tables, shared);
}

}  // namespace

Status launch_dispatch(const Group& group, const Dispatch& dispatch) {
  const auto kernel = dispatch.format == Format::bfloat16 ? &dispatch_kernel<false> : &dispatch_kernel<true>;
  const Status status = divide_memory(reinterpret_cast<const void*>(kernel));
  if (!status.is_ok()) return status;
  kernel<<<group.num_blocks, kThreads, 0, dispatch.stream>>>(group, dispatch);
  return Status::from_cuda(cudaGetLastError(), "launching the low-latency dispatch kernel");
}

}  // namespace moe_ep::low_latency
