#include "nvlink/combine.h"

#include <type_traits>

#include "common/vector.cuh"
#include "nvlink/plan_tables.h"
#include "nvlink/rows.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kWarps = 16;
constexpr int kSendWarps = 8;
constexpr int kVectors = 2;  // 16-byte words of a row that a lane adds up at a time,
constexpr int kTerms = 4;    // of that many rows whose loads are under way at once
constexpr int kCopyVectors = 7;

struct Launch {
  Combine combine;
  Slots slots;
  int send_blocks;
};

// 16 bytes of a row as float32 numbers that are added to. Sums start from -0, the one number that changes no
// other.
template <typename T>
struct Sum {
  static constexpr int kElements = 16 / sizeof(T);
  float at[kElements];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = -0.0f;
  }

  __device__ __forceinline__ void add(const Vector<T, kElements>& values) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = __fadd_rn(at[i], to_float(values.at[i]));
  }

  // Zeros without a sign if there was `nothing` to add.
  __device__ __forceinline__ Vector<T, kElements> rounded(bool nothing) const {
    Vector<T, kElements> values;
#pragma unroll
    for (int i = 0; i < kElements; ++i) values.at[i] = from_float<T>(nothing ? 0.0f : at[i]);
    return values;
  }
};

// The terms of the sum of one token, lane by lane in the order of k.
struct Terms {
  const char* row;    // of this lane
  unsigned int rows;  // lanes that have one
  unsigned int ends;  // lanes that are the last of their rank: what it adds is rounded there
};

template <typename T>
struct Mover {
  static constexpr int kElements = Sum<T>::kElements;
  const Group& group;
  const Launch& launch;
  const Combine& combine;
  const PlanTables tables;
  const Call call;
  const Crew crew;
  const int lane;
  const int vectors;

  __device__ Mover(const Group& group, const Launch& launch, Call call)
      : group(group),
        launch(launch),
        combine(launch.combine),
        tables(const_cast<int*>(launch.combine.tables), group),
        call(call),
        crew(launch.send_blocks, kSendWarps),
        lane(threadIdx.x % 32),
        vectors(static_cast<int>(launch.combine.row_bytes / 16)) {}

  __device__ static Vector<T, kElements> load(const char* row, int vector) {
    const uint4 word = __ldcg(reinterpret_cast<const uint4*>(row) + vector);
    Vector<T, kElements> values;
    memcpy(&values, &word, sizeof(word));
    return values;
  }

  // Writes the sum of a token: biases, then ranks in the order of `terms`, each added up and rounded by
  // itself.
  __device__ void add_up(const Terms& terms, const char* const (&biases)[kMaxBiases], char* out) const {
    const bool nothing = terms.ends == 0 && biases[0] == nullptr;
    for (int begin = 0; begin < vectors; begin += 32 * kVectors) {
      Sum<T> total[kVectors], of_rank[kVectors];
      bool rank_has_rows = false;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        total[v].clear();
        of_rank[v].clear();
      }
#pragma unroll
      for (int b = 0; b < kMaxBiases; ++b) {
        if (biases[b] == nullptr) break;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int at = begin + 32 * v + lane;
          if (at < vectors) total[v].add(load(biases[b], at));
        }
      }
      unsigned int left = terms.rows | terms.ends;
      while (left) {
        Vector<T, kElements> words[kTerms][kVectors];
        int lanes[kTerms];
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          lanes[t] = left ? __ffs(left) - 1 : -1;
          left &= left - 1;
          const uint64_t address =
              __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(terms.row), max(lanes[t], 0));
          if (lanes[t] < 0 || !(terms.rows >> lanes[t] & 1)) continue;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int at = begin + 32 * v + lane;
            if (at < vectors) words[t][v] = load(reinterpret_cast<const char*>(address), at);
          }
        }
#pragma unroll
        for (int t = 0; t < kTerms; ++t) {
          if (lanes[t] < 0) continue;
          if (terms.rows >> lanes[t] & 1) {
            rank_has_rows = true;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) of_rank[v].add(words[t][v]);
          }
          if (terms.ends >> lanes[t] & 1) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              total[v].add(of_rank[v].rounded(!rank_has_rows));
              of_rank[v].clear();
            }
            rank_has_rows = false;
          }
        }
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = begin + 32 * v + lane;
        if (at < vectors) {
          store(reinterpret_cast<T*>(out) + static_cast<int64_t>(at) * kElements, total[v].rounded(nothing));
        }
      }
    }
  }

  __device__ int peer_of(int task) const { return (group.rank + 1 + task % (group.size - 1)) % group.size; }

  // Adds up the rows that this rank has for the tokens of others, and writes the sums into their windows.
  __device__ void send() const {
    int most = 0;
    for (int rank = lane; rank < group.size; rank += 32) {
      if (rank != group.rank) most = max(most, (tables.recv_count[rank] + kChunk - 1) / kChunk);
    }
    const int tasks = __reduce_max_sync(kAllLanes, most) * (group.size - 1);
    for (int task = crew.index; task < tasks; task += crew.size) {
      const int peer = peer_of(task);
      const int first = task / (group.size - 1) * kChunk;
      const int rows = min(kChunk, tables.recv_count[peer] - first);
      if (rows <= 0) continue;
      if (!warp_wait_drained(group, launch.slots, call, peer, first, Phase::combine_send)) return;
      const Ring ring(group, peer, group.rank);
      for (int i = 0; i < rows; ++i) send_row(peer, first + i, ring.slot(launch.slots, first + i));
      warp_announce(ring, launch.slots, call, first);
    }
  }

  __device__ void send_row(int peer, int arrival, char* slot) const {
    const int64_t pair = static_cast<int64_t>(peer) * group.max_tokens + arrival;
    const int row = lane < group.num_topk ? tables.arrival_rows[pair * group.num_topk + lane] : -1;
    const unsigned int here = __ballot_sync(kAllLanes, row >= 0);
    if (!combine.expert_layout && here) {
      const int64_t from = __shfl_sync(kAllLanes, row, __ffs(here) - 1);
      warp_place_row<kCopyVectors>(combine.rows + from * combine.row_bytes, vectors, slot, 0, 0, 1u);
    } else {
      const Terms terms{combine.rows + row * combine.row_bytes, here, here ? 1u << (31 - __clz(here)) : 0u};
      const char* const none[kMaxBiases] = {};
      add_up(terms, none, slot);
    }
    if (combine.row_weights != nullptr && lane < group.num_topk) {
      float* numbers = reinterpret_cast<float*>(slot + combine.row_bytes);
      numbers[lane] = row < 0 ? 0.0f : load_weight(row, lane);
    }
  }

  __device__ float load_weight(int64_t row, int k) const {
    return __ldcg(combine.row_weights + (combine.expert_layout ? row : row * group.num_topk + k));
  }

  // Adds up what all ranks have for this rank's tokens.
  __device__ void receive() const {
    for (int token = crew.index; token < combine.num_tokens; token += crew.size) {
      const int entry = lane < group.num_topk
                            ? tables.entries[static_cast<int64_t>(token) * group.num_topk + lane]
                            : PlanTables::kNone;
      const bool serves = entry != PlanTables::kNone;
      const bool remote = serves && (entry & PlanTables::kRemote);
      const bool last = serves && (entry & PlanTables::kLast);
      const int index = entry & PlanTables::kIndex;
      const int source = index / group.max_tokens, arrival = index % group.max_tokens;
      const char* slot = nullptr;
      bool arrived = true;
      if (remote) {
        const Ring ring(group, group.rank, source);
        slot = ring.slot(launch.slots, arrival);
        arrived = wait_for(ring.signal(launch.slots, arrival), call.stamp(arrival / launch.slots.rows + 1),
                           group, Phase::combine_receive, source);
      }
      if (!__all_sync(kAllLanes, arrived)) return;
      const bool own = serves && !remote && index != PlanTables::kDropped;
      const bool adds = remote ? last : own && (combine.expert_layout || last);
      Terms terms;
      terms.row = remote ? slot : combine.rows + index * combine.row_bytes;
      terms.rows = __ballot_sync(kAllLanes, adds);
      terms.ends = __ballot_sync(kAllLanes, last);
      const char* biases[kMaxBiases];
#pragma unroll
      for (int b = 0; b < kMaxBiases; ++b) {
        biases[b] = combine.biases[b] == nullptr ? nullptr : combine.biases[b] + token * combine.row_bytes;
      }
      add_up(terms, biases, combine.out + token * combine.row_bytes);
      if (combine.row_weights != nullptr && lane < group.num_topk) {
        float weight = 0.0f;
        if (remote) weight = __ldcg(reinterpret_cast<const float*>(slot + combine.row_bytes) + lane);
        if (own) weight = load_weight(index, lane);
        combine.out_weights[static_cast<int64_t>(token) * group.num_topk + lane] = weight;
      }
      for (unsigned int left = __ballot_sync(kAllLanes, remote && last); left; left &= left - 1) {
        const int rank = __shfl_sync(kAllLanes, source, __ffs(left) - 1);
        warp_consume(group, launch.slots, call, rank, 1, tables.send_count[rank]);
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    combine_kernel(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  if (has_failed(group)) return;
  const Call call{load_volatile(&group.workspace->calls)};
  const Mover<T> mover(group, launch, call);
  if (mover.crew.sends) {
    mover.send();
  } else {
    mover.receive();
  }
  finish_call(group, call);
}

}  // namespace

Status launch_combine(const Group& group, const Combine& combine) {
  Launch launch{combine, {}, 0};
  launch.slots.bytes = align16(combine.row_bytes + (combine.row_weights == nullptr ? 0 : 4 * group.num_topk));
  launch.slots.rows = ring_rows(group, launch.slots.bytes);
  if (group.size > 1) {
    if (launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
    launch.send_blocks = combine.num_blocks;
  }
  return for_dtype(combine.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    combine_kernel<T><<<combine.num_blocks, 32 * kWarps, 0, combine.stream>>>(group, launch);
    return Status::from_cuda(cudaGetLastError(), "launching the combine kernel");
  });
}

}  // namespace moe_ep::nvlink
