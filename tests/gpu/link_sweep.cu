// What the link between two GPUs carries with both directions busy: copy engines, and stores of some SMs. The
// floor of csrc/nvlink, without its work.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -cudart static tests/gpu/link_sweep.cu
//     -o link_sweep && ./link_sweep
//
// GB/s of the slower direction.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "sweep.h"

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kPiece = 7168;  // bytes of a row
constexpr size_t kBytes = size_t{32768} * kPiece;
constexpr int kCalls = 3, kRepeats = 9;

// Each warp copies rows, 16 bytes a lane.
__global__ void __launch_bounds__(kThreads) store_rows(const char* from, char* to) {
  constexpr int kSteps = kPiece / 512, kAhead = 7;
  static_assert(kSteps % kAhead == 0);
  for (size_t row = blockIdx.x * kWarps + threadIdx.x / 32; row < kBytes / kPiece;
       row += gridDim.x * kWarps) {
    const auto* in = reinterpret_cast<const uint4*>(from + row * kPiece) + threadIdx.x % 32;
    auto* out = reinterpret_cast<uint4*>(to + row * kPiece) + threadIdx.x % 32;
    for (int step = 0; step < kSteps; step += kAhead) {
      uint4 words[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) words[i] = __ldcs(in + (step + i) * 32);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) out[(step + i) * 32] = words[i];
    }
  }
}

// Each warp sends the row that it has in shared memory, again and again, by bulk stores.
__global__ void __launch_bounds__(kThreads) store_bulk(char* to) {
  extern __shared__ __align__(128) char memory[];
  char* const own = memory + threadIdx.x / 32 * kPiece;
  for (int i = threadIdx.x % 32; i < kPiece / 16; i += 32)
    reinterpret_cast<uint4*>(own)[i] = make_uint4(i, 2, 3, threadIdx.x);
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  asm volatile("fence.proxy.async.shared::cta;");
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  for (size_t row = blockIdx.x * kWarps + threadIdx.x / 32; row < kBytes / kPiece;
       row += gridDim.x * kWarps) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to + row * kPiece),
                 "r"(shared), "r"(kPiece)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 4;");
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

struct Gpu {
  char *from, *to;
  cudaStream_t stream;
  cudaEvent_t begin, end;
};

// `send(gpu)` puts one call onto that GPU's stream.
template <typename Send>
double rate(Gpu (&gpus)[2], Send&& send) {
  std::vector<float> times;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    for (int g = 0; g < 2; ++g) {
      check(cudaSetDevice(g));
      check(cudaEventRecord(gpus[g].begin, gpus[g].stream));
      for (int call = 0; call < kCalls; ++call) send(g);
      check(cudaEventRecord(gpus[g].end, gpus[g].stream));
    }
    float slower = 0;
    for (Gpu& gpu : gpus) {
      check(cudaEventSynchronize(gpu.end));
      float ms;
      check(cudaEventElapsedTime(&ms, gpu.begin, gpu.end));
      slower = std::max(slower, ms / kCalls);
    }
    times.push_back(slower);
  }
  check(cudaGetLastError());
  std::sort(times.begin(), times.end());
  return kBytes / times[kRepeats / 2] / 1e6;
}

int main() {
  Gpu gpus[2];
  for (int g = 0; g < 2; ++g) {
    check(cudaSetDevice(g));
    check(cudaDeviceEnablePeerAccess(1 - g, 0));
    gpus[g] = {allocate<char>(kBytes, 1), allocate<char>(kBytes)};
    check(cudaStreamCreate(&gpus[g].stream));
    check(cudaEventCreate(&gpus[g].begin));
    check(cudaEventCreate(&gpus[g].end));
    check(cudaFuncSetAttribute(store_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, kWarps * kPiece));
  }
  const double engines = rate(gpus, [&](int g) {
    check(cudaMemcpyAsync(gpus[1 - g].to, gpus[g].from, kBytes, cudaMemcpyDeviceToDevice, gpus[g].stream));
  });
  std::printf("copy engines: %.0f\n", engines);
  for (const int sms : {8, 16, 24, 44, 64, 132}) {
    const double stores = rate(
        gpus, [&](int g) { store_rows<<<sms, kThreads, 0, gpus[g].stream>>>(gpus[g].from, gpus[1 - g].to); });
    const double bulk = rate(
        gpus, [&](int g) { store_bulk<<<sms, kThreads, kWarps * kPiece, gpus[g].stream>>>(gpus[1 - g].to); });
    std::printf("%3d SMs: stores %.0f, bulk stores %.0f\n", sms, stores, bulk);
  }
}
