#pragma once

#include <cstdint>

// The bulk copy engine of an SM: copies between global and shared memory that one thread starts. Addresses
// and sizes are multiples of 16 bytes.
namespace moe_ep::nvlink::bulk {

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

// A barrier that a load announces its end to.
__device__ __forceinline__ void init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// After the barriers of this thread block, or of this warp, were initialised, before their first use.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Loads of `bytes` in all are about to follow.
__device__ __forceinline__ void expect(uint64_t* barrier, unsigned int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void load(void* to, const void* from, unsigned int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Waits for the end of the loads that were expected as number 2n + `parity` on this barrier.
__device__ __forceinline__ void wait(uint64_t* barrier, unsigned int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Part of this thread's open group of stores.
__device__ __forceinline__ void store(void* to, const void* from, unsigned int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void close_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All but the latest `Groups` groups of this thread have read their shared memory.
template <int Groups>
__device__ __forceinline__ void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Groups) : "memory");
}

// All but the latest `Groups` groups of this thread have been written.
template <int Groups>
__device__ __forceinline__ void wait_until_written() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Groups) : "memory");
}

// What this thread wrote to shared memory comes before bulk stores of it.
__device__ __forceinline__ void fence_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has seen written to global memory comes before bulk loads of it.
__device__ __forceinline__ void fence_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace moe_ep::nvlink::bulk
