#include "nvlink/group.h"

#include <atomic>
#include <chrono>
#include <thread>

#include "common/kernel_attributes.h"
#include "nvlink/plan_tables.h"

namespace moe_ep::nvlink {

WindowLayout window_layout(int size, int max_tokens, int num_topk, int64_t ring_bytes) {
  WindowLayout at{};
  int64_t end = 0;
  const auto reserve = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 127) / 128 * 128;
    return begin;
  };
  at.chunks = (max_tokens + kChunk - 1) / kChunk + kFineRows;
  at.routing_bytes = align16(static_cast<int64_t>(max_tokens) * num_topk * 2);
  at.arrived = reserve(size * at.chunks * 8);
  at.drained = reserve(size * 8);
  at.routing_arrived = reserve(size * 8);
  at.routing_drained = reserve(size * 8);
  at.present = reserve(size * 8);
  at.headers = reserve(size * 8);
  at.routing = reserve(size * at.routing_bytes);
  at.rings = reserve((size - 1) * ring_bytes);
  at.bytes = end;
  return at;
}

int64_t workspace_bytes(int size, int max_tokens, int num_experts) {
  return align16(sizeof(Workspace)) +
         static_cast<int64_t>(size) * token_blocks(max_tokens) * count_columns(size, num_experts / size) * 4;
}

Status allow_shared_memory(const void* kernel, int bytes) {
  const Status status = raise_attribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (!status.is_ok()) return status;
  return raise_attribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
}

Status ring_too_small(const Group& group, int64_t slot_bytes) {
  const long long numbers[] = {kChunk, slot_bytes, group.ring_bytes};
  return Status::invalid("a ring must hold %lld rows of %lld bytes, and has %lld bytes", numbers[0],
                         numbers[1], numbers[2]);
}

bool wait_for_plan(const HostRecord* host, int64_t ticket, double timeout_s) {
  using Clock = std::chrono::steady_clock;
  const auto deadline = Clock::now() + std::chrono::duration<double>(timeout_s);
  for (int64_t polls = 0; host->ticket != ticket; ++polls) {
    if (host->failed) return false;
    if (polls % 1024 == 1023) {
      if (Clock::now() > deadline) return false;
      std::this_thread::yield();
    }
  }
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

}  // namespace moe_ep::nvlink
