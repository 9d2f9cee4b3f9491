// Times the NVLink kernels by themselves: 1 or 2 GPUs from one process, without Python, over numbers of SMs
// and of SMs that send. For work on the kernels; users have `moe-ep bench` and `moe-ep tune`.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc -cudart static tests/gpu/kernel_sweep.cu
//   \
//     csrc/nvlink/*.cu csrc/nvlink/group.cpp -o kernel_sweep && ./kernel_sweep 24:8,9,10 132
//
// Each line: microseconds of the slower GPU, by the number of SMs that send.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "nvlink/combine.h"
#include "nvlink/dispatch.h"
#include "nvlink/plan.h"
#include "nvlink/plan_tables.h"
#include "sweep.h"

using namespace moe_ep;
using namespace moe_ep::nvlink;

constexpr int kTokens = 4096, kHidden = 7168, kExperts = 256, kTopk = 8, kScales = kHidden / 128;
constexpr int kAlignment = 16, kRepeats = 12, kWarmup = 2;
constexpr size_t kCacheBytes = 128 << 20;

// Ends on all GPUs at nearly the same time, and late enough for the host to be ahead.
__global__ void meet(volatile int* mine, volatile int* theirs, int round) {
  *theirs = round;
  __threadfence_system();
  while (*mine < round) {
  }
  for (int i = 0; i < 50; ++i) __nanosleep(1000);
}

struct Rank {
  int device;
  cudaStream_t stream;
  cudaEvent_t begin, end;
  Group group{};
  int64_t* topk_idx;
  char *x, *rows, *out, *cache;
  float *scales, *out_scales;
  int* tables;
  int64_t *counts, *ids;
  int64_t num_rows = 0;
  int* meeting;
};

std::vector<int64_t> random_routing(int seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> experts(kExperts), ids;
  std::iota(experts.begin(), experts.end(), 0);
  for (int token = 0; token < kTokens; ++token) {
    std::shuffle(experts.begin(), experts.end(), random);
    ids.insert(ids.end(), experts.begin(), experts.begin() + kTopk);
  }
  return ids;
}

class Sweep {
 public:
  explicit Sweep(int size) : ranks_(size) {
    const int64_t ring_bytes = size > 1 ? kTokens * align16(2 * kHidden + 4 * kTopk) : 0;
    const int num_local = kExperts / size;
    max_rows_ = static_cast<int64_t>(size) * kTokens * kTopk + num_local * (kAlignment - 1);
    for (int r = 0; r < size; ++r) {
      Rank& rank = ranks_[r];
      rank.device = r;
      check(cudaSetDevice(r));
      if (size > 1) check(cudaDeviceEnablePeerAccess(1 - r, 0));
      check(cudaStreamCreate(&rank.stream));
      check(cudaEventCreate(&rank.begin));
      check(cudaEventCreate(&rank.end));
      Group& group = rank.group;
      group.rank = r;
      group.size = size;
      group.max_tokens = kTokens;
      group.num_topk = kTopk;
      group.num_experts = kExperts;
      group.num_local = num_local;
      group.ring_bytes = ring_bytes;
      group.timeout_ns = 3'000'000'000;
      group.at = window_layout(size, kTokens, kTopk, ring_bytes);
      group.workspace =
          reinterpret_cast<Workspace*>(allocate<char>(workspace_bytes(size, kTokens, kExperts)));
      void* host;
      check(cudaHostAlloc(&host, sizeof(HostRecord), cudaHostAllocPortable));
      std::memset(host, 0, sizeof(HostRecord));
      group.host = static_cast<HostRecord*>(host);
      group.windows[r] = allocate<char>(group.at.bytes);
      const std::vector<int64_t> ids = random_routing(r);
      rank.topk_idx = allocate<int64_t>(ids.size());
      check(cudaMemcpy(rank.topk_idx, ids.data(), ids.size() * 8, cudaMemcpyHostToDevice));
      rank.x = allocate<char>(kTokens * kHidden * size_t{2});
      rank.rows = allocate<char>(max_rows_ * kHidden * 2);
      rank.out = allocate<char>(max_rows_ * kHidden * 2);
      rank.cache = allocate<char>(kCacheBytes);
      rank.scales = allocate<float>(kTokens * kScales);
      rank.out_scales = allocate<float>(max_rows_ * kScales);
      rank.counts = allocate<int64_t>(2 * num_local + 1);
      rank.ids = allocate<int64_t>(max_rows_ * kTopk);
      rank.tables = allocate<int>(PlanTables::words(group, kTokens));
      rank.meeting = allocate<int>(1);
    }
    for (Rank& rank : ranks_) {
      for (int r = 0; r < size; ++r) rank.group.windows[r] = ranks_[r].group.windows[r];
    }
    synchronize();
  }

  void run(int num_sms, std::vector<int> senders_to_try) {
    if (senders_to_try.empty()) {
      for (const int eighths : {1, 2, 3, 4, 5}) senders_to_try.push_back(std::max(1, num_sms * eighths / 8));
    }
    const int size = static_cast<int>(ranks_.size());
    for (const bool expert_layout : {false, true}) {
      const float plan = time([&](Rank& rank) { launch_a_plan(rank, expert_layout, num_sms); });
      for (Rank& rank : ranks_) {
        check(cudaMemcpy(&rank.num_rows, rank.counts + 2 * rank.group.num_local, 8, cudaMemcpyDeviceToHost));
      }
      std::printf("%3d SMs, %-6s plan %.1f\n", num_sms, expert_layout ? "expert" : "rank", plan);
      for (const char* op : {"fp8 dispatch", "quantise to fp8", "bf16 dispatch", "bf16 combine"}) {
        std::printf("   %-15s", op);
        for (int senders : senders_to_try) {
          if (size == 1) senders = 0;
          const float us = time([&](Rank& rank) {
            if (std::strstr(op, "combine")) return launch_a_combine(rank, expert_layout, num_sms, senders);
            launch_a_dispatch(rank, op, expert_layout, num_sms, senders);
          });
          std::printf("  %d: %.1f", senders, us);
          if (size == 1) break;
        }
        std::printf("\n");
      }
    }
  }

 private:
  void launch_a_plan(Rank& rank, bool expert_layout, int num_sms) {
    const int num_local = rank.group.num_local;
    check(launch_plan(rank.group,
                      Plan{rank.topk_idx, true, kTokens, expert_layout, expert_layout ? kAlignment : 1,
                           max_rows_, false, rank.tables, rank.counts, rank.counts + num_local,
                           rank.counts + 2 * num_local, rank.ids, 0, num_sms, rank.stream}));
  }

  void launch_a_dispatch(Rank& rank, const char* op, bool expert_layout, int num_sms, int senders) {
    const bool fp8 = std::strstr(op, "fp8"), quantises = std::strstr(op, "quantise");
    check(launch_dispatch(
        rank.group,
        Dispatch{rank.x, fp8 ? kHidden : 2 * kHidden, quantises, DType::bfloat16, fp8 ? rank.scales : nullptr,
                 fp8 ? kScales : 0, 1.0f, nullptr, rank.tables, rank.out, fp8 ? rank.out_scales : nullptr,
                 nullptr, rank.num_rows, expert_layout, expert_layout, num_sms, senders, rank.stream}));
  }

  void launch_a_combine(Rank& rank, bool expert_layout, int num_sms, int senders) {
    check(launch_combine(rank.group, Combine{rank.rows,
                                             DType::bfloat16,
                                             2 * kHidden,
                                             nullptr,
                                             {nullptr, nullptr},
                                             rank.tables,
                                             kTokens,
                                             rank.out,
                                             nullptr,
                                             expert_layout,
                                             num_sms,
                                             senders,
                                             rank.stream}));
  }

  // The median, with cold caches.
  float time(const std::function<void(Rank&)>& launch) {
    std::vector<float> times;
    for (int i = 0; i < kWarmup + kRepeats; ++i) {
      ++round_;
      for (Rank& rank : ranks_) {
        check(cudaSetDevice(rank.device));
        check(cudaMemsetAsync(rank.cache, i, kCacheBytes, rank.stream));
        meet<<<1, 1, 0, rank.stream>>>(rank.meeting, ranks_[ranks_.size() - 1 - rank.device].meeting, round_);
      }
      for (Rank& rank : ranks_) {
        check(cudaSetDevice(rank.device));
        check(cudaEventRecord(rank.begin, rank.stream));
        launch(rank);
        check(cudaEventRecord(rank.end, rank.stream));
      }
      synchronize();
      float slowest = 0;
      for (Rank& rank : ranks_) {
        float ms;
        check(cudaEventElapsedTime(&ms, rank.begin, rank.end));
        slowest = std::max(slowest, ms * 1000);
        if (rank.group.host->failed) {
          std::fprintf(stderr, "a wait timed out in phase %d\n", static_cast<int>(rank.group.host->phase));
          std::exit(1);
        }
      }
      if (i >= kWarmup) times.push_back(slowest);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  void synchronize() {
    for (Rank& rank : ranks_) {
      check(cudaSetDevice(rank.device));
      check(cudaDeviceSynchronize());
    }
  }

  std::vector<Rank> ranks_;
  int64_t max_rows_;
  int round_ = 0;
};

int main(int argc, char** argv) {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  Sweep sweep(std::min(count, 2));
  for (int i = 1; i < argc; ++i) {
    char* rest;
    const int num_sms = static_cast<int>(std::strtol(argv[i], &rest, 10));
    std::vector<int> senders;
    while (*rest) senders.push_back(static_cast<int>(std::strtol(rest + 1, &rest, 10)));
    sweep.run(num_sms, senders);
  }
  if (argc < 2) sweep.run(64, {});
}
