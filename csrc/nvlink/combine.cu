#include "nvlink/combine.h"

#include <algorithm>
#include <type_traits>

#include "nvlink/plan_tables.h"
#include "nvlink/rows.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kWarps = 12;
constexpr int kMaxStages = 8;
constexpr int kVectors = 7;  // 16-byte words of a segment that each lane adds up
constexpr int kSegmentBytes = 32 * 16 * kVectors;
constexpr int kSharedBytes = 226 * 1024;
using RowBelt = Belt<false>;

struct Launch {
  Combine combine;
  Slots slots;
  BeltShape belt;
};

// 16 bytes of a row as float32 numbers that are added to. Sums start from -0, the one number that changes no
// other.
template <typename T>
struct Sum {
  static constexpr int kElements = 16 / sizeof(T);
  float at[kElements];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = -0.0f;
  }

  __device__ __forceinline__ void add(uint4 word) {
    T values[kElements];
    memcpy(values, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = __fadd_rn(at[i], to_float(values[i]));
  }

  // Zeros without a sign if there was `nothing` to add.
  __device__ __forceinline__ uint4 rounded(bool nothing) const {
    T values[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = from_float<T>(nothing ? 0.0f : at[i]);
    uint4 word;
    memcpy(&word, values, sizeof(word));
    return word;
  }
};

// What all jobs know.
struct Context {
  const Group& group;
  const Combine& combine;
  const Slots& slots;
  const PlanTables tables;
  const Call call;
  const int lane;
  const int vectors;

  __device__ Context(const Group& group, const Launch& launch, Call call)
      : group(group),
        combine(launch.combine),
        slots(launch.slots),
        tables(const_cast<int*>(launch.combine.tables), group),
        call(call),
        lane(threadIdx.x % 32),
        vectors(static_cast<int>(launch.combine.row_bytes / 16)) {}

  __device__ float weight_of(int64_t row, int k) const {
    return __ldcg(combine.row_weights + (combine.expert_layout ? row : row * group.num_topk + k));
  }
};

// A sum to be made: of the rows of some lanes, in the order of k. `ends` are the lanes that are the last of
// their rank: what a rank adds is rounded there.
struct Terms {
  Rows rows;
  unsigned int sums;  // lanes whose row is what a rank adds, already
  unsigned int ends;
  float weight;  // of this lane's k
};

// 16 bytes at once, which the compiler would take apart.
__device__ __forceinline__ uint4 load_shared(const char* from) {
  uint4 word;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(bulk::shared_address(from)));
  return word;
}

__device__ __forceinline__ void store_shared(char* to, uint4 word) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(bulk::shared_address(to)), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}

// Where a warp puts its sums, a segment at a time, to leave by bulk stores.
class Outlet {
 public:
  __device__ explicit Outlet(char* stage) : stage_(stage) {}

  // Lanes may write the stage once it is `open`; then they `send` it.
  __device__ __forceinline__ char* open() const {
    if (threadIdx.x % 32 == 0) bulk::wait_until_read<0>();
    __syncwarp();
    return stage_;
  }

  __device__ __forceinline__ void send(char* to, int bytes) {
    bulk::fence_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      bulk::store(to, stage_, bytes);
      bulk::close_group();
    }
    announcer.count_group();
  }

  Announcer announcer;

 private:
  char* stage_;
};

// Writes the sum of an item's terms, after that of the biases, to `out`, with `numbers` of the lanes behind
// it.
template <typename T, int Biases, typename LoadAhead>
__device__ __forceinline__ void write_sum(const Context& context, const Terms& terms,
                                          const char* const (&biases)[Biases], char* out, int numbers,
                                          RowBelt& belt, Outlet& outlet, LoadAhead& load_ahead) {
  bool nothing = terms.ends == 0;
#pragma unroll
  for (int b = 0; b < Biases; ++b) nothing &= biases[b] == nullptr;
  for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
    int bytes = belt.bytes_from(begin);
    Sum<T> total[kVectors], of_rank[kVectors];
    bool rank_has_rows = false;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      total[v].clear();
      of_rank[v].clear();
    }
#pragma unroll
    for (int b = 0; b < Biases; ++b) {
      if (biases[b] == nullptr) continue;
      const uint4* words = reinterpret_cast<const uint4*>(biases[b] + begin) + context.lane;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if ((32 * v + context.lane) * 16 < bytes) total[v].add(__ldcg(words + 32 * v));
      }
    }
    for (unsigned int left = terms.rows.lanes | terms.ends; left; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      if (terms.rows.lanes >> lane & 1) {
        __syncwarp();  // all lanes have read the segment before, whose place in the queue is free now
        load_ahead();
        const char* words = belt.take() + 16 * context.lane;
        if (terms.sums >> lane & 1) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) total[v].add(load_shared(words + 512 * v));
          continue;
        }
        rank_has_rows = true;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) of_rank[v].add(load_shared(words + 512 * v));
      }
      if (terms.ends >> lane & 1) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          total[v].add(of_rank[v].rounded(!rank_has_rows));
          of_rank[v].clear();
        }
        rank_has_rows = false;
      }
    }
    char* stage = outlet.open();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if ((32 * v + context.lane) * 16 < bytes) {
        store_shared(stage + 512 * v + 16 * context.lane, total[v].rounded(nothing));
      }
    }
    if (numbers && begin + bytes == belt.row_bytes()) {
      if (context.lane < numbers) reinterpret_cast<float*>(stage + bytes)[context.lane] = terms.weight;
      bytes += static_cast<int>(align16(4 * numbers));
    }
    outlet.send(out + begin, bytes);
  }
}

// Adds up the rows that this rank has for the tokens of others, and writes the sums into their windows.
template <typename T>
struct Send {
  struct Item {
    Rows rows;
    Terms terms;
    int peer, index;
    bool ends_chunk;
  };

  const Context& context;
  Outlet& outlet;
  Chunks chunks;
  int place = 0;  // in the chunk
  int row;        // of the next item, for this lane's k

  // Where rings take several rounds, each warp keeps to one rank, so that it waits for no other.
  __device__ Send(const Context& context, const Crew& crew, Outlet& outlet)
      : context(context),
        outlet(outlet),
        chunks(context.group, context.tables.recv_count, false,
               has_rounds(context) ? nullptr : context.group.workspace->tasks + kSending,
               has_rounds(context) ? crew.keeping_to(context.group.size - 1) : crew) {
    row = row_of(chunks.current(), 0);
  }

  __device__ static bool has_rounds(const Context& context) {
    return context.slots.rows < context.group.max_tokens;
  }

  // The row that arrival `place` of a chunk has for this lane's k.
  __device__ int row_of(const Chunks::Chunk& chunk, int place) const {
    const Group& group = context.group;
    const int64_t pair = static_cast<int64_t>(chunk.rank) * group.max_tokens + chunk.first + place;
    return context.lane < group.num_topk && place < chunk.rows
               ? context.tables.arrival_rows[pair * group.num_topk + context.lane]
               : -1;
  }

  __device__ Fetched fetch(Item& item, bool wait) {
    if (chunks.at_end()) return Fetched::none;
    const Chunks::Chunk chunk = chunks.current();
    const int round = chunk.first / context.slots.rows;
    if (place == 0 && round > 0) {
      if (wait) outlet.announcer.flush();
      const Fetched drained =
          warp_fetch_drained(context.group, context.call, chunk.rank, round, Phase::combine_send, wait);
      if (drained != Fetched::ready) return drained;
    }
    item.peer = chunk.rank;
    item.index = chunk.first + place;
    item.ends_chunk = place + 1 == chunk.rows;
    const int64_t from = row;
    place = item.ends_chunk ? 0 : place + 1;
    if (item.ends_chunk) chunks.advance();
    if (!chunks.at_end()) row = row_of(chunks.current(), place);  // of the item after this one
    const unsigned int here = __ballot_sync(kAllLanes, from >= 0);
    const unsigned int terms = context.combine.expert_layout ? here : here & -here;
    item.terms.rows = {context.combine.rows + from * context.combine.row_bytes, terms};
    item.terms.sums = context.combine.expert_layout ? 0u : terms;
    item.terms.ends = terms ? 1u << (31 - __clz(terms)) : 0u;
    item.terms.weight = 0.0f;
    if (context.combine.row_weights != nullptr && from >= 0) {
      item.terms.weight = context.weight_of(from, context.lane);
    }
    item.rows = item.terms.rows;
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, RowBelt& belt, LoadAhead& load_ahead) {
    const Ring ring(context.group, item.peer, context.group.rank);
    char* slot = ring.slot(context.slots, item.index);
    const char* const no_biases[1] = {nullptr};
    const int numbers = context.combine.row_weights == nullptr ? 0 : context.group.num_topk;
    write_sum<T>(context, item.terms, no_biases, slot, numbers, belt, outlet, load_ahead);
    if (item.ends_chunk) {
      outlet.announcer.end_chunk(ring, context.slots, context.call, item.index / kChunk * kChunk);
    }
  }
};

// Adds up what all ranks have for this rank's tokens.
template <typename T>
struct Receive {
  struct Item {
    Rows rows;
    Terms terms;
    int token;
    int source;            // of this lane's row, or -1 for this rank
    unsigned int arrived;  // lanes whose row came from another rank
  };

  const Context& context;
  Outlet& outlet;
  Tasks tokens;
  int entry;  // of the next token, for this lane's k

  __device__ Receive(const Context& context, const Crew& crew, Outlet& outlet)
      : context(context), outlet(outlet), tokens(context.group.workspace->tasks + kReceiving, crew) {
    entry = entry_of(tokens.current());
  }

  __device__ int entry_of(int64_t token) const {
    const int num_topk = context.group.num_topk;
    return context.lane < num_topk && token < context.combine.num_tokens
               ? context.tables.entries[token * num_topk + context.lane]
               : PlanTables::kNone;
  }

  __device__ Fetched fetch(Item& item, bool wait) {
    if (tokens.current() >= context.combine.num_tokens) return Fetched::none;
    const Group& group = context.group;
    const Combine& combine = context.combine;
    const bool serves = entry != PlanTables::kNone;
    const bool remote = serves && (entry & PlanTables::kRemote);
    const bool last = serves && (entry & PlanTables::kLast);
    const int index = entry & PlanTables::kIndex;
    const bool own = serves && !remote && index != PlanTables::kDropped;
    const char* row = combine.rows + index * combine.row_bytes;
    item.source = -1;
    bool arrived = true;
    if (remote) {
      item.source = index / group.max_tokens;
      const int arrival = index % group.max_tokens;
      const Ring ring(group, group.rank, item.source);
      row = ring.slot(context.slots, arrival);
      const uint64_t* signal = ring.signal(context.slots, arrival);
      const uint64_t stamp = context.call.stamp(arrival / context.slots.rows + 1);
      arrived = wait ? wait_for(signal, stamp, group, Phase::combine_receive, item.source)
                     : load_acquire(signal) >= stamp;
    }
    if (!__all_sync(kAllLanes, arrived)) return wait ? Fetched::failed : Fetched::not_yet;
    __syncwarp();
    bulk::fence_global();
    const bool adds = remote ? last : own && (combine.expert_layout || last);
    item.terms.rows = {row, __ballot_sync(kAllLanes, adds)};
    item.terms.sums = __ballot_sync(kAllLanes, adds && (remote || !combine.expert_layout));
    item.terms.ends = __ballot_sync(kAllLanes, last);
    item.terms.weight = 0.0f;
    if (combine.row_weights != nullptr) {
      if (remote)
        item.terms.weight = __ldcg(reinterpret_cast<const float*>(row + combine.row_bytes) + context.lane);
      if (own) item.terms.weight = context.weight_of(index, context.lane);
    }
    item.rows = item.terms.rows;
    item.arrived = __ballot_sync(kAllLanes, remote && last);
    item.token = tokens.current();
    tokens.advance();
    entry = entry_of(tokens.current());
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, RowBelt& belt, LoadAhead& load_ahead) {
    const Combine& combine = context.combine;
    const char* biases[kMaxBiases];
#pragma unroll
    for (int b = 0; b < kMaxBiases; ++b) {
      biases[b] = combine.biases[b] == nullptr ? nullptr : combine.biases[b] + item.token * combine.row_bytes;
    }
    write_sum<T>(context, item.terms, biases, combine.out + item.token * combine.row_bytes, 0, belt, outlet,
                 load_ahead);
    const int num_topk = context.group.num_topk;
    if (combine.row_weights != nullptr && context.lane < num_topk) {
      combine.out_weights[static_cast<int64_t>(item.token) * num_topk + context.lane] = item.terms.weight;
    }
    for (unsigned int left = item.arrived; left; left &= left - 1) {
      const int rank = __shfl_sync(kAllLanes, item.source, __ffs(left) - 1);
      warp_consume(context.group, context.slots, context.call, rank, 1, context.tables.send_count[rank]);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    combine_kernel(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t barriers[kWarps][kMaxStages];
  if (has_failed(group)) return;
  const Call call{load_volatile(&group.workspace->calls)};
  const Context context(group, launch, call);
  const Crew crew(launch.combine.send_blocks);
  const int warp = threadIdx.x / 32;
  char* const stages = memory + warp * (launch.belt.stages + 1) * launch.belt.stage_bytes;
  RowBelt belt(stages + launch.belt.stage_bytes, barriers[warp], launch.belt,
               static_cast<int>(launch.combine.row_bytes));
  Outlet outlet(stages);
  if (crew.sends && may_send(group, call, Phase::combine_send)) {
    Send<T> send(context, crew, outlet);
    run_job(send, belt);
    outlet.announcer.flush();
  }
  // Those that send help with the rest when they are done.
  Receive<T> receive(context, crew, outlet);
  run_job(receive, belt);
  bulk::wait_until_written<0>();
  finish_call(group, call);
}

}  // namespace

Status launch_combine(const Group& group, const Combine& combine) {
  Launch launch{combine, {}, {}};
  const int numbers = combine.row_weights == nullptr ? 0 : group.num_topk;
  launch.slots.bytes = align16(combine.row_bytes + 4 * numbers);
  launch.slots.rows = ring_rows(group, launch.slots.bytes);
  if (group.size > 1 && launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
  launch.belt.segment_bytes = static_cast<int>(std::min<int64_t>(kSegmentBytes, combine.row_bytes));
  launch.belt.stage_bytes = kSegmentBytes + static_cast<int>(align16(4 * numbers));
  launch.belt.stages = std::min(kMaxStages, kSharedBytes / kWarps / launch.belt.stage_bytes - 1);
  return for_dtype(combine.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Status status =
        allow_shared_memory(reinterpret_cast<const void*>(&combine_kernel<T>), kSharedBytes);
    if (!status.is_ok()) return status;
    combine_kernel<T><<<combine.num_blocks, 32 * kWarps, kSharedBytes, combine.stream>>>(group, launch);
    return Status::from_cuda(cudaGetLastError(), "launching the combine kernel");
  });
}

}  // namespace moe_ep::nvlink
