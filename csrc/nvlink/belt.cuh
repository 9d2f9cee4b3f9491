#pragma once

#include <cstdint>

#include "nvlink/bulk.cuh"
#include "nvlink/rings.cuh"

// How rows pass through a warp.
namespace moe_ep::nvlink {

using bulk::SharedAddress;

// How the shared memory of each warp is divided: stages for row segments.
struct BeltShape {
  int segment_bytes;
  int stages;
};

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

}  // namespace moe_ep::nvlink
