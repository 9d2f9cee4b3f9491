#pragma once

#include <cstdint>

#include "nvlink/group.h"
#include "nvlink/phase.h"

// Signals between ranks, and waiting for them for a limited time.
namespace moe_ep::nvlink {

__device__ __forceinline__ uint64_t load_acquire(const void* from) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

// Cheap to poll with; what it announces may be read after a load_acquire of the same signal.
__device__ __forceinline__ uint64_t load_relaxed(const void* from) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ bool has_reached(const uint64_t* signal, uint64_t value) {
  return load_relaxed(signal) >= value && load_acquire(signal) >= value;
}

__device__ __forceinline__ void store_relaxed(void* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// Everything that this thread wrote, or has seen written, comes before the signal.
__device__ __forceinline__ void store_release(void* to, uint64_t value) {
  asm volatile("fence.acq_rel.sys;" ::: "memory");
  store_relaxed(to, value);
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

template <typename T>
__device__ __forceinline__ T load_volatile(const T* from) {
  return *static_cast<const volatile T*>(from);
}

__device__ __forceinline__ bool has_failed(const Group& group) {
  return load_volatile(&group.workspace->failed) != 0;
}

// Ends all work of this group on this device, and tells the host what for.
static __device__ __noinline__ void fail(const Group& group, Phase phase, int peer, uint64_t expected,
                                         uint64_t seen) {
  if (atomicCAS(&group.workspace->failed, 0u, 1u) != 0u) return;
  HostRecord* host = group.host;
  host->phase = static_cast<int>(phase);
  host->peer = peer;
  host->expected = static_cast<int64_t>(expected);
  host->seen = static_cast<int64_t>(seen);
  __threadfence_system();
  host->failed = 1;
}

// Waits until `*signal >= value`; false if it timed out, here or elsewhere on this device.
static __device__ __noinline__ bool wait_slowly(const uint64_t* signal, uint64_t value, const Group& group,
                                                Phase phase, int peer) {
  const uint64_t deadline = nanoseconds() + group.timeout_ns;
  for (;;) {
    for (int poll = 0; poll < 64; ++poll) {
      if (has_reached(signal, value)) return true;
      __nanosleep(40);
    }
    if (has_failed(group)) return false;
    if (nanoseconds() > deadline) {
      const uint64_t seen = load_acquire(signal);
      if (seen >= value) return true;
      fail(group, phase, peer, value, seen);
      return false;
    }
  }
}

__device__ __forceinline__ bool wait_for(const uint64_t* signal, uint64_t value, const Group& group,
                                         Phase phase, int peer) {
  return load_acquire(signal) >= value || wait_slowly(signal, value, group, phase, peer);
}

// Of rank `of`, in the window of rank `at_rank`; `where`: of a WindowLayout.
__device__ __forceinline__ uint64_t* signal(const Group& group, int at_rank, int64_t where, int of) {
  return reinterpret_cast<uint64_t*>(group.windows[at_rank] + where) + of;
}

// Plans, dispatches and combines have one number each: from 1 on, the same on all ranks. Of the one that
// begins.
__device__ __forceinline__ uint64_t number_of_call(const Group& group) {
  return load_volatile(&group.workspace->calls) + load_volatile(&group.workspace->plans) + 1;
}

// By one warp of each call: this rank has come to it. See launch_meet.
__device__ __forceinline__ void tell_presence(const Group& group, uint64_t number) {
  for (int peer = threadIdx.x % 32; peer < group.size; peer += 32) {
    if (peer != group.rank) store_relaxed(signal(group, peer, group.at.present, group.rank), number);
  }
}

// True for all threads of the one block that comes here last. With `Publishes`, it sees everything that the
// others did before, and so do those that it signals on other devices.
template <bool Publishes>
__device__ __forceinline__ bool is_last_block(unsigned int* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (Publishes) __threadfence_system();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) {
      *counter = 0;
      if (Publishes) __threadfence_system();
    }
  }
  __syncthreads();
  return last;
}

}  // namespace moe_ep::nvlink
