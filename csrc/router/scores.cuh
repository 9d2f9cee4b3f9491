#pragma once

#include <cstdint>
#include <type_traits>

#include "router/router.h"

namespace moe_ep::router {

// A warp has one token. Lane l has experts l, l + 32, ..., `kPerLane` of them; those past the last have a
// logit of minus infinity and a score of 0.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
constexpr float kTiny = 1e-20f;  // added to sums that are divided by, as in moe_ep.layers.routing

__device__ __forceinline__ int lane_index() {
  return static_cast<int>(threadIdx.x % 32);
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

template <int kPerLane>
__device__ __forceinline__ float sum_over_experts(const float (&values)[kPerLane]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) sum += values[j];
  return sum_over_warp(sum);
}

template <int kPerLane>
__device__ __forceinline__ void load_logits(const float* row, int experts, float (&logits)[kPerLane]) {
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane_index();
    logits[j] = expert < experts ? row[expert] : -INFINITY;
  }
}

// Logits to scores, with the operations of torch's kernels.
template <int kPerLane>
__device__ __forceinline__ void score(bool softmax, float (&values)[kPerLane]) {
  if (!softmax) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) values[j] = __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-values[j])));
    return;
  }
  float highest = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) highest = fmaxf(highest, values[j]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, distance));
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) values[j] = expf(values[j] - highest);
  const float sum = sum_over_experts(values);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) values[j] = __fdiv_rn(values[j], sum);
}

// A token's part of the balance loss is weighted / total, which its gradient needs, too.
struct Share {
  float weighted;  // sum_i(highest_i s_i)
  float total;     // sum_i(s_i), not 0
};

template <int kPerLane>
__device__ __forceinline__ Share share_of(const int* highest, int experts, const float (&scores)[kPerLane]) {
  float weighted = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane_index();
    if (expert < experts) weighted += static_cast<float>(highest[expert]) * scores[j];
  }
  return {sum_over_warp(weighted), sum_over_experts(scores) + kTiny};
}

// x = first + second + third, exactly, unless parts of it are below what bfloat16 can hold (2^-133): each
// takes 8 bits of the 24.
struct Parts {
  __nv_bfloat16 first, second, third;
};

__device__ __forceinline__ Parts split_number(float x) {
  Parts parts;
  parts.first = __float2bfloat16_rn(x);
  const float rest = x - __bfloat162float(parts.first);
  parts.second = __float2bfloat16_rn(rest);
  parts.third = __float2bfloat16_rn(rest - __bfloat162float(parts.second));
  return parts;
}

// Calls launch(std::integral_constant<int, kPerLane>()) for so many experts.
template <typename Launch>
Status for_experts(int experts, Launch&& launch) {
  if (experts <= 32) return launch(std::integral_constant<int, 1>());
  if (experts <= 64) return launch(std::integral_constant<int, 2>());
  if (experts <= 128) return launch(std::integral_constant<int, 4>());
  if (experts <= 256) return launch(std::integral_constant<int, 8>());
  if (experts <= 512) return launch(std::integral_constant<int, 16>());
  return launch(std::integral_constant<int, 32>());
}

}  // namespace moe_ep::router
