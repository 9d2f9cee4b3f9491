#include "nvlink/plan.h"

#include "nvlink/meet.h"
#include "nvlink/plan_tables.h"
#include "nvlink/routing.cuh"
#include "nvlink/sync.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kWords = kTokensPerBlock / 32;  // of a bit mask over a block of tokens

// One bit for each token of a block.
struct TokenMask {
  unsigned int words[kWords];

  __device__ int count() const {
    int sum = 0;
    for (int i = 0; i < kWords; ++i) sum += __popc(words[i]);
    return sum;
  }

  __device__ int count_before(int token) const {
    int sum = 0;
    for (int i = 0; i < token / 32; ++i) sum += __popc(words[i]);
    return sum + __popc(words[token / 32] & ((1u << token % 32) - 1));
  }
};

// The dynamic shared memory of a block. A column is a local expert, the arrivals, or a rank (see
// count_columns).
struct Shared {
  TokenMask* masks;  // [columns]
  int* before;       // [columns] counts of earlier blocks of tokens
  int* total;        // [columns]
  int* begin;        // [L + 1] first row of each expert
  int* sources;      // [R + 1] arrivals of each rank, then of all ranks before
  int16_t* ids;      // [kTokensPerBlock][K]

  __host__ __device__ Shared(char* base, int size, int num_local) {
    const int columns = count_columns(size, num_local);
    masks = reinterpret_cast<TokenMask*>(base);
    before = reinterpret_cast<int*>(masks + columns);
    total = before + columns;
    begin = total + columns;
    sources = begin + num_local + 1;
    ids = reinterpret_cast<int16_t*>(sources + size + 1);
  }

  static size_t bytes(int size, int num_local, int num_topk) {
    char* const base = nullptr;
    const Shared end(base, size, num_local);
    return reinterpret_cast<char*>(end.ids + kTokensPerBlock * num_topk) - base;
  }
};

// Sets the masks of the block of tokens that begins at `first` of rank `source`, and keeps its ids.
__device__ void read_block(const Group& group, const Plan& plan, const Shared& shared, int source,
                           int first) {
  const int columns = count_columns(group.size, group.num_local);
  const int given = __ldcg(&header_of(group, group.rank, source)->num_tokens);
  const int num_tokens = given <= most_tokens(group, plan) ? given : 0;
  const int entries = max(0, min(kTokensPerBlock, num_tokens - first)) * group.num_topk;
  __syncthreads();
  for (int i = threadIdx.x; i < columns * kWords; i += kPlanThreads)
    shared.masks[i / kWords].words[i % kWords] = 0;
  __syncthreads();
  const int16_t* ids = routing_of(group, source) + static_cast<int64_t>(first) * group.num_topk;
  for (int i = threadIdx.x; i < kTokensPerBlock * group.num_topk; i += kPlanThreads) {
    const int id = i < entries ? __ldcg(ids + i) : -1;
    shared.ids[i] = static_cast<int16_t>(id);
    if (id < 0) continue;
    const int token = i / group.num_topk;
    const unsigned int bit = 1u << token % 32;
    const int rank = id / group.num_local;
    if (rank == group.rank) {
      atomicOr(&shared.masks[id - rank * group.num_local].words[token / 32], bit);
      atomicOr(&shared.masks[group.num_local].words[token / 32], bit);
    }
    if (source == group.rank) atomicOr(&shared.masks[group.num_local + 1 + rank].words[token / 32], bit);
  }
  __syncthreads();
}

// An exclusive prefix sum by one warp: sums[i] = the values before i; sums[count] = all of them.
template <typename Value>
__device__ void prefix_sum(int* sums, int count, Value&& value) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
  for (int base = 0; base < count; base += 32) {
    const int own = base + lane < count ? value(base + lane) : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
      if (lane >= distance) sum += lower;
    }
    __syncwarp();
    if (base + lane < count) sums[base + lane] = carry + sum - own;
    carry += __shfl_sync(0xFFFFFFFFu, sum, 31);
  }
  if (lane == 0) sums[count] = carry;
}

// Adds up the counts of all blocks of tokens, and of those before `first_row`.
__device__ void add_counts(const Group& group, const Plan& plan, const Shared& shared, const int* counts,
                           int first_row) {
  const int columns = count_columns(group.size, group.num_local), per_rank = token_blocks(group.max_tokens);
  const int arrivals = group.num_local;
  for (int i = threadIdx.x; i < columns; i += kPlanThreads) shared.before[i] = shared.total[i] = 0;
  for (int i = threadIdx.x; i <= group.size; i += kPlanThreads) shared.sources[i] = 0;
  __syncthreads();
  const int stride = (columns + 31) / 32 * 32;
  const int parts = max(1, kPlanThreads / stride);
  const int part = threadIdx.x / stride;
  const int rows = group.size * per_rank;
  for (int column = threadIdx.x % stride; column < columns && part < parts; column += kPlanThreads) {
    int total = 0, before = 0;
#pragma unroll 8
    for (int row = part; row < rows; row += parts) {
      const int count = __ldcg(counts + static_cast<int64_t>(row) * columns + column);
      const bool same_source = row / per_rank == first_row / per_rank;
      total += count;
      before += row < first_row && (column != arrivals || same_source) ? count : 0;
      if (column == arrivals && count) atomicAdd(&shared.sources[row / per_rank], count);
    }
    atomicAdd(&shared.total[column], total);
    atomicAdd(&shared.before[column], before);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    prefix_sum(shared.begin, group.num_local, [&](int expert) {
      return (shared.total[expert] + plan.alignment - 1) / plan.alignment * plan.alignment;
    });
  } else if (threadIdx.x < 64) {
    prefix_sum(shared.sources, group.size, [&](int source) { return shared.sources[source]; });
  }
  __syncthreads();
}

// Numbers the rows of the tokens whose masks are set.
__device__ void number_rows(const Group& group, const Plan& plan, const PlanTables& tables,
                            const Shared& shared, int source, int first) {
  const int arrivals = group.num_local, num_topk = group.num_topk;
  for (int i = threadIdx.x; i < kTokensPerBlock * num_topk; i += kPlanThreads) {
    const int in_block = i / num_topk, k = i % num_topk;
    const int16_t* ids = shared.ids + in_block * num_topk;
    const int id = ids[k];
    const int rank = id < 0 ? -1 : id / group.num_local;
    const int arrival = shared.before[arrivals] + shared.masks[arrivals].count_before(in_block);
    const bool arrives = shared.masks[arrivals].words[in_block / 32] >> in_block % 32 & 1;
    const int token = first + in_block;
    int row = -1;  // of (token, k)
    if (arrives) {
      const int expert = rank == group.rank ? id - rank * group.num_local : -1;
      const int64_t arrival_row = shared.sources[source] + arrival;
      if (expert >= 0) {
        row = plan.expert_layout
                  ? shared.begin[expert] + shared.before[expert] + shared.masks[expert].count_before(in_block)
                  : static_cast<int>(arrival_row);
        if (row >= plan.max_rows) row = -1;
      }
      tables.arrival_rows[(static_cast<int64_t>(source) * group.max_tokens + arrival) * num_topk + k] = row;
      if (!plan.expert_layout && arrival_row < plan.max_rows) plan.ids[arrival_row * num_topk + k] = expert;
      if (k == 0) tables.sources[arrival_row] = token;
    }
    if (source != group.rank || token >= plan.num_tokens) continue;
    int entry = PlanTables::kNone, place = -1;
    if (rank >= 0) {
      const int column = group.num_local + 1 + rank;
      place = shared.before[column] + shared.masks[column].count_before(in_block);
      bool is_first = true, is_last = true;
      for (int other = 0; other < num_topk; ++other) {
        if (ids[other] < 0 || ids[other] / group.num_local != rank) continue;
        is_first &= other >= k;
        is_last &= other <= k;
      }
      const int64_t pair = static_cast<int64_t>(rank) * group.max_tokens + place;
      if (is_first) tables.send_tokens[pair] = token;
      if (rank != group.rank) {
        entry = PlanTables::kRemote | rank << kArrivalBits | place;
      } else {
        entry = row < 0 ? PlanTables::kDropped : row;
      }
      if (is_last) entry |= PlanTables::kLast;
    }
    const int64_t at = static_cast<int64_t>(token) * num_topk + k;
    tables.entries[at] = entry;
    if (plan.notes.per_rank != nullptr) plan.notes.places[at] = place;
  }
}

__device__ void write_sums(const Group& group, const Plan& plan, const PlanTables& tables,
                           const Shared& shared) {
  for (int i = threadIdx.x; i < group.num_local; i += kPlanThreads) {
    tables.expert_count[i] = shared.total[i];
    plan.tokens_per_expert[i] = shared.total[i];
    plan.padded_tokens_per_expert[i] =
        plan.expert_layout ? shared.begin[i + 1] - shared.begin[i] : shared.total[i];
  }
  for (int i = threadIdx.x; i <= group.num_local; i += kPlanThreads) tables.expert_begin[i] = shared.begin[i];
  for (int i = threadIdx.x; i <= group.size; i += kPlanThreads) {
    tables.recv_start[i] = shared.sources[i];
    if (i == group.size) break;
    tables.recv_count[i] = shared.sources[i + 1] - shared.sources[i];
    tables.send_count[i] = shared.total[group.num_local + 1 + i];
  }
  if (threadIdx.x == 0) {
    *plan.rows_needed = plan.expert_layout ? shared.begin[group.num_local] : shared.sources[group.size];
  }
  if (plan.notes.per_rank != nullptr && threadIdx.x < group.size) {
    int sum = 0;
    for (int source = 0; source <= group.size; ++source) {
      plan.notes.before[source * group.size + threadIdx.x] = sum;
      if (source < group.size) sum += __ldcg(notes_of(group, plan, group.rank, source) + threadIdx.x);
    }
  }
}

// To the host.
__device__ void report_notes(const Group& group, const Plan& plan) {
  const Notes& notes = plan.notes;
  for (int expert = threadIdx.x; expert < notes.experts_of_rank(group); expert += kPlanThreads) {
    int64_t rows = 0;
    for (int source = 0; source < group.size; ++source) {
      rows += __ldcg(notes_of(group, plan, group.rank, source) + group.size + expert);
    }
    notes.host[1 + expert] = rows;
  }
  if (threadIdx.x >= 32) return;
  int most = 0;
  for (int source = threadIdx.x; source < group.size; source += 32) {
    most = max(most, __ldcg(&header_of(group, group.rank, source)->num_tokens));
  }
  most = __reduce_max_sync(0xFFFFFFFFu, most);
  if (threadIdx.x == 0) notes.host[0] = most;
}

// By the last block of all.
__device__ void finish(const Group& group, const Plan& plan, const Shared& shared, uint64_t number) {
  Workspace* workspace = group.workspace;
  HostRecord* host = group.host;
  if (plan.ticket) {
    if (plan.notes.per_rank != nullptr) report_notes(group, plan);
    for (int i = threadIdx.x; i < group.num_local; i += kPlanThreads)
      host->tokens_per_expert[i] = shared.total[i];
    if (threadIdx.x < sizeof(host->bad_ranks) / 8) {
      unsigned long long bad = 0;
      for (int r = threadIdx.x * 64; r < min(group.size, static_cast<int>(threadIdx.x + 1) * 64); ++r) {
        bad |= static_cast<unsigned long long>(__ldcg(&header_of(group, group.rank, r)->bad) != 0) << r % 64;
      }
      host->bad_ranks[threadIdx.x] = static_cast<int64_t>(bad);
    }
  }
  __syncthreads();
  // Nothing more is read of what they sent. By other warps than the one that reports.
  const int peer = static_cast<int>(threadIdx.x) - 32;
  if (peer >= 0 && peer < group.size) {
    store_release(signal(group, peer, group.at.routing_drained, group.rank), number + 1);
  }
  if (threadIdx.x != 0) return;
  if (plan.ticket == 0 && workspace->bad_ids) host->bad_ids = 1;
  workspace->bad_ids = 0;
  workspace->blocks_counted = 0;
  workspace->plans = number + 1;
  if (plan.ticket) {
    host->rows_needed = plan.expert_layout ? shared.begin[group.num_local] : shared.sources[group.size];
    __threadfence_system();
    host->ticket = plan.ticket;
  }
}

// False if it timed out.
__device__ bool make_plan(const Group& group, const Plan& plan, const Shared& shared) {
  const PlanTables tables(plan.tables, group);
  Workspace* workspace = group.workspace;
  const uint64_t number = load_volatile(&workspace->plans);
  if (blockIdx.x == 0 && threadIdx.x < 32) tell_presence(group, number_of_call(group));
  if (!send_routing(group, plan, number)) return false;

  bool arrived = true;
  if (threadIdx.x < group.size) {
    const int peer = threadIdx.x;
    arrived = wait_for(signal(group, group.rank, group.at.routing_arrived, peer), number + 1, group,
                       Phase::receive_routing, peer);
  }
  if (!__syncthreads_and(arrived)) return false;

  const int columns = count_columns(group.size, group.num_local), per_rank = token_blocks(group.max_tokens);
  const int rows = group.size * per_rank;
  const int per_block = (rows + gridDim.x - 1) / gridDim.x;
  const int first_row = blockIdx.x * per_block, end_row = min(rows, first_row + per_block);
  int* counts = reinterpret_cast<int*>(reinterpret_cast<char*>(workspace) + align16(sizeof(Workspace)));
  for (int row = first_row; row < end_row; ++row) {
    read_block(group, plan, shared, row / per_rank, row % per_rank * kTokensPerBlock);
    for (int i = threadIdx.x; i < columns; i += kPlanThreads) {
      counts[static_cast<int64_t>(row) * columns + i] = shared.masks[i].count();
    }
  }

  // All blocks are resident: there are no more of them than multiprocessors.
  __syncthreads();
  bool counted = true;
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&workspace->blocks_counted, 1u);
    const uint64_t deadline = nanoseconds() + group.timeout_ns;
    while (load_volatile(&workspace->blocks_counted) < gridDim.x) {
      if (nanoseconds() > deadline) {
        fail(group, Phase::plan, group.rank, gridDim.x, load_volatile(&workspace->blocks_counted));
      }
      if (has_failed(group)) {
        counted = false;
        break;
      }
    }
    __threadfence();
  }
  if (!__syncthreads_and(counted)) return false;

  add_counts(group, plan, shared, counts, first_row);
  if (blockIdx.x == 0) write_sums(group, plan, tables, shared);
  const int needed = shared.sources[group.size];
  for (int row = first_row; row < end_row; ++row) {
    if (per_block > 1) read_block(group, plan, shared, row / per_rank, row % per_rank * kTokensPerBlock);
    number_rows(group, plan, tables, shared, row / per_rank, row % per_rank * kTokensPerBlock);
    __syncthreads();
    // Arrivals are counted for each source alone.
    const bool next_source = (row + 1) % per_rank == 0;
    for (int i = threadIdx.x; i < columns; i += kPlanThreads) {
      shared.before[i] = i == group.num_local && next_source ? 0 : shared.before[i] + shared.masks[i].count();
    }
  }
  if (!plan.expert_layout && plan.fixed_rows) {
    const int64_t end = plan.max_rows * group.num_topk;
    for (int64_t i = static_cast<int64_t>(needed) * group.num_topk + blockIdx.x * kPlanThreads + threadIdx.x;
         i < end; i += static_cast<int64_t>(gridDim.x) * kPlanThreads) {
      plan.ids[i] = -1;
    }
    for (int i = needed + blockIdx.x * kPlanThreads + threadIdx.x; i < group.size * group.max_tokens;
         i += gridDim.x * kPlanThreads) {
      tables.sources[i] = -1;
    }
  }
  if (is_last_block<true>(&workspace->blocks_done)) finish(group, plan, shared, number);
  return true;
}

// No rows for any expert. Where sizes are fixed the host has not seen that the call failed when it launches
// what comes next, which may not stand numbers that nobody wrote.
__device__ void leave_empty(const Group& group, const Plan& plan) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kPlanThreads;
  for (int64_t i = first; i < group.num_local; i += threads) {
    plan.tokens_per_expert[i] = plan.padded_tokens_per_expert[i] = 0;
  }
  if (first == 0) *plan.rows_needed = 0;
  if (plan.expert_layout || !plan.fixed_rows) return;
  for (int64_t i = first; i < plan.max_rows * group.num_topk; i += threads) plan.ids[i] = -1;
}

__global__ void __launch_bounds__(kPlanThreads, 1)
    plan_kernel(const __grid_constant__ Group group, const __grid_constant__ Plan plan) {
  extern __shared__ __align__(16) char memory[];
  const Shared shared(memory, group.size, group.num_local);
  if (has_failed(group) || !make_plan(group, plan, shared)) leave_empty(group, plan);
}

}  // namespace

Status launch_plan(const Group& group, const Plan& plan) {
  const Notes& notes = plan.notes;
  if (notes.per_rank != nullptr) {
    const int64_t ids = align16(static_cast<int64_t>(notes.max_tokens) * group.num_topk * 2);
    if (ids + notes.bytes(group) > group.at.routing_bytes) {
      return Status::invalid("the routing of %d tokens and notes of %lld bytes don't fit in %lld bytes",
                             notes.max_tokens, static_cast<long long>(notes.bytes(group)),
                             static_cast<long long>(group.at.routing_bytes));
    }
  }
  const size_t shared_bytes = Shared::bytes(group.size, group.num_local, group.num_topk);
  const Status status =
      allow_shared_memory(reinterpret_cast<const void*>(&plan_kernel), static_cast<int>(shared_bytes));
  if (!status.is_ok()) return status;
  if (plan.meets) {
    const Status met = launch_meet(group, Phase::receive_routing, plan.stream);
    if (!met.is_ok()) return met;
  }
  plan_kernel<<<plan.num_sms, kPlanThreads, shared_bytes, plan.stream>>>(group, plan);
  return Status::from_cuda(cudaGetLastError(), "launching the plan kernel");
}

}  // namespace moe_ep::nvlink
