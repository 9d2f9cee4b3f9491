#include "nvlink/dispatch.h"

#include <algorithm>

#include "common/vector.cuh"
#include "nvlink/plan_tables.h"
#include "nvlink/rows.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kMaxWarps = 10;
constexpr int kMaxStages = 8;
constexpr int kSegmentBytes = 7168;
constexpr int kSharedBytes = 226 * 1024;

struct Launch {
  Dispatch dispatch;
  Slots slots;
  BeltShape belt;
  bool bulk_numbers;  // scales and weights are multiples of 16 bytes, and so go by bulk copies
};

// What all jobs know.
struct Context {
  const Group& group;
  const Dispatch& dispatch;
  const Slots& slots;
  const PlanTables tables;
  const Call call;
  const int lane;
  const int vectors;
  const int weight_words;
  const bool bulk_numbers;

  __device__ Context(const Group& group, const Launch& launch, Call call)
      : group(group),
        dispatch(launch.dispatch),
        slots(launch.slots),
        tables(const_cast<int*>(launch.dispatch.tables), group),
        call(call),
        lane(threadIdx.x % 32),
        vectors(static_cast<int>(launch.dispatch.row_bytes / 16)),
        weight_words(launch.dispatch.weights == nullptr ? 0 : group.num_topk),
        bulk_numbers(launch.bulk_numbers) {}

  __device__ const char* row_of(int64_t token) const { return dispatch.rows + token * dispatch.row_bytes; }

  __device__ int scale_bytes() const { return 4 * dispatch.scale_words; }

  __device__ int numbers() const { return dispatch.scale_words + weight_words; }

  // A token of this rank with the numbers that travel behind its row: scales, then weights.
  __device__ Rows token_rows(int64_t token) const {
    Rows rows{row_of(token), 1u, 0u, {}};
    if (bulk_numbers) {
      rows.tails[0] = {reinterpret_cast<const char*>(dispatch.scales) + token * scale_bytes(), scale_bytes()};
      rows.tails[1] = {reinterpret_cast<const char*>(dispatch.weights + token * weight_words),
                       4 * weight_words};
    }
    return rows;
  }

  // Where they don't go by bulk copies.
  __device__ void fill_numbers(int64_t token, char* to) const {
    float* out = reinterpret_cast<float*>(to);
    for (int i = lane; i < numbers(); i += 32) {
      out[i] = i < dispatch.scale_words
                   ? __ldcg(dispatch.scales + token * dispatch.scale_words + i)
                   : __ldcg(dispatch.weights + token * group.num_topk + i - dispatch.scale_words);
    }
  }
};

// This rank's tokens in the order in which they are sent: those of other ranks, or its own.
class TokenChunks {
 public:
  __device__ TokenChunks(const Context& context, bool own, TaskKind kind, const Crew& crew)
      : context_(context),
        chunks_(context.group, context.tables.send_count, own, Tasks(context.group, kind, crew)) {
    tokens_ = tokens_of(chunks_.current());
    next_tokens_ = tokens_of(chunks_.next());
  }

  __device__ bool at_end() const { return chunks_.at_end(); }
  __device__ const Chunks::Chunk& current() const { return chunks_.current(); }
  __device__ int place() const { return place_; }
  __device__ int token() const { return __shfl_sync(kAllLanes, tokens_, place_); }

  __device__ void advance() {
    if (++place_ < chunks_.current().rows) return;
    place_ = 0;
    const Chunks::Chunk expected = chunks_.next();
    chunks_.advance();
    const Chunks::Chunk& chunk = chunks_.current();
    const bool known = chunk.rank == expected.rank && chunk.first == expected.first;
    tokens_ = known ? next_tokens_ : tokens_of(chunk);
    next_tokens_ = tokens_of(chunks_.next());
  }

 private:
  // One in each lane.
  __device__ int tokens_of(const Chunks::Chunk& chunk) const {
    const int64_t pair = static_cast<int64_t>(chunk.rank) * context_.group.max_tokens + chunk.first;
    return context_.lane < chunk.rows ? context_.tables.send_tokens[pair + context_.lane] : 0;
  }

  const Context& context_;
  Chunks chunks_;
  int place_ = 0;
  int tokens_;
  int next_tokens_;
};

// Fills the rings of peers with this rank's tokens.
struct Send {
  struct Item {
    Rows rows;
    int64_t token;
    int peer, index;
    bool ends_chunk;
  };

  const Context& context;
  TokenChunks chunks;
  Announcer announcer;
  bool may_send = false;
  bool failed = false;

  __device__ Send(const Context& context, const Crew& crew)
      : context(context), chunks(context, false, kSending, crew) {}

  __device__ Fetched fetch(Item& item, bool wait) {
    if (failed) return Fetched::failed;
    if (chunks.at_end()) return Fetched::none;
    const Chunks::Chunk& chunk = chunks.current();
    const int round = context.slots.round(chunk.first);
    if (chunks.place() == 0 && round > 0) {
      if (wait) announcer.flush();
      const Fetched drained =
          warp_fetch_drained(context.group, context.call, chunk.rank, round, Phase::dispatch_send, wait);
      if (drained != Fetched::ready) return drained;
    }
    item.token = chunks.token();
    item.rows = context.token_rows(item.token);
    item.peer = chunk.rank;
    item.index = chunk.first + chunks.place();
    item.ends_chunk = chunks.place() + 1 == chunk.rows;
    chunks.advance();
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    load_ahead();
    if (!may_send) may_send = first_round_may_begin(context.group, context.call, Phase::dispatch_send);
    failed = !may_send;
    if (failed) return;
    const Ring ring(context.group, item.peer, context.group.rank);
    char* slot = ring.slot(context.slots, item.index);
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      load_ahead();
      char* stage = belt.take();
      int bytes = belt.bytes_from(begin);
      if (begin + bytes == belt.row_bytes() && context.numbers()) {
        if (!context.bulk_numbers) {
          context.fill_numbers(item.token, stage + bytes);
          bulk::fence_shared();
          __syncwarp();
        }
        bytes += static_cast<int>(align16(4 * context.numbers()));
      }
      if (context.lane == 0) {
        bulk::store(slot + begin, stage, bytes);
        bulk::close_group();
      }
      belt.was_forwarded();
      announcer.count_group();
    }
    if (item.ends_chunk) announcer.end_chunk(ring, context.slots, context.call, item.index / kChunk * kChunk);
  }
};

// Puts arrivals where the plan wants them; `Source` says which and where they lie.
template <typename Source>
struct Receive {
  struct Item {
    Rows rows;
    typename Source::Arrival arrival;
    int place;  // of this lane's k: its row, or -1
  };

  const Context& context;
  Source source;

  __device__ Receive(const Context& context, const Crew& crew) : context(context), source(context, crew) {}

  __device__ Fetched fetch(Item& item, bool wait) {
    const Fetched fetched = source.fetch(item.arrival, wait);
    if (fetched != Fetched::ready) return fetched;
    const int num_topk = context.group.num_topk;
    const int64_t pair =
        static_cast<int64_t>(item.arrival.rank) * context.group.max_tokens + item.arrival.index;
    item.place = context.lane < num_topk ? context.tables.arrival_rows[pair * num_topk + context.lane] : -1;
    item.rows = source.rows(item.arrival);
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    const Dispatch& dispatch = context.dispatch;
    const unsigned int here = __ballot_sync(kAllLanes, item.place >= 0);
    const unsigned int copies = dispatch.expert_layout ? here : here & -here;
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      load_ahead();
      char* stage = belt.take();
      const int bytes = belt.bytes_from(begin);
      const bool last = begin + bytes == belt.row_bytes();
      char* numbers = stage + bytes;
      if (last) source.fill_numbers(item.arrival, numbers);
      const int scale_bytes = last && context.bulk_numbers ? context.scale_bytes() : 0;
      for (unsigned int left = copies; left; left &= left - 1) {
        const int64_t row = __shfl_sync(kAllLanes, item.place, __ffs(left) - 1);
        if (context.lane != 0) continue;
        bulk::store(dispatch.out_rows + row * dispatch.row_bytes + begin, stage, bytes);
        if (scale_bytes) {
          bulk::store(reinterpret_cast<char*>(dispatch.out_scales) + row * scale_bytes, numbers, scale_bytes);
        }
      }
      if (context.lane == 0) bulk::close_group();
      belt.was_forwarded();
      if (last) place_numbers(item, here, copies, reinterpret_cast<const float*>(numbers));
    }
    source.finish(item.arrival);
  }

  // Those that don't go by bulk copies: the lanes' part.
  __device__ void place_numbers(const Item& item, unsigned int here, unsigned int copies,
                                const float* numbers) const {
    const Dispatch& dispatch = context.dispatch;
    const int lane = context.lane;
    if (!context.bulk_numbers) {
      for (unsigned int left = copies; left; left &= left - 1) {
        const int64_t row = __shfl_sync(kAllLanes, item.place, __ffs(left) - 1);
        for (int i = lane; i < dispatch.scale_words; i += 32) {
          dispatch.out_scales[row * dispatch.scale_words + i] = numbers[i];
        }
      }
    }
    if (context.weight_words && here) {
      const int num_topk = context.group.num_topk;
      const float weight = lane < num_topk ? numbers[dispatch.scale_words + lane] : 0.0f;
      const int64_t row = __shfl_sync(kAllLanes, item.place, __ffs(here) - 1);
      if (dispatch.expert_layout) {
        if (item.place >= 0) dispatch.out_weights[item.place] = weight;
      } else if (lane < num_topk) {
        dispatch.out_weights[row * num_topk + lane] = item.place >= 0 ? weight : 0.0f;
      }
    }
    __syncwarp();  // all have read them
  }
};

struct Arrival {
  int rank, index;
  int token;  // of this rank's own
  int chunk;  // rows of the chunk that ends with this one, or 0
};

// This rank's own tokens.
struct OwnTokens {
  using Arrival = nvlink::Arrival;
  const Context& context;
  TokenChunks chunks;

  __device__ OwnTokens(const Context& context, const Crew& crew)
      : context(context), chunks(context, true, kOwn, crew) {}

  __device__ Fetched fetch(Arrival& arrival, bool) {
    if (chunks.at_end()) return Fetched::none;
    arrival = {context.group.rank, chunks.current().first + chunks.place(), chunks.token(), 0};
    chunks.advance();
    return Fetched::ready;
  }

  __device__ Rows rows(const Arrival& arrival) const { return context.token_rows(arrival.token); }

  __device__ void fill_numbers(const Arrival& arrival, char* to) const {
    if (context.bulk_numbers) return;
    context.fill_numbers(arrival.token, to);
    __syncwarp();
  }

  __device__ void finish(const Arrival&) const {}
};

// What the other ranks send.
struct PeersTokens {
  using Arrival = nvlink::Arrival;
  const Context& context;
  Chunks chunks;
  int place = 0;

  __device__ PeersTokens(const Context& context, const Crew& crew)
      : context(context),
        chunks(context.group, context.tables.recv_count, false, Tasks(context.group, kReceiving, crew)) {}

  __device__ Fetched fetch(Arrival& arrival, bool wait) {
    if (chunks.at_end()) return Fetched::none;
    const Chunks::Chunk& chunk = chunks.current();
    if (place == 0) {
      const Ring ring(context.group, context.group.rank, chunk.rank);
      const Fetched arrived = warp_fetch_arrived(context.group, ring, context.slots, context.call, chunk.rank,
                                                 chunk.first, Phase::dispatch_receive, wait);
      if (arrived != Fetched::ready) return arrived;
    }
    const bool ends_chunk = place + 1 == chunk.rows;
    arrival = {chunk.rank, chunk.first + place, 0, ends_chunk ? chunk.rows : 0};
    place = ends_chunk ? 0 : place + 1;
    if (ends_chunk) chunks.advance();
    return Fetched::ready;
  }

  __device__ Rows rows(const Arrival& arrival) const {
    const char* slot =
        Ring(context.group, context.group.rank, arrival.rank).slot(context.slots, arrival.index);
    const int tail_bytes = static_cast<int>(align16(4 * context.numbers()));
    return {slot, 1u, 0u, {{slot + context.dispatch.row_bytes, tail_bytes}, {}}};
  }

  __device__ void fill_numbers(const Arrival&, char*) const {}

  __device__ void finish(const Arrival& arrival) const {
    if (arrival.chunk == 0) return;
    warp_consume(context.group, context.slots, context.call, arrival.rank, arrival.chunk,
                 context.tables.recv_count[arrival.rank]);
  }
};

__device__ void clear_row(const Context& context, int64_t row) {
  const Dispatch& dispatch = context.dispatch;
  uint4* to = reinterpret_cast<uint4*>(dispatch.out_rows + row * dispatch.row_bytes);
  for (int i = context.lane; i < context.vectors; i += 32) to[i] = make_uint4(0, 0, 0, 0);
  for (int i = context.lane; i < dispatch.scale_words; i += 32) {
    dispatch.out_scales[row * dispatch.scale_words + i] = dispatch.scale_padding;
  }
  if (dispatch.weights == nullptr) return;
  const int width = dispatch.expert_layout ? 1 : context.group.num_topk;
  if (context.lane < width) dispatch.out_weights[row * width + context.lane] = 0.0f;
}

// Rows without a token: between experts, and behind all.
__device__ void clear_padding(const Context& context, const Crew& crew) {
  const PlanTables& tables = context.tables;
  const int64_t num_rows = context.dispatch.num_rows;
  int64_t end = tables.recv_start[context.group.size];
  if (context.dispatch.expert_layout) {
    for (int expert = crew.index; expert < context.group.num_local; expert += crew.size) {
      const int64_t next = min(static_cast<int64_t>(tables.expert_begin[expert + 1]), num_rows);
      for (int64_t row = tables.expert_begin[expert] + tables.expert_count[expert]; row < next; ++row) {
        clear_row(context, row);
      }
    }
    end = tables.expert_begin[context.group.num_local];
  }
  for (int64_t row = end + crew.index; row < num_rows; row += crew.size) clear_row(context, row);
}

__global__ void __launch_bounds__(32 * kMaxWarps, 1)
    dispatch_kernel(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t barriers[kMaxWarps][kMaxStages];
  if (has_failed(group)) return;
  const Call call{load_volatile(&group.workspace->calls)};
  const Context context(group, launch, call);
  const Crew crew(launch.dispatch.send_blocks);
  const int warp = threadIdx.x / 32;
  Belt belt(memory + warp * launch.belt.stages * launch.belt.stage_bytes, barriers[warp], launch.belt,
            static_cast<int>(launch.dispatch.row_bytes));
  if (crew.sends) {
    Send send(context, crew);
    run_job(send, belt);
    send.announcer.flush();
  }
  // Those that send help with the rest when they are done.
  Receive<OwnTokens> own(context, crew);
  run_job(own, belt);
  if (launch.dispatch.has_padding && !crew.sends) clear_padding(context, crew);
  if (group.size > 1) {
    Receive<PeersTokens> peers(context, crew);
    run_job(peers, belt);
  }
  belt.drain();
  finish_call(group, call);
}

}  // namespace

Status launch_dispatch(const Group& group, const Dispatch& dispatch) {
  const int weight_words = dispatch.weights == nullptr ? 0 : group.num_topk;
  Launch launch{dispatch, {}, {}, true};
  const int numbers = dispatch.scale_words + weight_words;
  launch.slots.bytes = align16(dispatch.row_bytes + 4 * numbers);
  launch.slots.rows = ring_rows(group, launch.slots.bytes);
  launch.slots.has_rounds = launch.slots.rows < group.max_tokens;
  if (group.size > 1 && launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
  // Many multiprocessors wait for the link, and rather have more rows under way in each warp; few are kept
  // busy by more warps.
  const int warps = dispatch.num_blocks > 32 ? 7 : kMaxWarps;
  const int segments = static_cast<int>((dispatch.row_bytes + kSegmentBytes - 1) / kSegmentBytes);
  launch.belt.segment_bytes = static_cast<int>(align16((dispatch.row_bytes + segments - 1) / segments));
  launch.belt.stage_bytes = static_cast<int>(align16(launch.belt.segment_bytes + 4 * numbers));
  launch.belt.stages = std::min(kMaxStages, kSharedBytes / warps / launch.belt.stage_bytes);
  for (const void* pointer :
       {static_cast<const void*>(dispatch.scales), static_cast<const void*>(dispatch.weights)}) {
    launch.bulk_numbers &= is_aligned(pointer, 16);
  }
  launch.bulk_numbers &= dispatch.scale_words % 4 == 0 && weight_words % 4 == 0;
  const Status status = allow_shared_memory(reinterpret_cast<const void*>(&dispatch_kernel), kSharedBytes);
  if (!status.is_ok()) return status;
  dispatch_kernel<<<dispatch.num_blocks, 32 * warps, kSharedBytes, dispatch.stream>>>(group, launch);
  return Status::from_cuda(cudaGetLastError(), "launching the dispatch kernel");
}

}  // namespace moe_ep::nvlink
