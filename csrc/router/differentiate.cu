#include "router/checks.h"
#include "router/scores.cuh"

namespace moe_ep::router {
namespace {

// Gradients of a token's scores by way of the weights of the chosen: scaling * s_i / sum(s) or scaling * s_i.
// Left in `of_expert`, which is the warp's.
template <int kPerLane>
__device__ __forceinline__ void differentiate_weights(const Differentiate& launch, int64_t token,
                                                      const float (&scores)[kPerLane], float* of_expert) {
  const Routing& routing = launch.routing;
  const int lane = lane_index();
  for (int e = lane; e < routing.experts; e += 32) of_expert[e] = 0.0f;
  __syncwarp();
  if (launch.grad_weights == nullptr) return;
  const bool active = lane < routing.topk;
  const int64_t at = token * routing.topk + lane;
  const int expert = active ? static_cast<int>(launch.topk_idx[at]) : 0;
  float grad = active ? launch.grad_weights[at] * routing.scaling : 0.0f;
  if (!routing.softmax) {
    float own = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float of_lane = __shfl_sync(kAllLanes, scores[j], expert % 32);
      if (active && expert / 32 == j) own = of_lane;
    }
    const float sum = sum_over_warp(own) + kTiny;
    const float mean = __fdiv_rn(sum_over_warp(grad * own), sum);
    grad = __fdiv_rn(grad - mean, sum);
  }
  if (active) of_expert[expert] = grad;
  __syncwarp();
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) differentiate_logits(const Differentiate launch) {
  extern __shared__ float shared[];
  const Routing& routing = launch.routing;
  const int experts = routing.experts, lane = lane_index();
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (token >= routing.tokens) return;

  float scores[kPerLane], grads[kPerLane];
  load_logits(launch.logits + token * experts, experts, scores);
  score(routing.softmax, scores);
  float* of_expert = shared + warp * experts;
  differentiate_weights(launch, token, scores, of_expert);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane;
    grads[j] = expert < experts ? of_expert[expert] : 0.0f;
  }
  if (launch.grad_loss != nullptr) {
    const int* highest = launch.highest + token / routing.sequence_length * experts;
    const Share share = share_of(highest, experts, scores);
    const float grad_share = __fdiv_rn(*launch.grad_loss * launch.factor, share.total);
    const float mean = __fdiv_rn(share.weighted, share.total);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int expert = j * 32 + lane;
      if (expert < experts) grads[j] += grad_share * (static_cast<float>(highest[expert]) - mean);
    }
  }
  float mean = 0.0f;  // over softmax's scores
  if (routing.softmax) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) mean += grads[j] * scores[j];
    mean = sum_over_warp(mean);
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int expert = j * 32 + lane;
    if (expert >= experts) continue;
    const float grad =
        routing.softmax ? scores[j] * (grads[j] - mean) : grads[j] * ((1.0f - scores[j]) * scores[j]);
    if (launch.grad != nullptr) {
      launch.grad[token * experts + expert] = grad;
    } else {
      const Parts parts = split_number(grad);
      __nv_bfloat16* to = launch.parts + token * 4 * experts + expert;
      to[0] = parts.first;
      to[experts] = parts.first;
      to[2 * experts] = parts.second;
      to[3 * experts] = parts.third;
    }
  }
}

}  // namespace

Status differentiate(const Differentiate& launch) {
  const Routing& routing = launch.routing;
  const void* out = launch.grad != nullptr ? static_cast<void*>(launch.grad) : launch.parts;
  const Status status = check_routing("router_differentiate", routing, {launch.logits, launch.topk_idx, out},
                                      "logits, topk_idx and grad or parts");
  if (!status.is_ok()) return status;
  if (launch.grad_loss != nullptr && launch.highest == nullptr) {
    return Status::invalid("router_differentiate: grad_loss needs highest, which is null");
  }
  if (routing.tokens == 0) return status;
  return for_experts(routing.experts, [&](auto per_lane) {
    const auto grid = static_cast<unsigned int>((routing.tokens + kWarps - 1) / kWarps);
    const size_t shared = sizeof(float) * kWarps * routing.experts;
    differentiate_logits<per_lane()><<<grid, kThreads, shared, launch.stream>>>(launch);
    return Status::from_cuda(cudaGetLastError(), "launching router_differentiate");
  });
}

}  // namespace moe_ep::router
