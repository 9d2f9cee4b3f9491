#include "rank_layout/number.h"

#include <algorithm>

namespace moe_ep::rank_layout {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kEntriesPerBlock = 2048;

// A run of (row, k), in their order. Blocks, and the warps of a block, have one behind the other.
struct Run {
  int64_t begin, end;

  __device__ Run part(int index, int64_t size) const {
    const int64_t first = min(begin + index * size, end);
    return {first, min(first + size, end)};
  }
};

struct Entries {
  const int64_t* topk_idx;
  int64_t count;
  int64_t per_block;  // a multiple of kThreads
  int num_experts;

  __device__ Run of_block() const { return Run{0, count}.part(blockIdx.x, per_block); }

  __device__ Run of_warp() const { return of_block().part(threadIdx.x / 32, per_block / kWarps); }

  // -1 for none.
  __device__ int expert(int64_t at) const {
    const int64_t id = topk_idx[at];
    return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
  }
};

// counts[block][expert]
__global__ void __launch_bounds__(kThreads) count_entries(Entries entries, int* __restrict__ counts) {
  __shared__ int found[kMaxExperts];
  for (int e = threadIdx.x; e < entries.num_experts; e += kThreads) found[e] = 0;
  __syncthreads();
  const Run run = entries.of_block();
  for (int64_t at = run.begin + threadIdx.x; at < run.end; at += kThreads) {
    const int expert = entries.expert(at);
    if (expert >= 0) atomicAdd(&found[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < entries.num_experts; e += kThreads) {
    counts[blockIdx.x * entries.num_experts + e] = found[e];
  }
}

// Turns sizes into the sums of those before each; one warp.
__device__ void exclusive_sums(int* sizes, int count) {
  const int lane = threadIdx.x % 32;
  const int each = (count + 31) / 32;
  const int begin = min(lane * each, count), end = min(begin + each, count);
  int sum = 0;
  for (int i = begin; i < end; ++i) sum += sizes[i];
  int before = sum;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = __shfl_up_sync(0xFFFFFFFFu, before, distance);
    if (lane >= distance) before += lower;
  }
  before -= sum;
  for (int i = begin; i < end; ++i) {
    const int size = sizes[i];
    sizes[i] = before;
    before += size;
  }
}

__global__ void __launch_bounds__(kThreads)
    number_entries(Entries entries, const int* __restrict__ counts, int alignment, int num_slots,
                   int* __restrict__ slots, int* __restrict__ gaps, int64_t* __restrict__ tokens_per_expert) {
  __shared__ int first[kMaxExperts];         // place of each expert's copies
  __shared__ int next[kWarps][kMaxExperts];  // place of each warp's next copy for an expert
  const int num_experts = entries.num_experts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  for (int i = threadIdx.x; i < num_experts; i += kThreads) {
    for (int w = 0; w < kWarps; ++w) next[w][i] = 0;
    int total = 0;
    for (int block = 0; block < gridDim.x; ++block) total += counts[block * num_experts + i];
    first[i] = (total + alignment - 1) / alignment * alignment;
  }
  __syncthreads();
  if (warp == 0) exclusive_sums(first, num_experts);
  const Run run = entries.of_warp();
  for (int64_t at = run.begin + lane; at < run.end; at += 32) {
    const int expert = entries.expert(at);
    if (expert >= 0) atomicAdd(&next[warp][expert], 1);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < num_experts; i += kThreads) {
    int place = first[i], total = 0;
    for (int block = 0; block < gridDim.x; ++block) {
      const int count = counts[block * num_experts + i];
      total += count;
      if (block < blockIdx.x) place += count;
    }
    for (int w = 0; w < kWarps; ++w) {
      const int count = next[w][i];
      next[w][i] = place;
      place += count;
    }
    if (blockIdx.x == 0) {
      const int padded = (total + alignment - 1) / alignment * alignment;
      tokens_per_expert[i] = padded;
      gaps[2 * i] = min(first[i] + total, num_slots);
      gaps[2 * i + 1] = min(first[i] + padded, num_slots);
      if (i == num_experts - 1) {
        gaps[2 * num_experts] = min(first[i] + padded, num_slots);
        gaps[2 * num_experts + 1] = num_slots;
      }
    }
  }
  __syncthreads();

  for (int64_t begin = run.begin; begin < run.end; begin += 32) {
    const int64_t at = begin + lane;
    const int expert = at < run.end ? entries.expert(at) : -1;
    const unsigned int same = __match_any_sync(0xFFFFFFFFu, expert);
    const int before = __popc(same & ((1u << lane) - 1));
    const int place = expert >= 0 ? next[warp][expert] + before : -1;
    __syncwarp();
    if (expert >= 0 && before == 0) next[warp][expert] += __popc(same);
    __syncwarp();
    if (at < run.end) slots[at] = place < num_slots ? place : -1;
  }
}

}  // namespace

Status number(const Number& launch) {
  if (launch.rows < 0 || launch.num_topk < 1 || launch.alignment < 1 || launch.num_slots < 0) {
    return Status::invalid(
        "number: rows and num_slots must be >= 0, num_topk and alignment >= 1; got %lld, %lld, %d and %lld",
        static_cast<long long>(launch.rows), static_cast<long long>(launch.num_slots), launch.num_topk,
        static_cast<long long>(launch.alignment));
  }
  if (launch.num_experts < 1 || launch.num_experts > kMaxExperts) {
    return Status::invalid("number: num_experts must be 1 to %d, got %d", kMaxExperts, launch.num_experts);
  }
  const int64_t entries = launch.rows * launch.num_topk;
  const int64_t places = entries + launch.num_experts * launch.alignment;
  if (places > INT32_MAX || launch.num_slots > INT32_MAX) {
    return Status::invalid(
        "number: %lld rows of %d experts each, aligned to %lld, or %lld places, are more than %d",
        static_cast<long long>(launch.rows), launch.num_topk, static_cast<long long>(launch.alignment),
        static_cast<long long>(launch.num_slots), INT32_MAX);
  }
  const int64_t wanted = (entries + kEntriesPerBlock - 1) / kEntriesPerBlock;
  const int64_t blocks = std::clamp<int64_t>(wanted, 1, kMaxCountBlocks);
  const int64_t per_block = ((entries + blocks - 1) / blocks + kThreads - 1) / kThreads * kThreads;
  const Entries all{launch.topk_idx, entries, per_block, launch.num_experts};
  const auto grid = static_cast<unsigned int>(blocks);
  count_entries<<<grid, kThreads, 0, launch.stream>>>(all, launch.counts);
  number_entries<<<grid, kThreads, 0, launch.stream>>>(all, launch.counts, static_cast<int>(launch.alignment),
                                                       static_cast<int>(launch.num_slots), launch.slots,
                                                       launch.gaps, launch.tokens_per_expert);
  return Status::from_cuda(cudaGetLastError(), "launching the kernels that number rows");
}

}  // namespace moe_ep::rank_layout
