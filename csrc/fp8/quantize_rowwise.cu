#include "fp8/quantize_rowwise.h"

#include <type_traits>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/checks.h"
#include "fp8/formulas.cuh"

namespace moe_ep::fp8 {
namespace {

// Bound by HBM: bytes moved per element are sizeof(T) + 1 + 4/128. Each lane keeps four 16-byte loads in
// flight; neighbouring lanes read and write neighbouring bytes, and a warp writes its scales in one store.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_vectors(const T* __restrict__ x, uint8_t* __restrict__ data, float* __restrict__ scale_inv,
                     Blocks blocks) {
  constexpr int kElements = 16 / sizeof(T);
  using Tile = Tiling<kElements>;
  const int lane = threadIdx.x % 32;
  const int group = lane / Tile::kLanesPerBlock;          // which block of a step
  const int lane_in_block = lane % Tile::kLanesPerBlock;  // which part of the block
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = warp * Tile::kBlocksPerWarp + group;
  const int begin = lane_in_block * kElements;

  Vector<T, kElements> loaded[Tile::kSteps];
  int64_t offset[Tile::kSteps];
  bool active[Tile::kSteps];
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Blocks::Span span = blocks.span(first + step * Tile::kBlocksPerStep);
    offset[step] = span.offset + begin;
    active[step] = begin < span.length;
    loaded[step] = active[step] ? load_once<T, kElements>(x + offset[step]) : Vector<T, kElements>{};
  }

  float own_scale_inv = 1.0f;  // of step `lane_in_block`
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const Scale scale = scale_from_amax(max_over_lanes<Tile::kLanesPerBlock>(amax_of(loaded[step])));
    float values[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = moe_ep::to_float(loaded[step].at[i]);
    if (active[step]) store(data + offset[step], quantize(values, scale.multiply));
    if (lane_in_block == step) own_scale_inv = scale.inverse;
  }
  const int64_t own_block = first + lane_in_block * Tile::kBlocksPerStep;
  if (lane_in_block < Tile::kSteps && own_block < blocks.count) scale_inv[own_block] = own_scale_inv;
}

// One warp a block, one element an access: for rows that do not start at 16-byte boundaries.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_elements(const T* __restrict__ x, uint8_t* __restrict__ data, float* __restrict__ scale_inv,
                      Blocks blocks) {
  constexpr int kPerLane = kBlock / 32;
  const int lane = threadIdx.x % 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Blocks::Span span = blocks.span(block);

  float values[kPerLane];
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = lane + 32 * i;
    values[i] = at < span.length ? moe_ep::to_float(x[span.offset + at]) : 0.0f;
    amax = fmaxf(amax, fabsf(values[i]));
  }
  const Scale scale = scale_from_amax(max_over_lanes<32>(amax));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int at = lane + 32 * i;
    if (at < span.length) data[span.offset + at] = quantize(values[i], scale.multiply);
  }
  if (lane == 0 && block < blocks.count) scale_inv[block] = scale.inverse;
}

template <typename T>
Status launch_as(const QuantizeRowwise& launch) {
  constexpr int kElements = 16 / sizeof(T);
  const Blocks blocks(launch.rows, launch.cols);
  const bool vectors =
      launch.cols % kElements == 0 && is_aligned(launch.x, 16) && is_aligned(launch.data, kElements);
  const int64_t grid = grid_for(blocks, vectors ? Tiling<kElements>::kBlocksPerWarp : 1);
  const Status grid_status = check_grid("quantize_rowwise", launch.rows, launch.cols, grid);
  if (!grid_status.is_ok()) return grid_status;
  auto* kernel = &quantize_elements<T>;
  if (vectors) kernel = &quantize_vectors<T>;
  kernel<<<static_cast<unsigned int>(grid), kThreads, 0, launch.stream>>>(
      static_cast<const T*>(launch.x), launch.data, launch.scale_inv, blocks);
  return Status::from_cuda(cudaGetLastError(), "launching quantize_rowwise");
}

}  // namespace

Status quantize_rowwise(const QuantizeRowwise& launch) {
  const Status status = check_arguments("quantize_rowwise", launch.rows, launch.cols,
                                        {launch.x, launch.data, launch.scale_inv}, "x, data and scale_inv");
  if (!status.is_ok() || launch.rows == 0 || launch.cols == 0) return status;
  return for_dtype(launch.dtype,
                   [&](auto* type) { return launch_as<std::remove_pointer_t<decltype(type)>>(launch); });
}

}  // namespace moe_ep::fp8
