#pragma once

#include <climits>
#include <cstdint>

#include "nvlink/bulk.cuh"
#include "nvlink/sync.cuh"

// Warps that move rows, and the rings that rows travel in.
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

// Before rows of a round are written for `peer`: it has read those of the round before.
__device__ __forceinline__ Fetched warp_fetch_drained(const Group& group, Call call, int peer, int round,
                                                      Phase phase, bool wait) {
  return warp_fetch(drained_signal(group, group.rank, peer), call.stamp(round), group, phase, peer, wait);
}

// Before the first round, for a whole warp: all peers have read what they were sent in the call before.
__device__ __forceinline__ bool may_send(const Group& group, Call call, Phase phase) {
  bool drained = true;
  for (int peer = threadIdx.x % 32; peer < group.size; peer += 32) {
    if (peer == group.rank) continue;
    drained &= wait_for(drained_signal(group, group.rank, peer), call.stamp(0), group, phase, peer);
  }
  return __all_sync(kAllLanes, drained);
}

__device__ __forceinline__ Fetched warp_fetch_arrived(const Group& group, const Ring& ring,
                                                      const Slots& slots, Call call, int source, int index,
                                                      Phase phase, bool wait) {
  return warp_fetch(ring.signal(slots, index), call.stamp(index / slots.rows + 1), group, phase, source,
                    wait);
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
  if (threadIdx.x < 3) group.workspace->tasks[threadIdx.x] = 0;
  if (threadIdx.x == 0) group.workspace->calls = call.number + 1;
}

// The blocks of a grid in two crews: the first ones fill peers' rings, the others see to what arrives. They
// don't share a multiprocessor, since what waits for the link there would hold up what does not.
struct Crew {
  bool sends;
  int index;  // of this warp, within the crew
  int size;

  __device__ explicit Crew(int send_blocks) : sends(static_cast<int>(blockIdx.x) < send_blocks) {
    const int blocks = sends ? send_blocks : gridDim.x - send_blocks;
    const int block = sends ? blockIdx.x : blockIdx.x - send_blocks;
    index = threadIdx.x / 32 * blocks + block;  // neighbours in different blocks
    size = blockDim.x / 32 * blocks;
  }

  // A crew each of whose warps keeps to one of `ranks` when given numbers in turn. Spare warps have none.
  __device__ Crew keeping_to(int ranks) const {
    Crew crew = *this;
    crew.size -= size % ranks;
    if (index >= crew.size) crew.index = INT_MAX / 2;
    return crew;
  }
};

// How the shared memory of each warp is divided: row segments of `segment_bytes` in stages with room for a
// little more.
struct BeltShape {
  int segment_bytes;
  int stage_bytes;
  int stages;
};

// What is shared out among warps: Workspace::tasks.
enum TaskKind { kSending, kOwn, kReceiving };

// The rows that one item of work reads, one in each lane of `lanes`: segment by segment, and in each by lane.
struct Rows {
  const char* of_lane;
  unsigned int lanes;
};

// Segments of rows on their way through the shared memory of a warp: a queue whose bulk loads run ahead of
// their use. With `Forwards`, its segments leave by bulk stores of lane 0, one group for each; otherwise
// lanes read them.
template <bool Forwards>
class Belt {
 public:
  // How far the loads of an item have been queued.
  struct Cursor {
    int begin = 0;
    unsigned int left = 0;

    Cursor() = default;
    __device__ explicit Cursor(const Rows& rows) : left(rows.lanes) {}
  };

  __device__ Belt(char* memory, uint64_t* barriers, const BeltShape& shape, int row_bytes)
      : stages_(memory), barriers_(barriers), shape_(shape), row_bytes_(row_bytes) {
    if (is_first_lane()) {
      for (int i = 0; i < shape.stages; ++i) bulk::init(barriers + i);
      bulk::publish_barriers();
    }
    __syncwarp();
  }

  __device__ int bytes_from(int begin) const { return min(shape_.segment_bytes, row_bytes_ - begin); }
  __device__ int segment_bytes() const { return shape_.segment_bytes; }
  __device__ int row_bytes() const { return row_bytes_; }

  // Queues what there is room for; true if all of the item is queued.
  __device__ __forceinline__ bool queue(const Rows& rows, Cursor& cursor) {
    while (cursor.left && cursor.begin < row_bytes_) {
      if (queued_ == shape_.stages - Forwards) return false;
      const uint64_t row =
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(rows.of_lane), __ffs(cursor.left) - 1);
      if (is_first_lane()) {
        if (Forwards) bulk::wait_until_read<1>();
        bulk::load(stages_ + put_ * shape_.stage_bytes, reinterpret_cast<const char*>(row) + cursor.begin,
                   bytes_from(cursor.begin), barriers_ + put_);
      }
      put_ = put_ + 1 == shape_.stages ? 0 : put_ + 1;
      ++queued_;
      cursor.left &= cursor.left - 1;
      if (cursor.left == 0) {
        cursor.left = rows.lanes;
        cursor.begin += shape_.segment_bytes;
      }
    }
    return true;
  }

  // The oldest segment that was queued. Lanes that read it do so before the next call.
  __device__ __forceinline__ char* take() {
    char* stage = stages_ + take_ * shape_.stage_bytes;
    bulk::wait(barriers_ + take_, parity_);
    --queued_;
    if (++take_ == shape_.stages) {
      take_ = 0;
      parity_ ^= 1;
    }
    return stage;
  }

 private:
  __device__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }

  char* stages_;
  uint64_t* barriers_;
  const BeltShape& shape_;
  int row_bytes_;
  int queued_ = 0;
  int put_ = 0;
  int take_ = 0;
  unsigned int parity_ = 0;
};

// Tells peers of chunks once the bulk stores that fill them are complete, which those behind need not wait
// for.
class Announcer {
 public:
  // Lane 0 has closed a group of stores.
  __device__ __forceinline__ void count_group() {
    ++groups_;
    if (signal_ != nullptr && groups_ - last_of_chunk_ >= kLag) {
      if (threadIdx.x % 32 == 0) {
        bulk::wait_until_written<kLag>();
        store_relaxed(signal_, stamp_);
      }
      signal_ = nullptr;
    }
  }

  // The group closed last is the last one of the chunk that begins at `first`.
  __device__ __forceinline__ void end_chunk(const Ring& ring, const Slots& slots, Call call, int first) {
    flush();
    signal_ = ring.signal(slots, first);
    stamp_ = call.stamp(first / slots.rows + 1);
    last_of_chunk_ = groups_;
  }

  __device__ __forceinline__ void flush() {
    if (signal_ != nullptr && threadIdx.x % 32 == 0) {
      bulk::wait_until_written<0>();
      store_relaxed(signal_, stamp_);
    }
    signal_ = nullptr;
  }

 private:
  static constexpr int kLag = 4;
  uint64_t* signal_ = nullptr;
  uint64_t stamp_ = 0;
  int groups_ = 0;
  int last_of_chunk_ = 0;
};

// Runs the items of a job, loading each while the one before is processed. A job has
//   Fetched fetch(Item&, bool wait)   the next item in order; without `wait`, not_yet if it would have to
//   wait void process(const Item&, Belt&, LoadAhead&)   calls load_ahead() before it takes a segment from the
//   belt
template <typename Job, bool Forwards>
__device__ __forceinline__ void run_job(Job& job, Belt<Forwards>& belt) {
  using Cursor = typename Belt<Forwards>::Cursor;
  typename Job::Item item, next;
  Cursor loaded, loaded_next;
  Fetched fetched = job.fetch(item, true);
  if (fetched != Fetched::ready) return;
  loaded = Cursor(item.rows);
  for (;;) {
    fetched = job.fetch(next, false);
    if (fetched == Fetched::failed) return;
    if (fetched == Fetched::ready) loaded_next = Cursor(next.rows);
    const auto load_ahead = [&] {
      if (belt.queue(item.rows, loaded) && fetched == Fetched::ready) belt.queue(next.rows, loaded_next);
    };
    job.process(item, belt, load_ahead);
    if (fetched == Fetched::none) return;
    if (fetched == Fetched::not_yet) {
      if (job.fetch(next, true) != Fetched::ready) return;
      loaded_next = Cursor(next.rows);
    }
    item = next;
    loaded = loaded_next;
  }
}

// The numbers 0, 1, 2... shared out among warps, to each when it has time, or in turn. What it takes to get
// the one after next is under way while a warp works.
class Tasks {
 public:
  // `counter`: of all warps that share; null: in turn.
  __device__ Tasks(unsigned int* counter, const Crew& crew) : counter_(counter), stride_(crew.size) {
    later_ = counter == nullptr ? crew.index : take();
    advance();
    advance();
  }

  __device__ int current() const { return current_; }
  __device__ int next() const { return next_; }

  __device__ __forceinline__ void advance() {
    current_ = next_;
    next_ = counter_ == nullptr ? later_ : __shfl_sync(kAllLanes, later_, 0);
    later_ = counter_ == nullptr ? later_ + stride_ : take();
  }

 private:
  __device__ int take() const {
    return threadIdx.x % 32 == 0 ? static_cast<int>(atomicAdd(counter_, 1u)) : 0;
  }

  unsigned int* counter_;
  int stride_;
  int current_ = 0;
  int next_ = 0;
  int later_;
};

// The rows of some ranks in chunks, rank by rank in turn.
class Chunks {
 public:
  struct Chunk {
    int rank;
    int first;  // row of that rank
    int rows;   // 0 or less: there are none
  };

  // Of all other ranks; with `own`, of this one alone. `counts`: rows of each rank.
  __device__ Chunks(const Group& group, const int* counts, bool own, unsigned int* counter, const Crew& crew)
      : group_(group), counts_(counts), own_(own), tasks_(counter, crew) {
    int most = 0;
    for (int rank = threadIdx.x % 32; rank < group.size; rank += 32) {
      if ((rank == group.rank) == own) most = max(most, (counts[rank] + kChunk - 1) / kChunk);
    }
    end_ = __reduce_max_sync(kAllLanes, most) * others();
    skip_empty();
  }

  __device__ bool at_end() const { return tasks_.current() >= end_; }
  __device__ Chunk current() const { return chunk(tasks_.current()); }

  // The one after `current`; with no rows if it isn't known.
  __device__ Chunk next() const { return tasks_.next() < end_ ? chunk(tasks_.next()) : Chunk{0, 0, 0}; }

  __device__ void advance() {
    tasks_.advance();
    skip_empty();
  }

 private:
  __device__ int others() const { return own_ ? 1 : group_.size - 1; }

  __device__ Chunk chunk(int task) const {
    const int rank = own_ ? group_.rank : (group_.rank + 1 + task % others()) % group_.size;
    const int first = task / others() * kChunk;
    return {rank, first, min(kChunk, counts_[rank] - first)};
  }

  __device__ void skip_empty() {
    while (!at_end() && current().rows <= 0) tasks_.advance();
  }

  const Group& group_;
  const int* counts_;
  bool own_;
  Tasks tasks_;
  int end_;
};

}  // namespace moe_ep::nvlink
