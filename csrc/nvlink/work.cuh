#pragma once

#include <climits>
#include <cstdint>

#include "nvlink/rings.cuh"

// How the work of a kernel is shared out among its warps.
namespace moe_ep::nvlink {

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

// What is shared out among warps: Workspace::tasks.
enum TaskKind { kSending, kOwn, kReceiving };

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
