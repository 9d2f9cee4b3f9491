#include "common/vector.cuh"
#include "router/scores.cuh"

namespace moe_ep::router {
namespace {

constexpr int kElements = 4;

__global__ void __launch_bounds__(kThreads) split_numbers(const Split launch) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (at >= launch.count) return;
  const Vector<float, kElements> x = load_once<float, kElements>(launch.x + at);
  Vector<__nv_bfloat16, kElements> first, second, third;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const Parts parts = split_number(x.at[i]);
    first.at[i] = parts.first;
    second.at[i] = parts.second;
    third.at[i] = parts.third;
  }
  store(launch.parts + at, third);
  store(launch.parts + launch.count + at, second);
  store(launch.parts + 2 * launch.count + at, first);
  store(launch.parts + 3 * launch.count + at, first);
}

}  // namespace

Status split(const Split& launch) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kElements;
  const int64_t grid = (launch.count + per_block - 1) / per_block;
  if (launch.count < 0 || launch.count % kElements != 0 || grid > INT32_MAX) {
    return Status::invalid("router_split: count must be a multiple of %d from 0 to 2^40, got %lld", kElements,
                           static_cast<long long>(launch.count));
  }
  if (launch.count == 0) return Status::ok();
  if (launch.x == nullptr || launch.parts == nullptr || !is_aligned(launch.x, 16) ||
      !is_aligned(launch.parts, 16)) {
    return Status::invalid("router_split: x and parts must be addresses of 16-byte aligned memory");
  }
  split_numbers<<<static_cast<unsigned int>(grid), kThreads, 0, launch.stream>>>(launch);
  return Status::from_cuda(cudaGetLastError(), "launching router_split");
}

}  // namespace moe_ep::router
