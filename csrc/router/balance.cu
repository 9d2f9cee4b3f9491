#include "router/checks.h"
#include "router/scores.cuh"

namespace moe_ep::router {
namespace {

// Added up in one order: by warp, then over the warps.
template <int kPerLane>
__global__ void __launch_bounds__(kThreads) balance_terms(const Balance launch) {
  __shared__ float of_warp[kWarps];
  const Routing& routing = launch.routing;
  const int warp = static_cast<int>(threadIdx.x / 32);
  float sum = 0.0f;
  for (int i = warp; i < kTokensPerTerm; i += kWarps) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokensPerTerm + i;
    if (token >= routing.tokens) break;
    float scores[kPerLane];
    load_logits(launch.logits + token * routing.experts, routing.experts, scores);
    score(routing.softmax, scores);
    const int* highest = launch.highest + token / routing.sequence_length * routing.experts;
    const Share share = share_of(highest, routing.experts, scores);
    sum += __fdiv_rn(share.weighted, share.total);
  }
  if (lane_index() == 0) of_warp[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps; ++i) total += of_warp[i];
  launch.terms[blockIdx.x] = total * launch.factor;
}

}  // namespace

Status balance(const Balance& launch) {
  const Routing& routing = launch.routing;
  const Status status = check_routing(
      "router_balance", routing, {launch.logits, launch.highest, launch.terms}, "logits, highest and terms");
  if (!status.is_ok() || routing.tokens == 0) return status;
  return for_experts(routing.experts, [&](auto per_lane) {
    const auto grid = static_cast<unsigned int>((routing.tokens + kTokensPerTerm - 1) / kTokensPerTerm);
    balance_terms<per_lane()><<<grid, kThreads, 0, launch.stream>>>(launch);
    return Status::from_cuda(cudaGetLastError(), "launching router_balance");
  });
}

}  // namespace moe_ep::router
