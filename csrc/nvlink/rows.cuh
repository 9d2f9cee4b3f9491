#pragma once

#include <cstdint>

#include "nvlink/sync.cuh"

// Warps that move rows, and the rings that rows travel in.
namespace moe_ep::nvlink {

constexpr unsigned int kAllLanes = 0xFFFFFFFFu;

// How rows lie in a ring: each in a slot, with numbers that belong to it behind it.
struct Slots {
  int64_t bytes;  // of a slot: a multiple of 16
  int rows;       // that a ring holds: a multiple of kChunk
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
    return slots + index % shape.rows * shape.bytes;
  }
  __device__ uint64_t* signal(const Slots& shape, int index) const {
    return arrived + index % shape.rows / kChunk;
  }
};

// Which signal says that `reader` has drained the ring that `writer` fills; it lies with the writer.
__device__ __forceinline__ uint64_t* drained_signal(const Group& group, int writer, int reader) {
  return reinterpret_cast<uint64_t*>(group.windows[writer] + group.at.drained) + reader;
}

// Before rows from `first` on are written for `peer`: it has read what lies there.
__device__ __forceinline__ bool warp_wait_drained(const Group& group, const Slots& slots, Call call, int peer,
                                                  int first, Phase phase) {
  return warp_wait_for(drained_signal(group, group.rank, peer), call.stamp(first / slots.rows), group, phase,
                       peer);
}

// After all lanes have written the chunk that begins at `first`.
__device__ __forceinline__ void warp_announce(const Ring& ring, const Slots& slots, Call call, int first) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) store_release(ring.signal(slots, first), call.stamp(first / slots.rows + 1));
}

__device__ __forceinline__ bool warp_wait_arrived(const Group& group, const Ring& ring, const Slots& slots,
                                                  Call call, int source, int index, Phase phase) {
  return warp_wait_for(ring.signal(slots, index), call.stamp(index / slots.rows + 1), group, phase, source);
}

// After all lanes have read `rows` rows, of `count` that come from `source` in this call: lets the next round
// begin.
__device__ __forceinline__ void warp_consume(const Group& group, const Slots& slots, Call call, int source,
                                             int rows, int count) {
  if (count <= slots.rows) return;
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  __threadfence_system();
  const int consumed =
      static_cast<int>(atomicAdd(&group.workspace->consumed[source], static_cast<unsigned int>(rows))) + rows;
  if (consumed % slots.rows == 0 && consumed < count) {
    store_release(drained_signal(group, source, group.rank), call.stamp(consumed / slots.rows));
  }
}

// At the end of a kernel, by all threads: the next call may begin, here and on all ranks.
__device__ __forceinline__ void finish_call(const Group& group, Call call) {
  if (!is_last_block(&group.workspace->blocks_done) || has_failed(group)) return;
  if (threadIdx.x < group.size) {
    group.workspace->consumed[threadIdx.x] = 0;
    if (threadIdx.x != group.rank) {
      store_release(drained_signal(group, threadIdx.x, group.rank), call.stamp(0) + (1 << 16));
    }
  }
  if (threadIdx.x == 0) group.workspace->calls = call.number + 1;
}

// The warps of a grid in two crews: those that fill peers' rings, and all others.
struct Crew {
  bool sends;
  int index;  // within the crew
  int size;

  __device__ Crew(int send_blocks, int send_warps) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, block = blockIdx.x;
    sends = block < send_blocks && warp < send_warps;
    if (sends) {
      index = warp * send_blocks + block;  // neighbours in different blocks
      size = send_blocks * send_warps;
      return;
    }
    const int others = warps - send_warps;  // of a block that sends
    const int blocks = gridDim.x;
    size = blocks * warps - send_blocks * send_warps;
    if (block < send_blocks) {
      const int round = warp - send_warps;
      index = round * blocks + block;
    } else if (warp < others) {
      index = warp * blocks + block;
    } else {
      index = others * blocks + (warp - others) * (blocks - send_blocks) + block - send_blocks;
    }
  }
};

// Copies a row of `vectors` 16-byte words to the rows `place` of `base` that the lanes in `lanes` name.
template <int Vectors>
__device__ __forceinline__ void warp_place_row(const char* from, int vectors, char* base, int64_t row_bytes,
                                               int place, unsigned int lanes) {
  const uint4* source = reinterpret_cast<const uint4*>(from);
  for (int begin = threadIdx.x % 32; begin - static_cast<int>(threadIdx.x % 32) < vectors;
       begin += 32 * Vectors) {
    uint4 words[Vectors];
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
      if (begin + 32 * i < vectors) words[i] = __ldcg(source + begin + 32 * i);
    }
    for (unsigned int left = lanes; left; left &= left - 1) {
      const int64_t row = __shfl_sync(kAllLanes, place, __ffs(left) - 1);
      uint4* to = reinterpret_cast<uint4*>(base + row * row_bytes);
#pragma unroll
      for (int i = 0; i < Vectors; ++i) {
        if (begin + 32 * i < vectors) to[begin + 32 * i] = words[i];
      }
    }
  }
}

}  // namespace moe_ep::nvlink
