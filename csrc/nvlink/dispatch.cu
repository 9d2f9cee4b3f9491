#include "nvlink/dispatch.h"

#include <algorithm>
#include <type_traits>

#include "nvlink/belt.cuh"
#include "nvlink/formats.cuh"
#include "nvlink/mailbox.cuh"
#include "nvlink/meet.h"
#include "nvlink/plan_tables.h"
#include "nvlink/rings.cuh"
#include "nvlink/work.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kMaxWarps = 15;
constexpr int kMaxStages = 8;
constexpr int kSegmentBytes = 7168;
constexpr int kSharedBytes = 225 * 1024;

struct Launch {
  Dispatch dispatch;
  Slots slots;
  BeltShape belt;
};

// What all jobs know.
struct Context {
  const Group& group;
  const Dispatch& dispatch;
  const Slots& slots;
  const PlanTables tables;
  const Call call;
  const int lane;

  __device__ Context(const Group& group, const Launch& launch, Call call)
      : group(group),
        dispatch(launch.dispatch),
        slots(launch.slots),
        tables(const_cast<int*>(launch.dispatch.tables), group),
        call(call),
        lane(threadIdx.x % 32) {}

  // Of a row of this rank's own tokens.
  __device__ int64_t source_bytes() const {
    return dispatch.row_bytes * (!dispatch.quantises ? 1 : dispatch.dtype == DType::float32 ? 4 : 2);
  }
};

// The numbers that belong to a row, its token's scales and weights: those of this lane, on their way while
// the row is.
class Numbers {
 public:
  Numbers() = default;

  // `scales`: of `words`.
  __device__ Numbers(const Context& context, const float* scales, int words, const float* weights)
      : scales_(scales), words_(words), weight_(0) {
    const int lane = context.lane;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) early_[i] = lane + 32 * i < words ? __ldcg(scales + lane + 32 * i) : 0;
    if (context.dispatch.weights != nullptr && lane < context.group.num_topk) {
      weight_ = __ldcg(weights + lane);
    }
  }

  // Of this lane's k.
  __device__ float weight() const { return weight_; }

  __device__ __forceinline__ void write_scales(float* to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kEarly; ++i) {
      if (lane + 32 * i < words_) to[lane + 32 * i] = early_[i];
    }
    for (int i = lane + 32 * kEarly; i < words_; i += 32) to[i] = __ldcg(scales_ + i);
  }

 private:
  static constexpr int kEarly = 2;
  const float* scales_;
  int words_;
  float early_[kEarly];
  float weight_;
};

// Those of a token of this rank.
__device__ __forceinline__ Numbers numbers_of_token(const Context& context, int64_t token) {
  const Dispatch& dispatch = context.dispatch;
  const int words = dispatch.quantises ? 0 : dispatch.scale_words;
  return Numbers(context, dispatch.scales + token * words, words,
                 dispatch.weights + token * context.group.num_topk);
}

__device__ __forceinline__ Rows row_of_token(const Context& context, int64_t token) {
  return {context.dispatch.rows + token * context.source_bytes(), 1};
}

// This rank's tokens in the order in which they are sent: those of other ranks, or its own.
class TokenChunks {
 public:
  __device__ TokenChunks(const Context& context, bool own, TaskKind kind, const Crew& crew)
      : context_(context),
        chunks_(context.group, context.slots, context.tables.send_count, own,
                Tasks(context.group, kind, crew)) {
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
template <typename Format>
struct Send {
  struct Item {
    Rows rows;
    Numbers numbers;
    int peer, index;
    int signal;  // or -1: of its chunk, if it is the last row of it
  };

  const Context& context;
  const Mailbox& mailbox;
  TokenChunks chunks;
  bool may_send = false;
  bool failed = false;

  __device__ Send(const Context& context, const Crew& crew, const Mailbox& mailbox)
      : context(context), mailbox(mailbox), chunks(context, false, kSending, crew) {}

  __device__ Fetched fetch(Item& item, bool wait) {
    if (failed) return Fetched::failed;
    if (chunks.at_end()) return Fetched::none;
    const Chunks::Chunk& chunk = chunks.current();
    const int round = context.slots.round(chunk.first);
    if (chunks.place() == 0 && round > 0) {
      const Fetched drained =
          warp_fetch_drained(context.group, context.call, chunk.rank, round, Phase::dispatch_send, wait);
      if (drained != Fetched::ready) return drained;
    }
    const int token = chunks.token();
    item.rows = row_of_token(context, token);
    item.numbers = numbers_of_token(context, token);
    item.peer = chunk.rank;
    item.index = chunk.first + chunks.place();
    item.signal = chunks.place() + 1 == chunk.rows ? chunk.signal : -1;
    chunks.advance();
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    load_ahead();
    if (!may_send) may_send = first_round_may_begin(context.group, context.call, Phase::dispatch_send);
    failed = !may_send;
    if (failed) return;
    char* slot = Ring(context.group, item.peer, context.group.rank).slot(context.slots, item.index);
    float* numbers = reinterpret_cast<float*>(slot + context.dispatch.row_bytes);
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      if (begin > 0) load_ahead();
      Format::write(context.dispatch.scale_words, belt.take(), begin, belt.bytes_from(begin), 1,
                    [&](int) { return Place{slot, numbers}; });
    }
    item.numbers.write_scales(numbers);
    if (context.dispatch.weights != nullptr && context.lane < context.group.num_topk) {
      numbers[context.dispatch.scale_words + context.lane] = item.numbers.weight();
    }
    if (item.signal >= 0) mailbox.announce(item.peer, item.signal, context.slots.round(item.index));
  }
};

// Puts arrivals where the plan wants them; `Source` says which and where they lie.
template <typename Source, typename Format>
struct Receive {
  struct Item {
    Rows rows;
    Numbers numbers;
    typename Source::Arrival arrival;
    int place;  // of this lane's k: its row, or -1
  };

  const Context& context;
  Source source;

  __device__ Receive(const Context& context, const Crew& crew) : context(context), source(context, crew) {}

  __device__ Fetched fetch(Item& item, bool wait) {
    if (source.at_end()) return Fetched::none;
    item.arrival = source.next();
    const int num_topk = context.group.num_topk;
    const int64_t pair =
        static_cast<int64_t>(item.arrival.rank) * context.group.max_tokens + item.arrival.index;
    item.place = context.lane < num_topk ? context.tables.arrival_rows[pair * num_topk + context.lane] : -1;
    const Fetched arrived = source.take(wait);
    if (arrived != Fetched::ready) return arrived;
    item.rows = source.rows(item.arrival);
    item.numbers = source.numbers(item.arrival);
    return Fetched::ready;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    const Dispatch& dispatch = context.dispatch;
    const unsigned int here = __ballot_sync(kAllLanes, item.place >= 0);
    int copies = __popc(here), places;
    if (dispatch.expert_layout) {
      places = append(-1, 0, item.place, here);
    } else if (here) {
      places = __shfl_sync(kAllLanes, item.place, __ffs(here) - 1);
      copies = 1;
    }
    const auto place_of = [&](int copy) {
      const int64_t row = __shfl_sync(kAllLanes, places, copy);
      return Place{dispatch.out_rows + row * dispatch.row_bytes,
                   dispatch.out_scales + row * dispatch.scale_words};
    };
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      load_ahead();
      Format::write(context.dispatch.scale_words, belt.take(), begin, belt.bytes_from(begin), copies,
                    place_of);
    }
    for (int copy = 0; copy < copies; ++copy) item.numbers.write_scales(place_of(copy).scales);
    if (dispatch.weights != nullptr && here) write_weights(item);
    source.finish(item.arrival);
  }

  __device__ void write_weights(const Item& item) const {
    const Dispatch& dispatch = context.dispatch;
    const int num_topk = context.group.num_topk;
    const unsigned int here = __ballot_sync(kAllLanes, item.place >= 0);
    const int64_t row = __shfl_sync(kAllLanes, item.place, __ffs(here) - 1);
    if (dispatch.expert_layout) {
      if (item.place >= 0) dispatch.out_weights[item.place] = item.numbers.weight();
    } else if (context.lane < num_topk) {
      dispatch.out_weights[row * num_topk + context.lane] = item.place >= 0 ? item.numbers.weight() : 0.0f;
    }
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

  __device__ bool at_end() const { return chunks.at_end(); }

  __device__ Arrival next() const {
    return {context.group.rank, chunks.current().first + chunks.place(), chunks.token(), 0};
  }

  __device__ Fetched take(bool) {
    chunks.advance();
    return Fetched::ready;
  }

  __device__ Rows rows(const Arrival& arrival) const { return row_of_token(context, arrival.token); }

  __device__ Numbers numbers(const Arrival& arrival) const {
    return numbers_of_token(context, arrival.token);
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
        chunks(context.group, context.slots, context.tables.recv_count, false,
               Tasks(context.group, kReceiving, crew)) {}

  __device__ bool at_end() const { return chunks.at_end(); }

  __device__ Arrival next() const {
    const Chunks::Chunk& chunk = chunks.current();
    return {chunk.rank, chunk.first + place, 0, place + 1 == chunk.rows ? chunk.rows : 0};
  }

  __device__ Fetched take(bool wait) {
    const Chunks::Chunk& chunk = chunks.current();
    if (place == 0) {
      const Ring ring(context.group, context.group.rank, chunk.rank);
      const Fetched arrived =
          warp_fetch(ring.arrived + chunk.signal, context.call.stamp(context.slots.round(chunk.first) + 1),
                     context.group, Phase::dispatch_receive, chunk.rank, wait);
      if (arrived != Fetched::ready) return arrived;
    }
    if (++place == chunk.rows) {
      place = 0;
      chunks.advance();
    }
    return Fetched::ready;
  }

  __device__ const char* slot(const Arrival& arrival) const {
    return Ring(context.group, context.group.rank, arrival.rank).slot(context.slots, arrival.index);
  }

  __device__ Rows rows(const Arrival& arrival) const { return {slot(arrival), 1}; }

  __device__ Numbers numbers(const Arrival& arrival) const {
    const float* numbers = reinterpret_cast<const float*>(slot(arrival) + context.dispatch.row_bytes);
    return Numbers(context, numbers, context.dispatch.scale_words, numbers + context.dispatch.scale_words);
  }

  __device__ void finish(const Arrival& arrival) const {
    if (arrival.chunk == 0) return;
    warp_consume(context.group, context.slots, context.call, arrival.rank, arrival.chunk,
                 context.tables.recv_count[arrival.rank]);
  }
};

__device__ void clear_row(const Context& context, int64_t row) {
  const Dispatch& dispatch = context.dispatch;
  uint4* to = reinterpret_cast<uint4*>(dispatch.out_rows + row * dispatch.row_bytes);
  for (int i = context.lane; i < dispatch.row_bytes / 16; i += 32) to[i] = make_uint4(0, 0, 0, 0);
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

// Format: of this rank's own tokens.
template <typename Format>
__global__ void __launch_bounds__(32 * (kMaxWarps + 1), 1)
    dispatch_impl(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t barriers[kMaxWarps][kMaxStages];
  __shared__ uint64_t notices[kMaxWarps];
  const Call call{load_volatile(&group.workspace->calls)};
  if (has_failed(group)) return;
  const Crew crew(launch.dispatch.send_blocks);
  const Mailbox mailbox(notices, crew.warps);
  if (crew.is_herald() && blockIdx.x == 0) tell_presence(group, number_of_call(group));
  if (!crew.is_herald()) {
    const Context context(group, launch, call);
    const int warp = threadIdx.x / 32;
    Belt belt(memory + warp * launch.belt.stages * launch.belt.segment_bytes, barriers[warp], launch.belt,
              static_cast<int>(context.source_bytes()));
    if (crew.sends) {
      Send<Format> send(context, crew, mailbox);
      run_job(send, belt);
      mailbox.close();
    }
    // Those that send help with the rest when they are done.
    Receive<OwnTokens, Format> own(context, crew);
    run_job(own, belt);
    if (launch.dispatch.has_padding && !crew.sends) clear_padding(context, crew);
    if (group.size > 1) {
      belt.set_row_bytes(static_cast<int>(launch.dispatch.row_bytes));
      Receive<PeersTokens, Copying> peers(context, crew);
      run_job(peers, belt);
    }
    belt.drain();
  } else if (crew.sends) {
    mailbox.deliver(group, call);
  }
  __syncwarp();
  finish_call(group, call);
}

}  // namespace

Status launch_dispatch(const Group& group, const Dispatch& dispatch) {
  const int weight_words = dispatch.weights == nullptr ? 0 : group.num_topk;
  Launch launch{dispatch, {}, {}};
  launch.slots = Slots(group, align16(dispatch.row_bytes + 4 * (dispatch.scale_words + weight_words)));
  if (group.size > 1 && launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
  const int64_t source_bytes = dispatch.row_bytes * (!dispatch.quantises                ? 1
                                                     : dispatch.dtype == DType::float32 ? 4
                                                                                        : 2);
  const int segments = static_cast<int>((source_bytes + kSegmentBytes - 1) / kSegmentBytes);
  launch.belt.segment_bytes = static_cast<int>((source_bytes + segments - 1) / segments + 511) / 512 * 512;
  // Many multiprocessors wait for the link, and rather have more rows under way in each warp; few are kept
  // busy by more warps, the more so the shorter their rows are.
  const int warps = dispatch.num_blocks > 32 ? 7 : segments > 1 ? 10 : kMaxWarps;
  launch.belt.stages = std::min(kMaxStages, kSharedBytes / warps / launch.belt.segment_bytes);
  if (dispatch.meets) {
    const Status status = launch_meet(group, Phase::dispatch_receive, dispatch.stream);
    if (!status.is_ok()) return status;
  }
  const auto launch_as = [&](auto* kernel) {
    const Status status = allow_shared_memory(reinterpret_cast<const void*>(kernel), kSharedBytes);
    if (!status.is_ok()) return status;
    kernel<<<dispatch.num_blocks, 32 * (warps + 1), kSharedBytes, dispatch.stream>>>(group, launch);
    return Status::from_cuda(cudaGetLastError(), "launching the dispatch kernel");
  };
  if (!dispatch.quantises) return launch_as(&dispatch_impl<Copying>);
  return for_dtype(dispatch.dtype, [&](auto* type) {
    return launch_as(&dispatch_impl<Quantising<std::remove_pointer_t<decltype(type)>>>);
  });
}

}  // namespace moe_ep::nvlink
