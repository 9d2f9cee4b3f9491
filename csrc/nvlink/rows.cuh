#pragma once

#include <climits>
#include <cstdint>

#include "nvlink/bulk.cuh"
#include "nvlink/sync.cuh"

// Warps that move rows, and the rings that rows travel in.
namespace moe_ep::nvlink {

using bulk::SharedAddress;

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

// The blocks of a grid in two crews: the first ones fill peers' rings, the others see to what arrives. They
// don't share a multiprocessor, since what waits for the link there would hold up what does not.
struct Crew {
  bool sends;
  int index;  // of this warp, within the crew
  int size;
  int receivers;  // warps of the others' crew

  int warps;  // of each block, without the herald, which comes last

  __device__ explicit Crew(int send_blocks) : sends(static_cast<int>(blockIdx.x) < send_blocks) {
    const int blocks = sends ? send_blocks : gridDim.x - send_blocks;
    const int block = sends ? blockIdx.x : blockIdx.x - send_blocks;
    warps = blockDim.x / 32 - 1;
    index = threadIdx.x / 32 * blocks + block;  // neighbours in different blocks
    size = warps * blocks;
    receivers = warps * (gridDim.x - send_blocks);
  }

  __device__ bool is_herald() const { return static_cast<int>(threadIdx.x) / 32 == warps; }
};

// How the shared memory of each warp is divided: stages for row segments.
struct BeltShape {
  int segment_bytes;
  int stages;
};

// What is shared out among warps: Workspace::tasks.
enum TaskKind { kSending, kOwn, kReceiving };

__device__ __forceinline__ int of_lane(int value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

__device__ __forceinline__ const char* of_lane(const char* pointer, int lane) {
  return reinterpret_cast<const char*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(pointer), lane));
}

// The rows that one item of work reads, in order: row i's address is in lane i.
struct Rows {
  const char* in_lane;
  int count;

  __device__ __forceinline__ const char* row(int i) const { return of_lane(in_lane, i); }
};

// A list with an element in each lane, after the values of `lanes` were put in it, in order, from `place` on.
template <typename Value>
__device__ __forceinline__ Value append(Value list, int place, Value value, unsigned int lanes) {
  for (; lanes; lanes &= lanes - 1, ++place) {
    const Value from = of_lane(value, __ffs(lanes) - 1);
    if (static_cast<int>(threadIdx.x % 32) == place) list = from;
  }
  return list;
}

// Segments of rows on their way through the shared memory of a warp: a queue whose bulk loads run ahead of
// their use. Of an item's rows, the first segments of all come first, in order.
class Belt {
 public:
  // How far the loads of an item have been queued.
  struct Cursor {
    int row;
    int begin;
  };

  __device__ Belt(char* memory, uint64_t* barriers, const BeltShape& shape, int row_bytes)
      : stages_(bulk::shared_address(memory)),
        barriers_(bulk::shared_address(barriers)),
        shape_(shape),
        row_bytes_(row_bytes) {
    if (is_first_lane()) {
      for (int i = 0; i < shape.stages; ++i) bulk::init(barriers_ + 8 * i);
      bulk::publish_barriers();
    }
    __syncwarp();
  }

  // Of the rows that are queued from now on; when there are none.
  __device__ void set_row_bytes(int row_bytes) { row_bytes_ = row_bytes; }

  __device__ int bytes_from(int begin) const { return min(shape_.segment_bytes, row_bytes_ - begin); }
  __device__ int segment_bytes() const { return shape_.segment_bytes; }
  __device__ int row_bytes() const { return row_bytes_; }

  template <typename Rows>
  __device__ Cursor start(const Rows& rows) const {
    return {0, rows.count == 0 ? row_bytes_ : 0};
  }

  // Queues what there is room for; true if all of the item is queued. Lanes have read what was taken before.
  template <typename Rows>
  __device__ __forceinline__ bool queue(const Rows& rows, Cursor& cursor) {
    while (cursor.begin < row_bytes_) {
      if (queued_ == shape_.stages) return false;
      const char* row = rows.row(cursor.row);
      if (is_first_lane()) {
        bulk::load(stages_ + put_ * shape_.segment_bytes, row + cursor.begin, bytes_from(cursor.begin),
                   barriers_ + 8 * put_);
      }
      put_ = put_ + 1 == shape_.stages ? 0 : put_ + 1;
      ++queued_;
      if (++cursor.row == rows.count) {
        cursor.row = 0;
        cursor.begin += shape_.segment_bytes;
      }
    }
    return true;
  }

  // The oldest segment that was queued.
  __device__ __forceinline__ SharedAddress take() {
    const SharedAddress stage = stages_ + take_ * shape_.segment_bytes;
    bulk::wait(barriers_ + 8 * take_, parity_);
    --queued_;
    if (++take_ == shape_.stages) {
      take_ = 0;
      parity_ ^= 1;
    }
    return stage;
  }

  // At the end, when some may be left: nothing may be loaded into what another block may have by then.
  __device__ void drain() {
    while (queued_) take();
  }

 private:
  __device__ static bool is_first_lane() { return threadIdx.x % 32 == 0; }

  SharedAddress stages_;
  SharedAddress barriers_;
  const BeltShape& shape_;
  int row_bytes_;
  int queued_ = 0;
  int put_ = 0;
  int take_ = 0;
  unsigned int parity_ = 0;
};

// 16 bytes at once, which the compiler would take apart.
__device__ __forceinline__ uint4 load_shared(SharedAddress from) {
  uint4 word;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(from));
  return word;
}

__device__ __forceinline__ void store_shared(SharedAddress to, uint4 word) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word.x), "r"(word.y), "r"(word.z),
               "r"(word.w)
               : "memory");
}

// Signals that the warps of a block have due. The fence that must come before each of them waits for all that
// the multiprocessor has under way, so one warp, the herald, sees to them while the others go on.
class Mailbox {
 public:
  // `notices`: one for each of `warps`, in shared memory. By all threads of the block.
  __device__ Mailbox(uint64_t* notices, int warps) : notices_(notices), warps_(warps) {
    if (static_cast<int>(threadIdx.x) < warps) notices[threadIdx.x] = kEmpty;
    __syncthreads();
  }

  // This warp has written the rows for `peer` that this signal, of those in the peer's window, is of.
  __device__ __forceinline__ void announce(int peer, int signal, int round) const {
    post(static_cast<uint64_t>(round) << 40 | static_cast<uint64_t>(signal) << 8 |
         static_cast<uint64_t>(peer + 2));
  }

  // This warp has no more.
  __device__ void close() const { post(kNoMore); }

  // By the herald, until no warp has more.
  __device__ void deliver(const Group& group, Call call) const {
    const int lane = threadIdx.x % 32;
    if (lane >= warps_) return;
    for (;;) {
      const uint64_t notice = load(notices_ + lane);
      if (notice == kNoMore) break;
      if (notice == kEmpty) continue;
      store(notices_ + lane, kEmpty);
      const int peer = static_cast<int>(notice & 0xFF) - 2;
      const int signal = static_cast<int>(notice >> 8 & 0xFFFFFFFF);
      const Ring ring(group, peer, group.rank);
      store_release(ring.arrived + signal, call.stamp(static_cast<int>(notice >> 40) + 1));
    }
  }

 private:
  static constexpr uint64_t kEmpty = 0, kNoMore = 1;

  __device__ __forceinline__ void post(uint64_t notice) const {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    uint64_t* mine = notices_ + threadIdx.x / 32;
    while (load(mine) != kEmpty) {
    }
    store(mine, notice);
  }

  static __device__ __forceinline__ uint64_t load(const uint64_t* from) {
    uint64_t value;
    asm volatile("ld.acquire.cta.shared.u64 %0, [%1];"
                 : "=l"(value)
                 : "r"(bulk::shared_address(from))
                 : "memory");
    return value;
  }

  static __device__ __forceinline__ void store(uint64_t* to, uint64_t value) {
    asm volatile("st.release.cta.shared.u64 [%0], %1;" ::"r"(bulk::shared_address(to)), "l"(value)
                 : "memory");
  }

  uint64_t* notices_;
  int warps_;
};

// Runs the items of a job, loading each while the one before is processed. Of a job,
// - `fetch(item, wait)` gives the next item in order; without `wait`, not_yet if it would have to wait;
// - `process(item, belt, load_ahead)` calls load_ahead() before it takes a segment from the belt.
template <typename Job>
__device__ __forceinline__ void run_job(Job& job, Belt& belt) {
  typename Job::Item item, next;
  Belt::Cursor loaded, loaded_next;
  Fetched fetched = job.fetch(item, true);
  if (fetched != Fetched::ready) return;
  loaded = belt.start(item.rows);
  for (;;) {
    fetched = job.fetch(next, false);
    if (fetched == Fetched::failed) return;
    if (fetched == Fetched::ready) loaded_next = belt.start(next.rows);
    const auto load_ahead = [&] {
      __syncwarp();  // all lanes have read what was taken before
      if (belt.queue(item.rows, loaded) && fetched == Fetched::ready) belt.queue(next.rows, loaded_next);
    };
    job.process(item, belt, load_ahead);
    if (fetched == Fetched::none) return;
    if (fetched == Fetched::not_yet) {
      if (job.fetch(next, true) != Fetched::ready) return;
      loaded_next = belt.start(next.rows);
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
    int signal;
  };

  // Of all other ranks; with `own`, of this one alone. `counts`: rows of each rank.
  __device__ Chunks(const Group& group, const Slots& slots, const int* counts, bool own, const Tasks& tasks)
      : group_(group),
        slots_(slots),
        counts_(counts),
        others_(own ? 1 : group.size - 1),
        own_(own),
        tasks_(tasks) {
    int most = 0;
    for (int rank = threadIdx.x % 32; rank < group.size; rank += 32) {
      if ((rank == group.rank) == own) most = max(most, slots.chunking(counts[rank], others_).chunks());
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
    if (task >= end_) return {group_.rank, 0, 0, 0};
    const int chunk = others_ == 1 ? task : task / others_;
    int rank = own_ ? group_.rank : group_.rank + 1 + task - chunk * others_;
    if (rank >= group_.size) rank -= group_.size;
    const Chunking chunking = slots_.chunking(counts_[rank], others_);
    const int first = chunking.first_row(chunk);
    return {rank, first, chunking.rows_of(chunk), chunking.chunk_of(slots_.place(first))};
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
  const Slots& slots_;
  const int* counts_;
  int others_;
  bool own_;
  Tasks tasks_;
  int end_;
  Chunk current_;
  Chunk next_;
};

}  // namespace moe_ep::nvlink
