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

struct Launch {
  Combine combine;
  Slots slots;
  BeltShape belt;
};

// Two numbers rounded to T, as they lie in memory.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  __device__ static __nv_bfloat162 round(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct Pair<__half> {
  __device__ static __half2 round(float low, float high) { return __floats2half2_rn(low, high); }
};
template <>
struct Pair<float> {
  __device__ static float2 round(float low, float high) { return make_float2(low, high); }
};

// 16 bytes of a row as float32 numbers that are added to.
template <typename T>
struct Sum {
  static constexpr int kElements = 16 / sizeof(T);
  float at[kElements];

  // The first term, which a sum starts from; then more.
  __device__ __forceinline__ void set(uint4 word) {
    T values[kElements];
    memcpy(values, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = to_float(values[i]);
  }

  __device__ __forceinline__ void add(uint4 word) {
    T values[kElements];
    memcpy(values, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kElements; ++i) at[i] = __fadd_rn(at[i], to_float(values[i]));
  }

  __device__ __forceinline__ uint4 rounded() const {
    decltype(Pair<T>::round(0, 0)) pairs[kElements / 2];
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) pairs[i] = Pair<T>::round(at[2 * i], at[2 * i + 1]);
    uint4 word;
    memcpy(&word, pairs, sizeof(word));
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

  __device__ Context(const Group& group, const Launch& launch, Call call)
      : group(group),
        combine(launch.combine),
        slots(launch.slots),
        tables(const_cast<int*>(launch.combine.tables), group),
        call(call),
        lane(threadIdx.x % 32) {}

  __device__ float weight_of(int64_t row, int k) const {
    return __ldcg(combine.row_weights + (combine.expert_layout ? row : row * group.num_topk + k));
  }
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

// Takes the next segment off the belt for `add(v, word)`: each lane has kVectors words of it.
template <typename LoadAhead, typename Add>
__device__ __forceinline__ void take_words(Belt& belt, LoadAhead& load_ahead, Add&& add) {
  __syncwarp();  // all lanes have read the segment before
  load_ahead();
  const char* words = belt.take() + 16 * (threadIdx.x % 32);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) add(v, load_shared(words + 512 * v));
}

// The words of a segment of what this rank adds: its rows' sum, rounded; zeros if it has none.
template <typename T, typename LoadAhead>
__device__ __forceinline__ void add_own_rows(unsigned int lanes, Belt& belt, LoadAhead& load_ahead,
                                             uint4 (&words)[kVectors]) {
  if (lanes == 0) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) words[v] = make_uint4(0, 0, 0, 0);
    return;
  }
  Sum<T> sum[kVectors];
  take_words(belt, load_ahead, [&](int v, uint4 word) { sum[v].set(word); });
  for (unsigned int left = lanes & (lanes - 1); left; left &= left - 1) {
    take_words(belt, load_ahead, [&](int v, uint4 word) { sum[v].add(word); });
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) words[v] = sum[v].rounded();
}

// Writes a segment of `bytes` from the lanes' words, with `numbers` of the lanes behind it.
__device__ __forceinline__ void write_words(const uint4 (&words)[kVectors], char* to, int bytes, int numbers,
                                            float number, Outlet& outlet) {
  const int lane = threadIdx.x % 32;
  char* stage = outlet.open();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 512 * v + 16 * lane;
    if (at < bytes) store_shared(stage + at, words[v]);
  }
  if (numbers) {
    if (lane < numbers) reinterpret_cast<float*>(stage + bytes)[lane] = number;
    bytes += static_cast<int>(align16(4 * numbers));
  }
  outlet.send(to, bytes);
}

// Sends the next segment as it is.
template <typename LoadAhead>
__device__ __forceinline__ void forward(char* to, int bytes, int numbers, float number, Belt& belt,
                                        Outlet& outlet, LoadAhead& load_ahead) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  load_ahead();
  char* stage = belt.take();
  if (numbers) {
    if (lane < numbers) reinterpret_cast<float*>(stage + bytes)[lane] = number;
    bulk::fence_shared();
    __syncwarp();
    bytes += static_cast<int>(align16(4 * numbers));
  }
  if (lane == 0) {
    bulk::store(to, stage, bytes);
    bulk::close_group();
  }
  belt.was_forwarded();
  outlet.announcer.count_group();
}

// Adds up the rows that this rank has for the tokens of others, and writes the sums into their windows.
template <typename T>
struct Send {
  struct Item {
    Rows rows;
    float weight;  // of this lane's k
    int peer, index;
    bool ends_chunk;
  };

  const Context& context;
  Outlet& outlet;
  Chunks chunks;
  int place = 0;  // in the chunk
  int row;        // of the next item, for this lane's k
  bool may_send = false;
  bool failed = false;

  // Where rings take several rounds, each warp keeps to one rank, so that it waits for no other.
  __device__ Send(const Context& context, const Crew& crew, Outlet& outlet)
      : context(context),
        outlet(outlet),
        chunks(context.group, context.tables.recv_count, false,
               context.slots.has_rounds ? Tasks(crew, context.group.size - 1)
                                        : Tasks(context.group, kSending, crew)) {
    row = row_of(chunks.current(), 0);
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
    if (failed) return Fetched::failed;
    if (chunks.at_end()) return Fetched::none;
    const Chunks::Chunk chunk = chunks.current();
    const int round = context.slots.round(chunk.first);
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
    item.rows = {context.combine.rows + from * context.combine.row_bytes, 0u, 0u, {}};
    item.rows.lanes = context.combine.expert_layout ? here : here & -here;
    item.weight = 0.0f;
    if (context.combine.row_weights != nullptr && from >= 0) {
      item.weight = context.weight_of(from, context.lane);
    }
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    load_ahead();
    if (!may_send) may_send = first_round_may_begin(context.group, context.call, Phase::combine_send);
    failed = !may_send;
    if (failed) return;
    const Ring ring(context.group, item.peer, context.group.rank);
    char* slot = ring.slot(context.slots, item.index);
    const bool one_row = __popc(item.rows.lanes) == 1;
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      const int bytes = belt.bytes_from(begin);
      const bool last = begin + bytes == belt.row_bytes();
      const int numbers = last && context.combine.row_weights != nullptr ? context.group.num_topk : 0;
      if (one_row) {
        forward(slot + begin, bytes, numbers, item.weight, belt, outlet, load_ahead);
      } else {
        uint4 words[kVectors];
        add_own_rows<T>(item.rows.lanes, belt, load_ahead, words);
        write_words(words, slot + begin, bytes, numbers, item.weight, outlet);
      }
    }
    if (item.ends_chunk) {
      outlet.announcer.end_chunk(ring, context.slots, context.call, item.index / kChunk * kChunk);
    }
  }
};

// Adds up what all ranks have for this rank's tokens.
template <typename T>
struct Receive {
  struct Item {
    // Rows that this rank has itself, `rows.lanes`, are added up in the order of k and rounded: what the rank
    // adds, at the place of its last k, to what other ranks have added up, `rows.others`.
    Rows rows;
    unsigned int own_at;  // this rank's place among the lanes; 0: it adds nothing
    float weight;         // of this lane's k
    int token;
    int source;            // of this lane's row, or -1 for this rank
    unsigned int arrived;  // lanes whose row came from another rank
  };

  const Context& context;
  Outlet& outlet;
  Tasks tokens;
  int entry;  // of the next token, for this lane's k

  __device__ Receive(const Context& context, const Crew& crew, Outlet& outlet)
      : context(context), outlet(outlet), tokens(context.group, kReceiving, crew) {
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
      item.source = index >> kArrivalBits;
      const int arrival = index & ((1 << kArrivalBits) - 1);
      const Ring ring(group, group.rank, item.source);
      row = ring.slot(context.slots, arrival);
      const uint64_t* signal = ring.signal(context.slots, arrival);
      const uint64_t stamp = context.call.stamp(context.slots.round(arrival) + 1);
      arrived = wait ? wait_for(signal, stamp, group, Phase::combine_receive, item.source)
                     : load_acquire(signal) >= stamp;
    }
    if (!__all_sync(kAllLanes, arrived)) return wait ? Fetched::failed : Fetched::not_yet;
    __syncwarp();
    bulk::fence_global();
    item.rows = {row, 0u, 0u, {}};
    item.arrived = __ballot_sync(kAllLanes, remote && last);
    item.own_at = __ballot_sync(kAllLanes, serves && !remote && last);
    item.rows.lanes = __ballot_sync(kAllLanes, own && (combine.expert_layout || last));
    item.rows.others = item.arrived;
    if (item.rows.lanes == item.own_at) {  // one row, which is what it adds as it is
      item.rows.others |= item.own_at;
      item.rows.lanes = item.own_at = 0;
    }
    item.weight = 0.0f;
    if (combine.row_weights != nullptr) {
      if (remote)
        item.weight = __ldcg(reinterpret_cast<const float*>(row + combine.row_bytes) + context.lane);
      if (own) item.weight = context.weight_of(index, context.lane);
    }
    item.token = tokens.current();
    tokens.advance();
    entry = entry_of(tokens.current());
    return Fetched::ready;
  }

  // Sets the totals of a segment to the biases' sum.
  __device__ __forceinline__ void add_biases(int64_t offset, int bytes, Sum<T> (&total)[kVectors]) const {
#pragma unroll
    for (int b = 0; b < kMaxBiases; ++b) {
      if (context.combine.biases[b] == nullptr) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = 512 * v + 16 * context.lane;
        if (at >= bytes) continue;
        const uint4 word = __ldcg(reinterpret_cast<const uint4*>(context.combine.biases[b] + offset + at));
        b == 0 ? total[v].set(word) : total[v].add(word);
      }
    }
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    const Combine& combine = context.combine;
    const int64_t offset = item.token * combine.row_bytes;
    const bool has_biases = combine.biases[0] != nullptr;
    const bool one_row = item.rows.lanes == 0 && item.own_at == 0 && __popc(item.rows.others) == 1;
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      const int bytes = belt.bytes_from(begin);
      if (one_row && !has_biases) {
        forward(combine.out + offset + begin, bytes, 0, 0.0f, belt, outlet, load_ahead);
        continue;
      }
      uint4 words[kVectors];
      if (item.own_at) add_own_rows<T>(item.rows.lanes, belt, load_ahead, words);
      Sum<T> total[kVectors];
      bool started = has_biases;
      if (has_biases) add_biases(offset + begin, bytes, total);
      for (unsigned int left = item.rows.others | item.own_at; left; left &= left - 1) {
        if (left & -left & item.own_at) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) started ? total[v].add(words[v]) : total[v].set(words[v]);
        } else {
          take_words(belt, load_ahead,
                     [&](int v, uint4 word) { started ? total[v].add(word) : total[v].set(word); });
        }
        started = true;
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = 512 * v + 16 * context.lane;
        if (at >= bytes) continue;
        const uint4 word = started ? total[v].rounded() : make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(combine.out + offset + begin + at) = word;
      }
    }
    const int num_topk = context.group.num_topk;
    if (combine.row_weights != nullptr && context.lane < num_topk) {
      combine.out_weights[static_cast<int64_t>(item.token) * num_topk + context.lane] = item.weight;
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
  Belt belt(stages + launch.belt.stage_bytes, barriers[warp], launch.belt,
            static_cast<int>(launch.combine.row_bytes));
  Outlet outlet(stages);
  if (crew.sends) {
    Send<T> send(context, crew, outlet);
    run_job(send, belt);
    outlet.announcer.flush();
  }
  // Those that send help with the rest when they are done.
  Receive<T> receive(context, crew, outlet);
  run_job(receive, belt);
  belt.drain();
  finish_call(group, call);
}

}  // namespace

Status launch_combine(const Group& group, const Combine& combine) {
  Launch launch{combine, {}, {}};
  const int numbers = combine.row_weights == nullptr ? 0 : group.num_topk;
  launch.slots.bytes = align16(combine.row_bytes + 4 * numbers);
  launch.slots.rows = ring_rows(group, launch.slots.bytes);
  launch.slots.has_rounds = launch.slots.rows < group.max_tokens;
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
