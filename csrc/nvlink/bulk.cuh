#pragma once

#include <cstdint>

// Bulk loads from global to shared memory, which one thread starts and a multiprocessor's copy engine does.
// Addresses and sizes are multiples of 16 bytes.
namespace moe_ep::nvlink::bulk {

// Where something lies in shared memory.
using SharedAddress = unsigned int;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// A barrier, of 8 bytes, that a load announces its end to.
__device__ __forceinline__ void init(SharedAddress barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

// After the barriers of this thread block, or of this warp, were initialised, before their first use.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A load of `bytes` that then announces its end.
__device__ __forceinline__ void load(SharedAddress to, const void* from, unsigned int bytes,
                                     SharedAddress barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Waits for the end of the load that was number 2n + `parity` on this barrier.
__device__ __forceinline__ void wait(SharedAddress barrier, unsigned int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// What this thread has seen written to global memory comes before bulk loads of it.
__device__ __forceinline__ void fence_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace moe_ep::nvlink::bulk
