#pragma once

#include <cstdint>

#include "low_latency/group.h"
#include "nvlink/sync.cuh"

// Signals between ranks, and waiting for them for a limited time.
namespace moe_ep::low_latency {

// What a wait was for; moe_ep/backends/low_latency.py has the names.
enum class Phase : int { dispatch_send, dispatch_receive, combine_send, combine_receive };

// Two ranks' calls alternate between the halves of their places; turns count the uses of one half, from 1 on.
// Both wrap around together, and a place of zeros is one that was read in turn 0.
struct Turn {
  unsigned int half;
  unsigned int number;
};

constexpr unsigned int kTurnMask = 0x7FFFFFFFu;

__device__ __forceinline__ Turn turn_of(unsigned int call) {
  return {call & 1u, ((call >> 1) + 1) & kTurnMask};
}

__device__ __forceinline__ unsigned int before(unsigned int turn) {
  return (turn - 1) & kTurnMask;
}

// A signal tells its turn, a yes or no, and a number. Its 8 bytes arrive together, so that what is so small
// needs neither fence nor flag.
__device__ __forceinline__ uint64_t signal(unsigned int turn, bool yes, unsigned int value = 0) {
  return static_cast<uint64_t>(turn << 1 | static_cast<unsigned int>(yes)) << 32 | value;
}

__device__ __forceinline__ unsigned int turn_in(uint64_t signal) {
  return static_cast<unsigned int>(signal >> 33);
}

__device__ __forceinline__ bool is_yes(uint64_t signal) {
  return (signal >> 32 & 1) != 0;
}

__device__ __forceinline__ unsigned int value_in(uint64_t signal) {
  return static_cast<unsigned int>(signal);
}

__device__ __forceinline__ void send(uint64_t* to, uint64_t signal) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(signal) : "memory");
}

__device__ __forceinline__ bool is_masked(const Group& group, int peer) {
  return nvlink::load_volatile(group.masked + peer) != 0;
}

// From now on without this peer.
static __device__ __noinline__ void give_up(const Group& group, Phase phase, int peer, unsigned int expected,
                                            uint64_t seen) {
  if (peer != group.rank) atomicExch(group.masked + peer, 1u);
  if (atomicExch(group.failed, 1u) != 0u) return;
  HostRecord* host = group.host;
  host->phase = static_cast<int>(phase);
  host->peer = peer;
  host->expected = expected;
  host->seen = turn_in(seen);
  __threadfence_system();
  host->failed = 1;
}

// The signal, once it is of this turn; or of another if it does not come.
//
// Whoever waits in order to send keeps others waiting. It gives up after half the time, so that those don't
// take it for dead, who wait for what it sends.
static __device__ __noinline__ uint64_t wait_slowly(const uint64_t* at, unsigned int turn, const Group& group,
                                                    Phase phase, int peer) {
  constexpr int kPolls = 32;
  constexpr uint64_t kPatienceNs = 100'000;
  const bool sends = phase == Phase::dispatch_send || phase == Phase::combine_send;
  const uint64_t begin = nvlink::nanoseconds();
  for (;;) {
    uint64_t seen = 0;
    for (int poll = 0; poll < kPolls; ++poll) {
      seen = nvlink::load_relaxed(at);
      if (turn_in(seen) == turn) return seen;
    }
    const uint64_t waited = nvlink::nanoseconds() - begin;
    if (is_masked(group, peer)) return seen;
    if (waited > (sends ? group.timeout_ns / 2 : group.timeout_ns)) {
      give_up(group, phase, peer, turn, seen);
      return seen;
    }
    if (waited > kPatienceNs) __nanosleep(1000);
  }
}

// Whether the signal has come; if not, the peer is masked.
__device__ __forceinline__ bool wait_for(const uint64_t* at, unsigned int turn, const Group& group,
                                         Phase phase, int peer, uint64_t& seen) {
  if (turn_in(seen) == turn) return true;
  seen = wait_slowly(at, turn, group, phase, peer);
  return turn_in(seen) == turn;
}

__device__ __forceinline__ bool wait(const uint64_t* at, unsigned int turn, const Group& group, Phase phase,
                                     int peer, uint64_t& seen) {
  seen = nvlink::load_relaxed(at);
  return wait_for(at, turn, group, phase, peer, seen);
}

// The same for a signal that announces what was written before it.
__device__ __forceinline__ bool wait_and_acquire(const uint64_t* at, unsigned int turn, const Group& group,
                                                 Phase phase, int peer) {
  uint64_t seen;
  if (!wait(at, turn, group, phase, peer, seen)) return false;
  nvlink::load_acquire(at);
  return true;
}

// The calls with all ranks, in shared memory.
struct Peers {
  Turn turn[kMaxRanks];
  int takes_part[kMaxRanks];

  __device__ __forceinline__ void set(int rank, Peer peer) {
    turn[rank] = turn_of(peer.call);
    takes_part[rank] = peer.takes_part;
  }
};

__device__ __forceinline__ unsigned int* calls_with(const Group& group, Operation operation, int rank) {
  return group.calls + (static_cast<int>(operation) * group.num_blocks + blockIdx.x) * group.size + rank;
}

// The call that begins.
__device__ __forceinline__ Peer next_call(const Group& group, Operation operation, int rank) {
  return {*calls_with(group, operation, rank), !is_masked(group, rank)};
}

// A call whose sending half has run.
__device__ __forceinline__ Peer begun_call(const Group& group, const Peer* peers, int rank) {
  const Peer peer = peers[rank];
  return {peer.call, peer.takes_part && !is_masked(group, rank)};
}

// -1 for what is no expert.
__device__ __forceinline__ int expert_id(const Group& group, const void* ids, bool is_int64, int64_t i) {
  const int64_t id = is_int64 ? static_cast<const int64_t*>(ids)[i] : static_cast<const int*>(ids)[i];
  return id < 0 || id >= group.num_experts ? -1 : static_cast<int>(id);
}

}  // namespace moe_ep::low_latency
