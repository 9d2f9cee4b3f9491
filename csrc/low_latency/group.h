#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/kernel_attributes.h"
#include "common/status.h"
#include "nvlink/group.h"

namespace moe_ep::low_latency {

constexpr int kMaxRanks = nvlink::kMaxRanks;
constexpr int kRankWords = (kMaxRanks + 31) / 32;
constexpr int kMaxTopk = nvlink::kMaxTopk;
constexpr int kExpertBits = 10;
constexpr int kMaxExperts = 1 << kExpertBits;
constexpr int kMaxTokens = 1 << 20;  // of a rank in a call

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;  // more than one, so that some move bytes while others wait
constexpr int kAhead = 2;        // pieces of a row that a thread loads before it uses the first

// A part of a window: what each rank sends in a call, twice over, since a rank may be a call ahead of
// another.
struct Area {
  int64_t begin;
  int64_t bytes;  // of one rank in one call
};

// Where things lie in a window: the memory of one rank that all ranks of the group can write. A signal is 8
// bytes (signals.cuh); rows are as wide as bfloat16 ones.
struct WindowLayout {
  Area counts;  // signals [L]: the tokens that the rank sends to each of this rank's experts
  Area routes;  // signals [T][kMaxTopk]: which expert here a token goes to, and as which of the rank's tokens
  Area rows_there;  // signals [T]
  Area rows;        // [T]
  Area rows_read;   // signals [T + 1]: the rank has read this rank's row; the last: and all else
  Area weights;     // signals [T][kMaxTopk]
  Area sums_there;  // signals [T]
  Area sums;        // [T]
  int64_t bytes;
};

// In pinned host memory, zero at first: what the first wait that timed out was for.
struct HostRecord {
  volatile int64_t failed;
  volatile int64_t phase;
  volatile int64_t peer;
  volatile int64_t expected;
  volatile int64_t seen;
};

enum class Operation : int { dispatch, combine };

// The constants of all calls of one shape, passed to every kernel by value.
struct Group {
  int rank;
  int size;         // R
  int hidden;       // H
  int max_tokens;   // T
  int num_experts;  // E
  int num_local;    // L
  int num_blocks;   // of every launch, since each counts the calls for itself
  uint64_t timeout_ns;
  WindowLayout at;
  unsigned int* masked;  // [R] not 0: the rank takes no part
  unsigned int* failed;  // [1] not 0: `host` is written
  unsigned int* calls;   // [operations][num_blocks][R]: calls begun with each rank
  HostRecord* host;
  char* windows[kMaxRanks];  // this device's addresses of all windows

  __host__ __device__ int64_t row_bytes() const { return int64_t{2} * hidden; }
  __host__ __device__ int capacity() const { return size * max_tokens; }  // rows of one expert

  // What rank `from` sends to rank `to` in a call; `half` says which of two.
  __host__ __device__ char* place(const Area& area, int to, int from, unsigned int half) const {
    return windows[to] + area.begin + (2 * from + half) * area.bytes;
  }

  __host__ __device__ uint64_t* signals(const Area& area, int to, int from, unsigned int half) const {
    return reinterpret_cast<uint64_t*>(place(area, to, from, half));
  }
};

// A call together with one rank.
struct Peer {
  unsigned int call;  // how many there were before
  int takes_part;
};

// What is known of a dispatch on this rank's device: for its second half and for combines.
struct Tables {
  Peer* peers;           // [R]
  unsigned int* served;  // [T][kRankWords] bit r: rank r got this rank's token
  int* slots;  // [R][T][K]: where the expert's row for a rank's token is among [L * R * T]; -1: nowhere

  __host__ __device__ Tables(int* words, const Group& group)
      : peers(reinterpret_cast<Peer*>(words)),
        served(reinterpret_cast<unsigned int*>(peers + group.size)),
        slots(reinterpret_cast<int*>(served + kRankWords * group.max_tokens)) {}

  static int64_t words(const Group& group, int num_topk) {
    return 2 * group.size + int64_t{kRankWords} * group.max_tokens + int64_t{1} * group.capacity() * num_topk;
  }
};

// All kernels ask for the same division of a multiprocessor's memory into cache and shared memory. It can be
// changed on an idle one only, so that a kernel which needs more would wait for one that waits for it: that
// of another rank on this GPU.
inline Status divide_memory(const void* kernel) {
  constexpr int kSharedPercent = 28;  // 64 KiB: two blocks of any of these kernels, and others' beside them
  return raise_attribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kSharedPercent);
}

inline WindowLayout window_layout(int size, int max_tokens, int num_local, int hidden) {
  WindowLayout at{};
  const auto reserve = [&at, size](int64_t bytes) {
    const Area area{at.bytes, (bytes + 127) / 128 * 128};
    at.bytes += 2 * size * area.bytes;
    return area;
  };
  const int64_t tokens = max_tokens;
  at.counts = reserve(int64_t{8} * num_local);
  at.routes = reserve(8 * kMaxTopk * tokens);
  at.rows_there = reserve(8 * tokens);
  at.rows = reserve(2 * tokens * hidden);
  at.rows_read = reserve(8 * (tokens + 1));
  at.weights = reserve(8 * kMaxTopk * tokens);
  at.sums_there = reserve(8 * tokens);
  at.sums = reserve(2 * tokens * hidden);
  return at;
}

}  // namespace moe_ep::low_latency
