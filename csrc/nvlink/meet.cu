#include "nvlink/meet.h"

#include "nvlink/sync.cuh"

namespace moe_ep::nvlink {
namespace {

__global__ void __launch_bounds__(32) meet_kernel(const __grid_constant__ Group group, Phase phase) {
  if (has_failed(group)) return;
  const uint64_t number = number_of_call(group);
  tell_presence(group, number);
  for (int peer = threadIdx.x; peer < group.size; peer += 32) {
    if (peer == group.rank) continue;
    wait_for(signal(group, group.rank, group.at.present, peer), number, group, phase, peer);
  }
}

}  // namespace

Status launch_meet(const Group& group, Phase phase, cudaStream_t stream) {
  if (group.size == 1) return Status::ok();
  meet_kernel<<<1, 32, 0, stream>>>(group, phase);
  return Status::from_cuda(cudaGetLastError(), "launching the kernel that waits for all ranks");
}

}  // namespace moe_ep::nvlink
