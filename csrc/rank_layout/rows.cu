#include "rank_layout/rows.h"

#include <type_traits>

#include "common/vector.cuh"

namespace moe_ep::rank_layout {
namespace {

// A warp has one row, from left to right. All is bound by HBM, so each lane loads for several steps at a
// time.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSteps = 4;
constexpr int kGapBlocks = 64;  // for the last gap, which may be long; one for each of the others

using Bytes = Vector<uint8_t, 16>;

// The places of one row's copies: lane k knows the k-th.
struct Places {
  int own;
  unsigned int taken;  // a bit for each k that has one

  __device__ Places(const Copies& copies, int64_t row) {
    const int lane = threadIdx.x % 32;
    own = lane < copies.num_topk ? copies.slots[row * copies.num_topk + lane] : -1;
    taken = __ballot_sync(0xFFFFFFFFu, own >= 0);
  }

  // Calls use(place) for each copy, in ascending k.
  template <typename Use>
  __device__ __forceinline__ void for_each(Use&& use) const {
    for (unsigned int left = taken; left != 0; left &= left - 1) {
      use(static_cast<int64_t>(__shfl_sync(0xFFFFFFFFu, own, __ffs(left) - 1)));
    }
  }
};

__device__ void expand_row(const Expand& launch, int64_t row) {
  const int lane = threadIdx.x % 32;
  const Places places(launch.copies, row);
  if (launch.to_weights != nullptr && places.own >= 0) {
    launch.to_weights[places.own] = launch.weights[row * launch.copies.num_topk + lane];
  }
  const auto* from = static_cast<const uint8_t*>(launch.from) + row * launch.row_bytes;
  auto* to = static_cast<uint8_t*>(launch.to);
  constexpr int kStep = 32 * sizeof(Bytes);
  for (int64_t begin = 0; begin < launch.row_bytes; begin += kSteps * kStep) {
    const int64_t mine = begin + lane * sizeof(Bytes);
    Bytes loaded[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t at = mine + step * kStep;
      if (at < launch.row_bytes) loaded[step] = load_once<uint8_t, 16>(from + at);
    }
    places.for_each([&](int64_t place) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t at = mine + step * kStep;
        if (at < launch.row_bytes) store(to + place * launch.row_bytes + at, loaded[step]);
      }
    });
  }
  if (launch.scales == nullptr) return;
  for (int begin = 0; begin < launch.num_scales; begin += 32) {
    const int at = begin + lane;
    const float scale = at < launch.num_scales ? launch.scales[row * launch.num_scales + at] : 0.0f;
    places.for_each([&](int64_t place) {
      if (at < launch.num_scales) launch.to_scales[place * launch.num_scales + at] = scale;
    });
  }
}

__device__ void pad_place(const Expand& launch, int64_t place) {
  const int lane = threadIdx.x % 32;
  auto* to = static_cast<uint8_t*>(launch.to) + place * launch.row_bytes;
  for (int64_t at = lane * sizeof(Bytes); at < launch.row_bytes; at += 32 * sizeof(Bytes))
    store(to + at, Bytes{});
  if (launch.scales != nullptr) {
    for (int at = lane; at < launch.num_scales; at += 32)
      launch.to_scales[place * launch.num_scales + at] = 1.0f;
  }
  if (launch.to_weights != nullptr && lane == 0) launch.to_weights[place] = 0.0f;
}

__global__ void __launch_bounds__(kThreads)
    expand_rows(const __grid_constant__ Expand launch, unsigned int row_blocks) {
  const int warp = threadIdx.x / 32;
  if (blockIdx.x < row_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
    if (row < launch.copies.rows) expand_row(launch, row);
    return;
  }
  const int index = static_cast<int>(blockIdx.x - row_blocks), last = launch.num_gaps - 1;
  const int gap = min(index, last);
  const int blocks = gap < last ? 1 : kGapBlocks;
  const int end = launch.gaps[2 * gap + 1];
  for (int place = launch.gaps[2 * gap] + (index - gap) * kWarps + warp; place < end;
       place += blocks * kWarps) {
    pad_place(launch, place);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_rows(const __grid_constant__ Reduce launch) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kStep = 32 * kElements;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= launch.copies.rows) return;
  const Places places(launch.copies, row);
  if (launch.to_weights != nullptr && lane < launch.copies.num_topk) {
    launch.to_weights[row * launch.copies.num_topk + lane] =
        places.own >= 0 ? launch.weights[places.own] : 0.0f;
  }
  const int64_t width = launch.row_bytes / sizeof(T);
  const auto* from = static_cast<const T*>(launch.from);
  auto* to = static_cast<T*>(launch.to) + row * width;
  // Added to -0.0 every first term stays as it is; to 0.0 it would turn -0.0 into 0.0.
  const float empty = places.taken != 0 ? -0.0f : 0.0f;
  for (int64_t begin = lane * kElements; begin - lane * kElements < width; begin += kSteps * kStep) {
    float sum[kSteps][kElements];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) sum[step][i] = empty;
    }
    places.for_each([&](int64_t place) {
      Vector<T, kElements> loaded[kSteps];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int64_t at = begin + step * kStep;
        loaded[step] = {};
        if (at < width) loaded[step] = load_once<T, kElements>(from + place * width + at);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) sum[step][i] += to_float(loaded[step].at[i]);
      }
    });
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t at = begin + step * kStep;
      Vector<T, kElements> rounded;
#pragma unroll
      for (int i = 0; i < kElements; ++i) rounded.at[i] = from_float<T>(sum[step][i]);
      if (at < width) store(to + at, rounded);
    }
  }
}

Status check(const char* function, const Copies& copies, int64_t row_bytes, const void* from,
             const void* to) {
  if (copies.rows < 0 || copies.num_topk < 1 || copies.num_topk > kMaxTopk) {
    return Status::invalid("%s: rows must be >= 0 and num_topk 1 to %d, got %lld and %d", function, kMaxTopk,
                           static_cast<long long>(copies.rows), copies.num_topk);
  }
  if (row_bytes < 0 || row_bytes % 16 != 0 || !is_aligned(from, 16) || !is_aligned(to, 16)) {
    return Status::invalid("%s: rows must be 16-byte aligned and a multiple of 16 bytes, got %lld bytes",
                           function, static_cast<long long>(row_bytes));
  }
  if (copies.rows > static_cast<int64_t>(INT32_MAX) / 2 * kWarps) {
    return Status::invalid("%s: %lld rows are more than the kernel takes", function,
                           static_cast<long long>(copies.rows));
  }
  return Status::ok();
}

unsigned int blocks_for(const Copies& copies) {
  return static_cast<unsigned int>((copies.rows + kWarps - 1) / kWarps);
}

}  // namespace

Status expand(const Expand& launch) {
  const Status status = check("expand", launch.copies, launch.row_bytes, launch.from, launch.to);
  if (!status.is_ok()) return status;
  const unsigned int row_blocks = blocks_for(launch.copies);
  const unsigned int gap_blocks = launch.num_gaps > 0 ? launch.num_gaps - 1 + kGapBlocks : 0;
  if (row_blocks + gap_blocks == 0) return status;
  expand_rows<<<row_blocks + gap_blocks, kThreads, 0, launch.stream>>>(launch, row_blocks);
  return Status::from_cuda(cudaGetLastError(), "launching the kernel that expands rows");
}

Status reduce(const Reduce& launch) {
  const Status status = check("reduce", launch.copies, launch.row_bytes, launch.from, launch.to);
  const unsigned int blocks = blocks_for(launch.copies);
  if (!status.is_ok() || blocks == 0) return status;
  for_dtype(launch.dtype, [&](auto* type) {
    reduce_rows<std::remove_pointer_t<decltype(type)>><<<blocks, kThreads, 0, launch.stream>>>(launch);
  });
  return Status::from_cuda(cudaGetLastError(), "launching the kernel that reduces rows");
}

}  // namespace moe_ep::rank_layout
