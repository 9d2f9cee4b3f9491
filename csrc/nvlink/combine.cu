#include "nvlink/combine.h"

#include <algorithm>
#include <type_traits>

#include "nvlink/belt.cuh"
#include "nvlink/mailbox.cuh"
#include "nvlink/meet.h"
#include "nvlink/plan_tables.h"
#include "nvlink/rings.cuh"
#include "nvlink/work.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kWarps = 11;
constexpr int kVectors = 7;  // 16-byte words of a segment that each lane adds up
constexpr int kSegmentBytes = 32 * 16 * kVectors;
constexpr int kSharedBytes = 226 * 1024;
constexpr int kStages = kSharedBytes / kWarps / kSegmentBytes - 1;

struct Launch {
  Combine combine;
  Slots slots;
  BeltShape belt;
};

// The numbers of a 4-byte word, and words of rounded numbers.
template <typename T>
struct Word;
template <>
struct Word<__nv_bfloat16> {
  static constexpr int kNumbers = 2;
  __device__ static float number(unsigned int word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xFFFF0000u);
  }
  __device__ static unsigned int round(const float* numbers) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers[0], numbers[1]);
    unsigned int word;
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
};
template <>
struct Word<__half> {
  static constexpr int kNumbers = 2;
  __device__ static float number(unsigned int word, int i) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    return i == 0 ? __low2float(pair) : __high2float(pair);
  }
  __device__ static unsigned int round(const float* numbers) {
    const __half2 pair = __floats2half2_rn(numbers[0], numbers[1]);
    unsigned int word;
    memcpy(&word, &pair, sizeof(word));
    return word;
  }
};
template <>
struct Word<float> {
  static constexpr int kNumbers = 1;
  __device__ static float number(unsigned int word, int) { return __uint_as_float(word); }
  __device__ static unsigned int round(const float* numbers) { return __float_as_uint(numbers[0]); }
};

// Sums, in float32, of the numbers that a lane has of row segments: kVectors times 16 bytes.
template <typename T>
class Sums {
 public:
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (float& number : at_[v]) number = 0.0f;
    }
  }

  // The first term, which a sum starts from; then more. `words`: this lane's.
  __device__ __forceinline__ void set(SharedAddress words) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint4 word = load_shared(words + 512 * v);
      for_each(word, [&](int i, float number) { at_[v][i] = number; });
    }
  }

  __device__ __forceinline__ void add(SharedAddress words) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint4 word = load_shared(words + 512 * v);
      for_each(word, [&](int i, float number) { at_[v][i] = __fadd_rn(at_[v][i], number); });
    }
  }

  __device__ __forceinline__ uint4 rounded(int v) const {
    constexpr int kNumbers = Word<T>::kNumbers;
    return make_uint4(Word<T>::round(at_[v]), Word<T>::round(at_[v] + kNumbers),
                      Word<T>::round(at_[v] + 2 * kNumbers), Word<T>::round(at_[v] + 3 * kNumbers));
  }

 private:
  template <typename Use>
  static __device__ __forceinline__ void for_each(uint4 word, Use&& use) {
    constexpr int kNumbers = Word<T>::kNumbers;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      use(i, Word<T>::number(word.x, i));
      use(kNumbers + i, Word<T>::number(word.y, i));
      use(2 * kNumbers + i, Word<T>::number(word.z, i));
      use(3 * kNumbers + i, Word<T>::number(word.w, i));
    }
  }

  float at_[kVectors][16 / sizeof(T)];
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
    return __ldcg(combine.row_weights + (combine.expert_layout ? row : row * numbers() + k));
  }

  // That belong to a row, one for each lane.
  __device__ int numbers() const { return combine.num_added ? combine.num_added : group.num_topk; }
};

// Gives this lane's words of an item's row segments, one after another. More are loaded every second time,
// which costs less; what was taken before is free then.
template <typename LoadAhead>
class Segments {
 public:
  __device__ Segments(Belt& belt, LoadAhead& load_ahead) : belt_(belt), load_ahead_(load_ahead) {}

  __device__ __forceinline__ SharedAddress next() {
    if (taken_++ % 2 == 0) load_ahead_();
    return belt_.take() + 16 * (threadIdx.x % 32);
  }

 private:
  Belt& belt_;
  LoadAhead& load_ahead_;
  int taken_ = 0;
};

// Sets the sums to those of `terms` segments: words_of(0), words_of(1)...
template <typename T, typename WordsOf>
__device__ __forceinline__ void add_up(Sums<T>& sums, int terms, WordsOf&& words_of) {
  if (terms == 0) return sums.clear();
  sums.set(words_of(0));
#pragma unroll 1
  for (int i = 1; i < terms; ++i) sums.add(words_of(i));
}

// Writes the lanes' words of a segment of `bytes`: word(v) is the v-th.
template <typename WordOf>
__device__ __forceinline__ void write_words(char* to, int bytes, WordOf&& word) {
  to += 16 * (threadIdx.x % 32);
  bytes -= 16 * (threadIdx.x % 32);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (512 * v < bytes) *reinterpret_cast<uint4*>(to + 512 * v) = word(v);
  }
}

// Adds up the rows that this rank has for the tokens of others, and writes the sums into their windows.
template <typename T>
struct Send {
  struct Item {
    Rows rows;
    float weight;  // of this lane's k
    int peer, index;
    int signal;  // or -1: of its chunk, if it is the last row of it
  };

  const Context& context;
  const Mailbox& mailbox;
  Chunks chunks;
  int place = 0;  // in the chunk
  int row;        // of the next item, for this lane's k
  bool may_send = false;
  bool failed = false;

  // Where rings take several rounds, each warp keeps to one rank, so that it waits for no other.
  __device__ Send(const Context& context, const Crew& crew, const Mailbox& mailbox)
      : context(context),
        mailbox(mailbox),
        chunks(context.group, context.slots, context.tables.recv_count, false,
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
      const Fetched drained =
          warp_fetch_drained(context.group, context.call, chunk.rank, round, Phase::combine_send, wait);
      if (drained != Fetched::ready) return drained;
    }
    item.peer = chunk.rank;
    item.index = chunk.first + place;
    const bool ends_chunk = place + 1 == chunk.rows;
    item.signal = ends_chunk ? chunk.signal : -1;
    const int64_t from = row;
    place = ends_chunk ? 0 : place + 1;
    if (ends_chunk) chunks.advance();
    if (!chunks.at_end()) row = row_of(chunks.current(), place);  // of the item after this one
    const unsigned int here = __ballot_sync(kAllLanes, from >= 0);
    const char* row_of_lane = context.combine.rows + from * context.combine.row_bytes;
    item.rows = {append(row_of_lane, 0, row_of_lane, here),
                 context.combine.expert_layout ? __popc(here) : min(__popc(here), 1)};
    item.weight = 0.0f;
    if (context.combine.num_added) {
      const int64_t row_here = __shfl_sync(kAllLanes, from, max(0, __ffs(here) - 1));
      if (here && context.lane < context.numbers()) item.weight = context.weight_of(row_here, context.lane);
    } else if (context.combine.row_weights != nullptr && from >= 0) {
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
    char* slot = Ring(context.group, item.peer, context.group.rank).slot(context.slots, item.index);
    Segments<LoadAhead> segments(belt, load_ahead);
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      const int bytes = belt.bytes_from(begin);
      if (item.rows.count == 1) {
        const SharedAddress words = segments.next();
        write_words(slot + begin, bytes, [&](int v) { return load_shared(words + 512 * v); });
        continue;
      }
      Sums<T> sums;
      add_up(sums, item.rows.count, [&](int) { return segments.next(); });
      write_words(slot + begin, bytes, [&](int v) { return sums.rounded(v); });
    }
    if (context.combine.row_weights != nullptr && context.lane < context.numbers()) {
      reinterpret_cast<float*>(slot + belt.row_bytes())[context.lane] = item.weight;
    }
    if (item.signal >= 0) mailbox.announce(item.peer, item.signal, context.slots.round(item.index));
  }
};

// Rows of which some, after the first `own`, are biases.
struct RowsAndBiases {
  const char* in_lane;  // the others
  int count, own, num_biases;
  const char* biases[kMaxBiases];

  __device__ __forceinline__ const char* row(int i) const {
    const int bias = i - own;
    if (bias >= 0 && bias < num_biases) return bias == 0 ? biases[0] : biases[1];
    return of_lane(in_lane, bias < 0 ? i : i - num_biases);
  }
};

// Adds up what all ranks have for this rank's tokens.
template <typename T>
struct Receive {
  struct Item {
    // First this rank's own rows, in the order of k, whose sum, rounded, is term `own_at`, if that is not
    // negative. Then the other terms: biases, and by the order of their last k what other ranks have added
    // up, or this rank's one row as it is.
    RowsAndBiases rows;
    int own_at, terms;
    float weight;  // of this lane's k
    int token;
    int source;            // of this lane's row, or -1 for this rank
    unsigned int arrived;  // lanes whose row came from another rank
  };

  const Context& context;
  const SharedAddress stash;  // of this lane: a segment of what this rank adds
  const int num_biases;
  Tasks tokens;
  int entry;  // of the next token, for this lane's k

  __device__ Receive(const Context& context, const Crew& crew, char* stash)
      : context(context),
        stash(bulk::shared_address(stash) + 16 * context.lane),
        num_biases((context.combine.biases[0] != nullptr) + (context.combine.biases[1] != nullptr)),
        tokens(context.group, kReceiving, crew) {
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
      const Chunking chunking =
          context.slots.chunking(context.tables.send_count[item.source], group.size - 1);
      const uint64_t* signal = ring.signal(context.slots, chunking, arrival);
      const uint64_t stamp = context.call.stamp(context.slots.round(arrival) + 1);
      arrived = wait ? wait_for(signal, stamp, group, Phase::combine_receive, item.source)
                     : load_acquire(signal) >= stamp;
    }
    if (!__all_sync(kAllLanes, arrived)) return wait ? Fetched::failed : Fetched::not_yet;
    __syncwarp();
    bulk::fence_global();
    item.arrived = __ballot_sync(kAllLanes, remote && last);
    unsigned int own_last = __ballot_sync(kAllLanes, serves && !remote && last);
    unsigned int own_rows = __ballot_sync(kAllLanes, own && (combine.expert_layout || last));
    unsigned int others = item.arrived;
    if (own_rows == own_last) {  // one row, which is what it adds as it is
      others |= own_last;
      own_rows = own_last = 0;
    }
    const int num_own = __popc(own_rows), num_others = __popc(others);
    item.own_at = own_last == 0 ? -1 : num_biases + __popc(others & (own_last - 1));
    item.terms = num_biases + num_others + (own_last != 0);
    const int64_t offset = tokens.current() * combine.row_bytes;
    item.rows = {append(append(row, 0, row, own_rows), num_own, row, others),
                 num_own + num_biases + num_others,
                 num_own,
                 num_biases,
                 {combine.biases[0] + offset, combine.biases[1] + offset}};
    item.weight = 0.0f;
    if (combine.num_added) {
      item.weight = add_numbers(row, index, item.arrived, __ballot_sync(kAllLanes, own && last));
    } else if (combine.row_weights != nullptr) {
      if (remote)
        item.weight = __ldcg(reinterpret_cast<const float*>(row + combine.row_bytes) + context.lane);
      if (own) item.weight = context.weight_of(index, context.lane);
    }
    item.token = tokens.current();
    tokens.advance();
    entry = entry_of(tokens.current());
    return Fetched::ready;
  }

  // The sum of this lane's numbers of the rows that lanes have: `arrived` from other ranks, `own` this
  // rank's.
  __device__ float add_numbers(const char* row, int index, unsigned int arrived, unsigned int own) const {
    const Combine& combine = context.combine;
    const int lane = context.lane;
    float sum = 0.0f;
    bool is_first = true;
    for (unsigned int left = arrived | own; left; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const char* slot = of_lane(row, from);
      const int own_row = __shfl_sync(kAllLanes, index, from);
      if (lane >= combine.num_added) continue;
      const float number = own >> from & 1
                               ? context.weight_of(own_row, lane)
                               : __ldcg(reinterpret_cast<const float*>(slot + combine.row_bytes) + lane);
      sum = is_first ? number : __fadd_rn(sum, number);
      is_first = false;
    }
    return sum;
  }

  template <typename LoadAhead>
  __device__ void process(const Item& item, Belt& belt, LoadAhead& load_ahead) {
    const Combine& combine = context.combine;
    char* out = combine.out + item.token * combine.row_bytes;
    Segments<LoadAhead> segments(belt, load_ahead);
    for (int begin = 0; begin < belt.row_bytes(); begin += belt.segment_bytes()) {
      const int bytes = belt.bytes_from(begin);
      if (item.terms == 1 && item.own_at < 0) {
        const SharedAddress words = segments.next();
        write_words(out + begin, bytes, [&](int v) { return load_shared(words + 512 * v); });
        continue;
      }
      Sums<T> sums;
      if (item.own_at >= 0) {
        add_up(sums, item.rows.own, [&](int) { return segments.next(); });
#pragma unroll
        for (int v = 0; v < kVectors; ++v) store_shared(stash + 512 * v, sums.rounded(v));
      }
      add_up(sums, item.terms, [&](int i) { return i == item.own_at ? stash : segments.next(); });
      write_words(out + begin, bytes, [&](int v) { return sums.rounded(v); });
    }
    const int numbers = context.numbers();
    if (combine.row_weights != nullptr && context.lane < numbers) {
      combine.out_weights[static_cast<int64_t>(item.token) * numbers + context.lane] = item.weight;
    }
    for (unsigned int left = item.arrived; left; left &= left - 1) {
      const int rank = __shfl_sync(kAllLanes, item.source, __ffs(left) - 1);
      warp_consume(context.group, context.slots, context.call, rank, 1, context.tables.send_count[rank]);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * (kWarps + 1), 1)
    combine_impl(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  extern __shared__ __align__(128) char memory[];
  __shared__ uint64_t barriers[kWarps][kStages];
  __shared__ uint64_t notices[kWarps];
  const Call call{load_volatile(&group.workspace->calls)};
  if (has_failed(group)) return;
  const Crew crew(launch.combine.send_blocks);
  const Mailbox mailbox(notices, crew.warps);
  if (crew.is_herald() && blockIdx.x == 0) tell_presence(group, number_of_call(group));
  if (!crew.is_herald()) {
    const Context context(group, launch, call);
    const int warp = threadIdx.x / 32;
    char* const stash = memory + warp * (launch.belt.stages + 1) * launch.belt.segment_bytes;
    Belt belt(stash + launch.belt.segment_bytes, barriers[warp], launch.belt,
              static_cast<int>(launch.combine.row_bytes));
    if (crew.sends) {
      Send<T> send(context, crew, mailbox);
      run_job(send, belt);
      mailbox.close();
    }
    // Those that send help with the rest when they are done.
    Receive<T> receive(context, crew, stash);
    run_job(receive, belt);
    belt.drain();
  } else if (crew.sends) {
    mailbox.deliver(group, call);
  }
  __syncwarp();
  finish_call(group, call);
}

}  // namespace

Status launch_combine(const Group& group, const Combine& combine) {
  Launch launch{combine, {}, {}};
  if (combine.num_added > kMaxTopk || (combine.num_added && combine.expert_layout)) {
    return Status::invalid("%d numbers of each row are to be added up; up to %d can be, in the rank layout",
                           combine.num_added, kMaxTopk);
  }
  const int numbers = combine.row_weights == nullptr ? 0
                      : combine.num_added            ? combine.num_added
                                                     : group.num_topk;
  launch.slots = Slots(group, align16(combine.row_bytes + 4 * numbers));
  if (group.size > 1 && launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
  launch.belt.segment_bytes = kSegmentBytes;
  launch.belt.stages = kStages;
  if (combine.meets) {
    const Status status = launch_meet(group, Phase::combine_receive, combine.stream);
    if (!status.is_ok()) return status;
  }
  return for_dtype(combine.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Status status = allow_shared_memory(reinterpret_cast<const void*>(&combine_impl<T>), kSharedBytes);
    if (!status.is_ok()) return status;
    combine_impl<T><<<combine.num_blocks, 32 * (kWarps + 1), kSharedBytes, combine.stream>>>(group, launch);
    return Status::from_cuda(cudaGetLastError(), "launching the combine kernel");
  });
}

}  // namespace moe_ep::nvlink
