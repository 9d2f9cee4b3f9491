#include "common/kernel_attributes.h"
#include "router/checks.h"
#include "router/scores.cuh"

namespace moe_ep::router {
namespace {

// How a warp splits up for scores of groups, and finds an expert's group without a division.
struct Groups {
  int count;
  int size;
  int chosen;
  int lanes;                // for a group: a power of 2
  unsigned int reciprocal;  // e * reciprocal / 2^20 = e / size for e < 1024: 2^20 / size rounded up

  explicit Groups(const Choose& launch)
      : count(launch.groups),
        size(launch.routing.experts / launch.groups),
        chosen(launch.topk_groups),
        lanes(1),
        reciprocal(((1u << 20) + size - 1) / size) {
    while (2 * lanes * count <= 32) lanes *= 2;
  }

  __device__ __forceinline__ int of(int expert) const {
    return static_cast<int>(static_cast<unsigned int>(expert) * reciprocal >> 20);
  }
};

// Where expert e's score lies in a warp's shared memory: the first experts of groups of 32 in different
// banks.
__host__ __device__ __forceinline__ int padded(int e) {
  return e + e / 32;
}

// Bytes of shared memory: the block's counts, then for each warp scores, and keys of groups.
int shared_bytes(const Choose& launch) {
  const int of_warp = launch.groups > 1 ? padded(launch.routing.experts) + launch.groups : 0;
  return static_cast<int>(sizeof(int)) * (2 * launch.routing.experts + kWarps * of_warp);
}

// A number that orders as the value does, and above 0, which stands for one that is out of the question. NaN
// is the highest, as for torch's sort.
__device__ __forceinline__ unsigned int key_of(float value) {
  if (isnan(value)) return 0xFFFFFFFFu;
  const unsigned int bits = __float_as_uint(value + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The `count` experts with the highest keys, the lower number first among equals: lane i is given the i-th.
// Clears their keys.
template <int kPerLane>
__device__ __forceinline__ int take_highest(unsigned int (&keys)[kPerLane], int count) {
  const unsigned int lane = lane_index();
  unsigned int taken = 0;
  for (int i = 0; i < count; ++i) {
    unsigned int best = 0, at = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (keys[j] > best) {
        best = keys[j];
        at = j;
      }
    }
    const unsigned int highest = __reduce_max_sync(kAllLanes, best);
    const unsigned int expert = __reduce_min_sync(kAllLanes, best == highest ? at * 32 + lane : ~0u);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j * 32 + lane == expert) keys[j] = 0;
    }
    if (lane == static_cast<unsigned int>(i)) taken = expert;
  }
  return static_cast<int>(taken);
}

// values[expert] of whichever lane has it; `expert` may differ from lane to lane.
template <int kPerLane>
__device__ __forceinline__ float value_of(const float (&values)[kPerLane], int expert) {
  float value = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const float of_lane = __shfl_sync(kAllLanes, values[j], expert % 32);
    if (expert / 32 == j) value = of_lane;
  }
  return value;
}

// Clears the keys of experts outside the best groups.
template <int kPerLane>
__device__ void keep_best_groups(const Groups& groups, bool top_two, int experts,
                                 const float (&biased)[kPerLane], float* scores, unsigned int* group_keys,
                                 unsigned int (&keys)[kPerLane]) {
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane;
    if (expert < experts) scores[padded(expert)] = biased[j];
  }
  __syncwarp();
  for (int first = 0; first < groups.count; first += 32 / groups.lanes) {
    const int group = first + lane / groups.lanes;
    float best = -INFINITY, second = -INFINITY;
    if (group < groups.count) {
      for (int i = lane % groups.lanes; i < groups.size; i += groups.lanes) {
        const float value = scores[padded(group * groups.size + i)];
        second = fmaxf(second, fminf(best, value));
        best = fmaxf(best, value);
      }
    }
    for (int distance = 1; distance < groups.lanes; distance *= 2) {
      const float other_best = __shfl_xor_sync(kAllLanes, best, distance);
      const float other_second = __shfl_xor_sync(kAllLanes, second, distance);
      second = fmaxf(fmaxf(second, other_second), fminf(best, other_best));
      best = fmaxf(best, other_best);
    }
    const float group_score = top_two && groups.size > 1 ? best + second : best;
    if (group < groups.count && lane % groups.lanes == 0) group_keys[group] = key_of(group_score);
  }
  __syncwarp();
  // From here on entry g of `scores` says whether group g is one of the best: whether fewer go before it.
  for (int group = lane; group < groups.count; group += 32) {
    const unsigned int own = group_keys[group];
    int before = 0;
    for (int other = 0; other < groups.count; ++other) {
      before += group_keys[other] > own || (group_keys[other] == own && other < group);
    }
    scores[group] = before < groups.chosen ? 1.0f : 0.0f;
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane;
    if (expert < experts && scores[groups.of(expert)] == 0.0f) keys[j] = 0;
  }
}

// The sum of a logit's pieces, the small parts first: exact where the logit is one product.
template <int kPerLane, int kParts>
__device__ __forceinline__ void add_pieces(const Choose& launch, int64_t token, float (&logits)[kPerLane]) {
  const int experts = launch.routing.experts;
  const int64_t row = static_cast<int64_t>(kParts) * experts;
  const float* from = launch.pieces + token * row;
  float rest[kPerLane] = {};
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) logits[j] = 0.0f;
#pragma unroll(kPerLane <= 2 ? 4 : 1)
  for (int slice = 0; slice < launch.slices; ++slice) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int expert = j * 32 + lane_index();
        if (expert >= experts) continue;
        const float piece = from[slice * launch.routing.tokens * row + part * experts + expert];
        if (part == kParts - 1) {
          logits[j] += piece;
        } else {
          rest[j] += piece;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    logits[j] = j * 32 + lane_index() < experts ? logits[j] + rest[j] : -INFINITY;
  }
}

template <int kPerLane, int kParts>
__global__ void __launch_bounds__(kThreads) choose_experts(const Choose launch, const Groups groups) {
  extern __shared__ int shared[];
  const Routing& routing = launch.routing;
  const int experts = routing.experts, lane = lane_index();
  int* load = shared;
  int* highest = shared + experts;
  for (int e = static_cast<int>(threadIdx.x); e < 2 * experts; e += kThreads) shared[e] = 0;
  __syncthreads();

  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kWarps;
  const int64_t first_sequence = first_token / routing.sequence_length;
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t token = first_token + warp;
  if (token < routing.tokens) {
    float scores[kPerLane], biased[kPerLane];
    unsigned int keys[kPerLane];
    add_pieces<kPerLane, kParts>(launch, token, scores);
    if (launch.logits != nullptr) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int expert = j * 32 + lane;
        if (expert < experts) launch.logits[token * experts + expert] = scores[j];
      }
    }
    score(routing.softmax, scores);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int expert = j * 32 + lane;
      biased[j] = scores[j] + (launch.bias != nullptr && expert < experts ? launch.bias[expert] : 0.0f);
      keys[j] = expert < experts ? key_of(biased[j]) : 0;
    }
    if (groups.count > 1) {
      float* of_warp =
          reinterpret_cast<float*>(shared + 2 * experts) + warp * (padded(experts) + groups.count);
      keep_best_groups(groups, !routing.softmax, experts, biased, of_warp,
                       reinterpret_cast<unsigned int*>(of_warp + padded(experts)), keys);
    }
    const int chosen = take_highest(keys, routing.topk);
    const bool active = lane < routing.topk;
    float weight = value_of(scores, chosen);
    if (!routing.softmax) weight = __fdiv_rn(weight, sum_over_warp(active ? weight : 0.0f) + kTiny);
    if (active) {
      launch.topk_idx[token * routing.topk + lane] = chosen;
      launch.topk_weights[token * routing.topk + lane] = weight * routing.scaling;
      if (launch.load != nullptr) atomicAdd(load + chosen, 1);
    }
    if (launch.highest != nullptr) {
      int counted = chosen;
      if (launch.bias != nullptr || groups.count > 1) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) keys[j] = j * 32 + lane < experts ? key_of(scores[j]) : 0;
        counted = take_highest(keys, routing.topk);
      }
      // The block's counts are those of its first token's sequence.
      const int64_t sequence = token / routing.sequence_length;
      if (active && sequence == first_sequence) atomicAdd(highest + counted, 1);
      if (active && sequence != first_sequence) atomicAdd(launch.highest + sequence * experts + counted, 1);
    }
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    if (load[e] != 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(launch.load + e),
                static_cast<unsigned long long>(load[e]));
    }
    if (highest[e] != 0) atomicAdd(launch.highest + first_sequence * experts + e, highest[e]);
  }
}

}  // namespace

Status choose(const Choose& launch) {
  const Routing& routing = launch.routing;
  const Status status =
      check_routing("router_choose", routing, {launch.pieces, launch.topk_idx, launch.topk_weights},
                    "pieces, topk_idx and topk_weights");
  if (!status.is_ok()) return status;
  if (launch.slices < 1 || (launch.parts != 1 && launch.parts != 3)) {
    return Status::invalid("router_choose: slices must be >= 1 and parts 1 or 3, got %d and %d",
                           launch.slices, launch.parts);
  }
  if (launch.groups < 1 || routing.experts % launch.groups != 0 || launch.topk_groups < 1 ||
      launch.topk_groups > launch.groups ||
      routing.topk > launch.topk_groups * (routing.experts / launch.groups)) {
    return Status::invalid("router_choose: %d experts in %d groups of which %d are chosen have no top %d",
                           routing.experts, launch.groups, launch.topk_groups, routing.topk);
  }
  if (routing.tokens == 0) return status;
  return for_experts(routing.experts, [&](auto per_lane) {
    auto* kernel = launch.parts == 1 ? &choose_experts<per_lane(), 1> : &choose_experts<per_lane(), 3>;
    const int shared = shared_bytes(launch);
    const Status raised = raise_attribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (!raised.is_ok()) return raised;
    const auto grid = static_cast<unsigned int>((routing.tokens + kWarps - 1) / kWarps);
    kernel<<<grid, kThreads, shared, launch.stream>>>(launch, Groups(launch));
    return Status::from_cuda(cudaGetLastError(), "launching router_choose");
  });
}

}  // namespace moe_ep::router
