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
  int64_t bytes;    // of a slot: a multiple of 16
  int rows;         // that a ring holds: a multiple of kChunk
  bool has_rounds;  // a rank may have more rows than a ring

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
  __device__ uint64_t* signal(const Slots& shape, int index) const {
    return arrived + shape.place(index) / kChunk;
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

__device__ __forceinline__ Fetched warp_fetch_arrived(const Group& group, const Ring& ring,
                                                      const Slots& slots, Call call, int source, int index,
                                                      Phase phase, bool wait) {
  return warp_fetch(ring.signal(slots, index), call.stamp(slots.round(index) + 1), group, phase, source,
                    wait);
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

// At the end of a kernel, by all threads: the next call may begin, here and on all ranks.
__device__ __forceinline__ void finish_call(const Group& group, Call call) {
  if (!is_last_block<false>(&group.workspace->blocks_done) || has_failed(group)) return;
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
  int receivers;  // warps of the others' crew

  __device__ explicit Crew(int send_blocks) : sends(static_cast<int>(blockIdx.x) < send_blocks) {
    const int blocks = sends ? send_blocks : gridDim.x - send_blocks;
    const int block = sends ? blockIdx.x : blockIdx.x - send_blocks;
    index = threadIdx.x / 32 * blocks + block;  // neighbours in different blocks
    size = blockDim.x / 32 * blocks;
    receivers = blockDim.x / 32 * (gridDim.x - send_blocks);
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

// What is loaded behind a row, and leaves with it; a multiple of 16 bytes.
struct Tail {
  const char* from;
  int bytes;
};

// The rows that one item of work reads, one in each lane that has one: segment by segment, and in each first
// those of `lanes`, then those of `others`, in ascending order.
struct Rows {
  const char* of_lane;
  unsigned int lanes;
  unsigned int others;
  Tail tails[2];
};

// Segments of rows on their way through the shared memory of a warp: a queue whose bulk loads run ahead of
// their use.
class Belt {
 public:
  // How far the loads of an item have been queued.
  class Cursor {
   public:
    Cursor() = default;
    __device__ explicit Cursor(const Rows& rows) { start(rows); }

   private:
    friend class Belt;

    __device__ void start(const Rows& rows) {
      left_ = rows.lanes ? rows.lanes : rows.others;
      others_ = rows.lanes == 0;
    }

    __device__ void advance(const Rows& rows, int segment_bytes) {
      left_ &= left_ - 1;
      if (left_ != 0) return;
      if (!others_ && rows.others) {
        left_ = rows.others;
        others_ = true;
      } else {
        start(rows);
        begin_ += segment_bytes;
      }
    }

    int begin_ = 0;
    unsigned int left_ = 0;
    bool others_ = false;
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

  // Queues what there is room for; true if all of the item is queued. Lanes have read what was taken before.
  __device__ __forceinline__ bool queue(const Rows& rows, Cursor& cursor) {
    while (cursor.left_ && cursor.begin_ < row_bytes_) {
      if (queued_ == shape_.stages - 1) return false;
      const uint64_t row =
          __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(rows.of_lane), __ffs(cursor.left_) - 1);
      if (is_first_lane()) {
        // The place of the segment taken before the last one is what is loaded next.
        if (last_was_forwarded_) {
          bulk::wait_until_read<1>();
        } else if (may_be_unread_) {
          bulk::wait_until_read<0>();
        }
        load(rows, reinterpret_cast<const char*>(row), cursor.begin_);
      }
      may_be_unread_ &= last_was_forwarded_;
      put_ = put_ + 1 == shape_.stages ? 0 : put_ + 1;
      ++queued_;
      cursor.advance(rows, shape_.segment_bytes);
    }
    return true;
  }

  // The oldest segment that was queued. Lanes that read it do so before the next call.
  __device__ __forceinline__ char* take() {
    char* stage = stages_ + take_ * shape_.stage_bytes;
    bulk::wait(barriers_ + take_, parity_);
    --queued_;
    last_was_forwarded_ = false;
    if (++take_ == shape_.stages) {
      take_ = 0;
      parity_ ^= 1;
    }
    return stage;
  }

  // The segment taken last leaves by the bulk stores of the group that lane 0 has just closed.
  __device__ __forceinline__ void was_forwarded() { last_was_forwarded_ = may_be_unread_ = true; }

  // At the end, when some may be left: nothing may be loaded into what another block may have by then.
  __device__ void drain() {
    while (queued_) take();
    bulk::wait_until_read<0>();
  }

 private:
  __device__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }

  __device__ __forceinline__ void load(const Rows& rows, const char* row, int begin) const {
    char* stage = stages_ + put_ * shape_.stage_bytes;
    uint64_t* barrier = barriers_ + put_;
    const int bytes = bytes_from(begin);
    const int tail_bytes = begin + bytes == row_bytes_ ? rows.tails[0].bytes + rows.tails[1].bytes : 0;
    bulk::expect(barrier, bytes + tail_bytes);
    bulk::load(stage, row + begin, bytes, barrier);
    if (tail_bytes == 0) return;
    stage += bytes;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows.tails[i].bytes == 0) continue;
      bulk::load(stage, rows.tails[i].from, rows.tails[i].bytes, barrier);
      stage += rows.tails[i].bytes;
    }
  }

  char* stages_;
  uint64_t* barriers_;
  const BeltShape& shape_;
  int row_bytes_;
  int queued_ = 0;
  int put_ = 0;
  int take_ = 0;
  unsigned int parity_ = 0;
  bool last_was_forwarded_ = false;
  bool may_be_unread_ = false;  // a segment that was forwarded
};

// Tells peers of chunks once the bulk stores that fill them are complete, which those behind need not wait
// for. The signal has a fence all the same: between two GPUs a plain store of it was seen to overtake rows
// whose stores had completed.
class Announcer {
 public:
  // Lane 0 has closed a group of stores.
  __device__ __forceinline__ void count_group() {
    ++groups_;
    if (signal_ != nullptr && groups_ - last_of_chunk_ >= kLag) {
      if (threadIdx.x % 32 == 0) {
        bulk::wait_until_written<kLag>();
        store_release(signal_, stamp_);
      }
      signal_ = nullptr;
    }
  }

  // The group closed last is the last one of the chunk that begins at `first`.
  __device__ __forceinline__ void end_chunk(const Ring& ring, const Slots& slots, Call call, int first) {
    flush();
    signal_ = ring.signal(slots, first);
    stamp_ = call.stamp(slots.round(first) + 1);
    last_of_chunk_ = groups_;
  }

  __device__ __forceinline__ void flush() {
    if (signal_ != nullptr && threadIdx.x % 32 == 0) {
      bulk::wait_until_written<0>();
      store_release(signal_, stamp_);
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

// Runs the items of a job, loading each while the one before is processed. Of a job,
// - `fetch(item, wait)` gives the next item in order; without `wait`, not_yet if it would have to wait;
// - `process(item, belt, load_ahead)` calls load_ahead() before it takes a segment from the belt.
template <typename Job>
__device__ __forceinline__ void run_job(Job& job, Belt& belt) {
  using Cursor = Belt::Cursor;
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

// The numbers 0, 1, 2... shared out among warps, which get more as they have time; the number after next is
// on its way while a warp works. Warps of the crew whose tasks these are have their first two at once; the
// others may join them.
class Tasks {
 public:
  __device__ Tasks(const Group& group, TaskKind kind, const Crew& crew)
      : counter_(group.workspace->tasks + kind) {
    const int crew_size = kind == kSending ? crew.size : crew.receivers;
    given_ = 2 * crew_size;
    if (crew.sends == (kind == kSending)) {
      current_ = crew.index;
      next_ = crew.index + crew_size;
    } else {
      current_ = __shfl_sync(kAllLanes, take(), 0);
      next_ = __shfl_sync(kAllLanes, take(), 0);
    }
    later_ = take();
  }

  // In turn, each warp keeping to one of `ranks`, for it must not wait for another; spare warps get none.
  __device__ Tasks(const Crew& crew, int ranks) : stride_(crew.size - crew.size % ranks) {
    current_ = crew.index < stride_ ? crew.index : INT_MAX / 2;
    next_ = current_ + stride_;
    later_ = next_ + stride_;
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
    return threadIdx.x % 32 == 0 ? given_ + static_cast<int>(atomicAdd(counter_, 1u)) : 0;
  }

  unsigned int* counter_ = nullptr;
  int given_ = 0;
  int stride_ = 0;
  int current_;
  int next_;
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
  __device__ Chunks(const Group& group, const int* counts, bool own, const Tasks& tasks)
      : group_(group), counts_(counts), others_(own ? 1 : group.size - 1), own_(own), tasks_(tasks) {
    int most = 0;
    for (int rank = threadIdx.x % 32; rank < group.size; rank += 32) {
      if ((rank == group.rank) == own) most = max(most, (counts[rank] + kChunk - 1) / kChunk);
    }
    end_ = __reduce_max_sync(kAllLanes, most) * others_;
    current_ = chunk(tasks_.current());
    next_ = chunk(tasks_.next());
    skip_empty();
  }

  __device__ bool at_end() const { return tasks_.current() >= end_; }
  __device__ const Chunk& current() const { return current_; }
  __device__ const Chunk& next() const { return next_; }  // of no rows if it isn't known

  __device__ void advance() {
    step();
    skip_empty();
  }

 private:
  __device__ Chunk chunk(int task) const {
    if (task >= end_) return {group_.rank, 0, 0};
    const int chunk = others_ == 1 ? task : task / others_;
    int rank = own_ ? group_.rank : group_.rank + 1 + task - chunk * others_;
    if (rank >= group_.size) rank -= group_.size;
    return {rank, chunk * kChunk, min(kChunk, counts_[rank] - chunk * kChunk)};
  }

  __device__ void step() {
    tasks_.advance();
    current_ = next_;
    next_ = chunk(tasks_.next());
  }

  __device__ void skip_empty() {
    while (!at_end() && current_.rows <= 0) step();
  }

  const Group& group_;
  const int* counts_;
  int others_;
  bool own_;
  Tasks tasks_;
  int end_;
  Chunk current_;
  Chunk next_;
};

}  // namespace moe_ep::nvlink
