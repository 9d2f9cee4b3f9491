#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

namespace moe_ep::nvlink {

constexpr int kMaxRanks = 72;
constexpr int kMaxTopk = 32;       // a warp holds the experts of a token, one in each lane
constexpr int kMaxExperts = 1024;  // ids travel as int16, and a block keeps a bit mask for each local one
constexpr int kChunk = 4;          // rows between two signals
constexpr int kFineRows = 512;     // with a signal each, at the end
constexpr int kIndexBits = 29;     // of a row, or of a rank and an arrival there, in an int32
constexpr int kArrivalBits = 22;   // of these

__host__ __device__ constexpr int64_t align16(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}

// Where things lie in a window: the memory of one rank that all ranks of the group can reach. Every rank's
// window has this layout, and only rank s writes what is marked [s].
struct WindowLayout {
  int64_t arrived;          // uint64 [s][chunks]: signals that rows of a chunk lie in the ring of s
  int64_t drained;          // uint64 [s]: signals that s has read this rank's rows, so that more may follow
  int64_t routing_arrived;  // uint64 [s]
  int64_t routing_drained;  // uint64 [s]
  int64_t present;          // uint64 [s]: the latest call that s has come to
  int64_t headers;          // int32 [s][2]: tokens of s, and whether ids of s were bad
  int64_t routing;          // int16 [s][max_tokens][num_topk]
  int64_t rings;            // [R - 1][ring_bytes]
  int64_t bytes;

  int64_t chunks;         // of one ring
  int64_t routing_bytes;  // of one rank
};

// What runs and counts on this rank's device alone; zero at first. The counts of `plan` follow it.
struct Workspace {
  unsigned long long calls;  // dispatches and combines that ended
  unsigned long long plans;  // plans that ended
  unsigned int blocks_done;
  unsigned int blocks_sent;
  unsigned int blocks_counted;
  unsigned int bad_ids;  // of this rank, in the plan that runs
  unsigned int failed;   // not 0: a wait timed out, and nothing more can be done with this group
  unsigned int consumed[kMaxRanks];
  unsigned int
      tasks[3];  // given out in the call that runs: of sending, of this rank's own rows, of receiving
};

// In pinned host memory, zero at first. Kernels write, the host reads.
struct HostRecord {
  volatile int64_t failed;  // 1, and what follows says what the first wait that timed out was for
  volatile int64_t phase;
  volatile int64_t peer;
  volatile int64_t expected;
  volatile int64_t seen;
  volatile int64_t bad_ids;  // 1: a plan for a fixed number of rows left out bad expert ids of this rank
  // The result of the plan that was given `ticket`, which is written last.
  volatile int64_t ticket;
  volatile int64_t rows_needed;
  volatile int64_t bad_ranks[(kMaxRanks + 63) / 64];  // bit r: rank r gave bad expert ids
  volatile int64_t tokens_per_expert[kMaxExperts];
};

// The constants of a communicator, passed to every kernel by value.
struct Group {
  int rank;
  int size;
  int max_tokens;
  int num_topk;
  int num_experts;
  int num_local;  // experts of each rank
  int64_t ring_bytes;
  uint64_t timeout_ns;
  WindowLayout at;
  Workspace* workspace;
  HostRecord* host;
  char* windows[kMaxRanks];  // this device's addresses of all windows

  // Of the ring in the window of rank `at_rank` that rank `from` writes.
  __host__ __device__ char* ring(int at_rank, int from) const {
    const int place = from > at_rank ? from - at_rank - 1 : from - at_rank - 1 + size;
    return windows[at_rank] + at.rings + place * ring_bytes;
  }
};

WindowLayout window_layout(int size, int max_tokens, int num_topk, int64_t ring_bytes);

int64_t workspace_bytes(int size, int max_tokens, int num_experts);

// Rows of one ring that hold rows of `slot_bytes`: as many as a rank has tokens, or as fit; a multiple of
// kChunk.
inline int ring_rows(const Group& group, int64_t slot_bytes) {
  const int64_t wanted = (group.max_tokens + kChunk - 1) / kChunk * static_cast<int64_t>(kChunk);
  const int64_t fit = group.ring_bytes / slot_bytes / kChunk * kChunk;
  return static_cast<int>(fit < wanted ? fit : wanted);
}

// Lets a kernel have more dynamic shared memory than the 48 KiB that all may have, on the current device; and
// has it divide a multiprocessor's memory as all kernels of a group do: ranks on one GPU wait for each other,
// and a multiprocessor that is busy with one can't divide its memory anew for another.
Status allow_shared_memory(const void* kernel, int bytes);

Status ring_too_small(const Group& group, int64_t slot_bytes);

// Waits, at most `timeout_s`, until the plan with this ticket has reported; false if it has not, or if a wait
// on the device has timed out.
bool wait_for_plan(const HostRecord* host, int64_t ticket, double timeout_s);

}  // namespace moe_ep::nvlink
