#include "nvlink/dispatch.h"

#include "nvlink/plan_tables.h"
#include "nvlink/rows.cuh"

namespace moe_ep::nvlink {
namespace {

constexpr int kWarps = 24;
constexpr int kSendWarps = 8;
constexpr int kMaxSendBlocks = 32;  // enough for the link; more would only hold up local traffic
constexpr int kVectors = 7;         // 16-byte words that a lane moves at a time

struct Launch {
  Dispatch dispatch;
  Slots slots;
  int send_blocks;
};

struct Mover {
  const Group& group;
  const Launch& launch;
  const Dispatch& dispatch;
  const PlanTables tables;
  const Call call;
  const Crew crew;
  const int lane;
  const int vectors;

  __device__ Mover(const Group& group, const Launch& launch, Call call)
      : group(group),
        launch(launch),
        dispatch(launch.dispatch),
        tables(const_cast<int*>(launch.dispatch.tables), group),
        call(call),
        crew(launch.send_blocks, kSendWarps),
        lane(threadIdx.x % 32),
        vectors(static_cast<int>(launch.dispatch.row_bytes / 16)) {}

  // The longest list among those of other ranks, in chunks.
  __device__ int most_chunks(const int* counts) const {
    int most = 0;
    for (int rank = lane; rank < group.size; rank += 32) {
      if (rank != group.rank) most = max(most, (counts[rank] + kChunk - 1) / kChunk);
    }
    return __reduce_max_sync(kAllLanes, most);
  }

  __device__ int peer_of(int task) const { return (group.rank + 1 + task % (group.size - 1)) % group.size; }

  __device__ void send() const {
    const int tasks = most_chunks(tables.send_count) * (group.size - 1);
    for (int task = crew.index; task < tasks; task += crew.size) {
      const int peer = peer_of(task);
      const int first = task / (group.size - 1) * kChunk;
      const int rows = min(kChunk, tables.send_count[peer] - first);
      if (rows <= 0) continue;
      const int* tokens = tables.send_tokens + static_cast<int64_t>(peer) * group.max_tokens + first;
      const int token_of_lane = lane < rows ? tokens[lane] : 0;
      if (!warp_wait_drained(group, launch.slots, call, peer, first, Phase::dispatch_send)) return;
      const Ring ring(group, peer, group.rank);
      for (int i = 0; i < rows; ++i) {
        const int64_t token = __shfl_sync(kAllLanes, token_of_lane, i);
        char* slot = ring.slot(launch.slots, first + i);
        warp_place_row<kVectors>(dispatch.rows + token * dispatch.row_bytes, vectors, slot, 0, 0, 1u);
        float* numbers = reinterpret_cast<float*>(slot + dispatch.row_bytes);
        for (int at = lane; at < dispatch.scale_words; at += 32) {
          numbers[at] = __ldcg(dispatch.scales + token * dispatch.scale_words + at);
        }
        if (dispatch.weights != nullptr && lane < group.num_topk) {
          numbers[dispatch.scale_words + lane] = __ldcg(dispatch.weights + token * group.num_topk + lane);
        }
      }
      warp_announce(ring, launch.slots, call, first);
    }
  }

  // Puts arrival `arrival` of `source`, whose row, scales and weights lie at the addresses given, in its
  // places.
  __device__ void place(int source, int arrival, const char* row, const float* scales,
                        const float* weights) const {
    const int64_t pair = static_cast<int64_t>(source) * group.max_tokens + arrival;
    const int at = lane < group.num_topk ? tables.arrival_rows[pair * group.num_topk + lane] : -1;
    const float weight = dispatch.weights != nullptr && lane < group.num_topk ? __ldcg(weights + lane) : 0.0f;
    const unsigned int here = __ballot_sync(kAllLanes, at >= 0);
    if (!here) return;
    const unsigned int copies = dispatch.expert_layout ? here : here & -here;
    warp_place_row<kVectors>(row, vectors, dispatch.out_rows, dispatch.row_bytes, at, copies);
    for (int begin = 0; begin < dispatch.scale_words; begin += 32) {
      const bool inside = begin + lane < dispatch.scale_words;
      const float scale = inside ? __ldcg(scales + begin + lane) : 0.0f;
      for (unsigned int left = copies; left; left &= left - 1) {
        const int64_t to = __shfl_sync(kAllLanes, at, __ffs(left) - 1);
        if (inside) dispatch.out_scales[to * dispatch.scale_words + begin + lane] = scale;
      }
    }
    if (dispatch.weights == nullptr) return;
    if (dispatch.expert_layout) {
      if (at >= 0) dispatch.out_weights[at] = weight;
    } else {
      const int64_t to = __shfl_sync(kAllLanes, at, __ffs(here) - 1);
      if (lane < group.num_topk) dispatch.out_weights[to * group.num_topk + lane] = at >= 0 ? weight : 0.0f;
    }
  }

  __device__ void receive_own() const {
    const int count = tables.send_count[group.rank];
    const int* tokens = tables.send_tokens + static_cast<int64_t>(group.rank) * group.max_tokens;
    for (int arrival = crew.index; arrival < count; arrival += crew.size) {
      const int64_t token = tokens[arrival];
      place(group.rank, arrival, dispatch.rows + token * dispatch.row_bytes,
            dispatch.scales + token * dispatch.scale_words, dispatch.weights + token * group.num_topk);
    }
  }

  __device__ void receive() const {
    const int tasks = most_chunks(tables.recv_count) * (group.size - 1);
    for (int task = crew.index; task < tasks; task += crew.size) {
      const int source = peer_of(task);
      const int first = task / (group.size - 1) * kChunk;
      const int count = tables.recv_count[source];
      const int rows = min(kChunk, count - first);
      if (rows <= 0) continue;
      const Ring ring(group, group.rank, source);
      if (!warp_wait_arrived(group, ring, launch.slots, call, source, first, Phase::dispatch_receive)) return;
      for (int i = 0; i < rows; ++i) {
        const char* slot = ring.slot(launch.slots, first + i);
        const float* numbers = reinterpret_cast<const float*>(slot + dispatch.row_bytes);
        place(source, first + i, slot, numbers, numbers + dispatch.scale_words);
      }
      warp_consume(group, launch.slots, call, source, rows, count);
    }
  }

  __device__ void clear(int64_t row) const {
    uint4* to = reinterpret_cast<uint4*>(dispatch.out_rows + row * dispatch.row_bytes);
    for (int i = lane; i < vectors; i += 32) to[i] = make_uint4(0, 0, 0, 0);
    for (int i = lane; i < dispatch.scale_words; i += 32) {
      dispatch.out_scales[row * dispatch.scale_words + i] = dispatch.scale_padding;
    }
    if (dispatch.weights == nullptr) return;
    const int width = dispatch.expert_layout ? 1 : group.num_topk;
    if (lane < width) dispatch.out_weights[row * width + lane] = 0.0f;
  }

  // Rows without a token: between experts, and behind all.
  __device__ void clear_padding() const {
    int64_t end = tables.recv_start[group.size];
    if (dispatch.expert_layout) {
      for (int expert = crew.index; expert < group.num_local; expert += crew.size) {
        const int64_t next = min(static_cast<int64_t>(tables.expert_begin[expert + 1]), dispatch.num_rows);
        for (int64_t row = tables.expert_begin[expert] + tables.expert_count[expert]; row < next; ++row)
          clear(row);
      }
      end = tables.expert_begin[group.num_local];
    }
    for (int64_t row = end + crew.index; row < dispatch.num_rows; row += crew.size) clear(row);
  }
};

__global__ void __launch_bounds__(32 * kWarps, 1)
    dispatch_kernel(const __grid_constant__ Group group, const __grid_constant__ Launch launch) {
  if (has_failed(group)) return;
  const Call call{load_volatile(&group.workspace->calls)};
  const Mover mover(group, launch, call);
  if (mover.crew.sends) {
    if (group.size > 1) mover.send();
  } else {
    mover.receive_own();
    if (launch.dispatch.has_padding) mover.clear_padding();
    if (group.size > 1) mover.receive();
  }
  finish_call(group, call);
}

}  // namespace

Status launch_dispatch(const Group& group, const Dispatch& dispatch) {
  const int weight_words = dispatch.weights == nullptr ? 0 : group.num_topk;
  Launch launch{dispatch, {}, 0};
  launch.slots.bytes = align16(dispatch.row_bytes + 4 * (dispatch.scale_words + weight_words));
  launch.slots.rows = ring_rows(group, launch.slots.bytes);
  if (group.size > 1) {
    if (launch.slots.rows == 0) return ring_too_small(group, launch.slots.bytes);
    launch.send_blocks = dispatch.num_blocks < kMaxSendBlocks ? dispatch.num_blocks : kMaxSendBlocks;
  }
  dispatch_kernel<<<dispatch.num_blocks, 32 * kWarps, 0, dispatch.stream>>>(group, launch);
  return Status::from_cuda(cudaGetLastError(), "launching the dispatch kernel");
}

}  // namespace moe_ep::nvlink
