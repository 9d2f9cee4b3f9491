#pragma once

#include <cstdint>

#include "nvlink/bulk.cuh"
#include "nvlink/sync.cuh"

// The rings that rows travel in: where a row lies, what announces it, and when its place is free again.
namespace moe_ep::nvlink {

constexpr unsigned int kAllLanes = 0xFFFFFFFFu;

// Whether the next item of a job can be had.
enum class Fetched { ready, not_yet, none, failed };

// Asks for a signal, for a whole warp, whose lanes may then read what it announces.
__device__ __forceinline__ Fetched warp_fetch(const uint64_t* signal, uint64_t value, const Group& group,
                                              Phase phase, int peer, bool wait) {
  bool arrived = true;
  if (threadIdx.x % 32 == 0) {
    arrived = wait ? wait_for(signal, value, group, phase, peer) : load_acquire(signal) >= value;
  }
  arrived = __shfl_sync(kAllLanes, arrived, 0);
  __syncwarp();
  bulk::fence_global();
  return arrived ? Fetched::ready : wait ? Fetched::failed : Fetched::not_yet;
}

// How the rows of one rank for another are taken and announced: kChunk at a time, and the last ones one by
// one, so that no warp still has much to do when the others have ended.
struct Chunking {
  int rows;
  int coarse;  // chunks of kChunk rows; or less, the last one, if all chunks are coarse
  bool has_fine;

  __device__ int chunks() const { return coarse + (has_fine ? rows - coarse * kChunk : 0); }
  __device__ int first_row(int chunk) const {
    return chunk <= coarse ? chunk * kChunk : coarse * kChunk + chunk - coarse;
  }
  __device__ int rows_of(int chunk) const {
    return min(chunk < coarse ? kChunk : 1, rows - first_row(chunk));
  }
  __device__ int chunk_of(int row) const {
    return row < coarse * kChunk ? row / kChunk : coarse + row - coarse * kChunk;
  }
};

// How rows lie in a ring: each in a slot, with numbers that belong to it behind it.
struct Slots {
  int64_t bytes;    // of a slot: a multiple of 16
  int rows;         // that a ring holds: a multiple of kChunk
  bool has_rounds;  // a rank may have more rows than a ring

  Slots() = default;
  Slots(const Group& group, int64_t slot_bytes)
      : bytes(slot_bytes), rows(ring_rows(group, slot_bytes)), has_rounds(rows < group.max_tokens) {}

  // Of `count` rows for one of `peers` ranks.
  __device__ Chunking chunking(int count, int peers) const {
    if (has_rounds) return {count, (count + kChunk - 1) / kChunk, false};
    return {count, max(0, count - kFineRows / peers) / kChunk, true};
  }

  // Of the row with this index among those of its rank: how often the ring was full before it, and its place.
  __device__ int round(int index) const { return has_rounds ? index / rows : 0; }
  __device__ int place(int index) const { return has_rounds ? index % rows : index; }
};

// One call of dispatch or combine, seen from one warp.
struct Call {
  uint64_t number;

  // Rows of a round fill a ring once; most calls need one round. A signal only ever grows.
  __device__ uint64_t stamp(int round) const { return number << 16 | static_cast<uint64_t>(round); }
};

// The ring of rank `from` in the window of rank `at_rank`.
struct Ring {
  char* slots;
  uint64_t* arrived;  // signals, by chunk

  __device__ Ring(const Group& group, int at_rank, int from)
      : slots(group.ring(at_rank, from)),
        arrived(reinterpret_cast<uint64_t*>(group.windows[at_rank] + group.at.arrived) +
                from * group.at.chunks) {}

  __device__ char* slot(const Slots& shape, int index) const {
    return slots + shape.place(index) * shape.bytes;
  }
  // Of the chunk that this row belongs to.
  __device__ uint64_t* signal(const Slots& shape, const Chunking& chunking, int index) const {
    return arrived + chunking.chunk_of(shape.place(index));
  }
};

// Which signal says that `reader` has drained the ring that `writer` fills; it lies with the writer.
__device__ __forceinline__ uint64_t* drained_signal(const Group& group, int writer, int reader) {
  return reinterpret_cast<uint64_t*>(group.windows[writer] + group.at.drained) + reader;
}

// Before rows of a round are written for `peer`: it has read those of the round before.
__device__ __forceinline__ Fetched warp_fetch_drained(const Group& group, Call call, int peer, int round,
                                                      Phase phase, bool wait) {
  return warp_fetch(drained_signal(group, group.rank, peer), call.stamp(round), group, phase, peer, wait);
}

// Before the first round, for a whole warp: all peers have read what they were sent in the call before.
__device__ __forceinline__ bool first_round_may_begin(const Group& group, Call call, Phase phase) {
  bool drained = true;
  for (int peer = threadIdx.x % 32; peer < group.size; peer += 32) {
    if (peer == group.rank) continue;
    drained &= wait_for(drained_signal(group, group.rank, peer), call.stamp(0), group, phase, peer);
  }
  return __all_sync(kAllLanes, drained);
}

// After all lanes have read `rows` rows, of `count` that come from `source` in this call: lets the next round
// begin.
__device__ __forceinline__ void warp_consume(const Group& group, const Slots& slots, Call call, int source,
                                             int rows, int count) {
  if (!slots.has_rounds || count <= slots.rows) return;
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  __threadfence_system();
  const int consumed =
      static_cast<int>(atomicAdd(&group.workspace->consumed[source], static_cast<unsigned int>(rows))) + rows;
  if (consumed % slots.rows == 0 && consumed < count) {
    store_release(drained_signal(group, source, group.rank), call.stamp(consumed / slots.rows));
  }
}

// At the end of a kernel, by all threads: the next call may begin, here and on all ranks. What blocks have
// read they have used, so there is nothing to wait for; what they wrote is seen when the kernel has ended.
__device__ __forceinline__ void finish_call(const Group& group, Call call) {
  if (!is_last_block<false>(&group.workspace->blocks_done) || has_failed(group)) return;
  if (threadIdx.x < group.size) {
    group.workspace->consumed[threadIdx.x] = 0;
    if (threadIdx.x != group.rank) {
      store_relaxed(drained_signal(group, threadIdx.x, group.rank), call.stamp(0) + (1 << 16));
    }
  }
  if (threadIdx.x < 3) group.workspace->tasks[threadIdx.x] = 0;
  if (threadIdx.x == 0) group.workspace->calls = call.number + 1;
}

}  // namespace moe_ep::nvlink
