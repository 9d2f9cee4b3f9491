#pragma once

#include <cstdint>

#include "nvlink/bulk.cuh"
#include "nvlink/rings.cuh"

namespace moe_ep::nvlink {

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

}  // namespace moe_ep::nvlink
