#include "fp8/dequantize_rowwise.h"

#include <type_traits>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/checks.h"
#include "fp8/formulas.cuh"

namespace moe_ep::fp8 {
namespace {

template <typename T>
__device__ __forceinline__ T dequantize(uint8_t byte, float scale_inv) {
  return from_float<T>(__fmul_rn(to_float(byte), scale_inv));
}

// Bound by HBM, as quantising is; here the stores are the 16-byte side.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_vectors(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv,
                       T* __restrict__ out, Blocks blocks) {
  constexpr int kElements = 16 / sizeof(T);
  using Tile = Tiling<kElements>;
  const int lane = threadIdx.x % 32;
  const int group = lane / Tile::kLanesPerBlock;
  const int begin = lane % Tile::kLanesPerBlock * kElements;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t first = warp * Tile::kBlocksPerWarp + group;

  Vector<uint8_t, kElements> loaded[Tile::kSteps];
  float scale[Tile::kSteps];
  int64_t offset[Tile::kSteps];
  bool active[Tile::kSteps];
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const int64_t block = first + step * Tile::kBlocksPerStep;
    const Blocks::Span span = blocks.span(block);
    offset[step] = span.offset + begin;
    active[step] = begin < span.length;
    if (active[step]) {
      loaded[step] = load_once<uint8_t, kElements>(data + offset[step]);
      scale[step] = scale_inv[block];
    }
  }
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    if (!active[step]) continue;
    __nv_fp8x2_storage_t pairs[kElements / 2];
    memcpy(pairs, &loaded[step], sizeof(pairs));
    Vector<T, kElements> values;
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      const float2 pair = to_float2(pairs[i / 2]);
      values.at[i] = from_float<T>(__fmul_rn(pair.x, scale[step]));
      values.at[i + 1] = from_float<T>(__fmul_rn(pair.y, scale[step]));
    }
    store(out + offset[step], values);
  }
}

// One warp a block, one element an access: for rows that do not start at 16-byte boundaries.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dequantize_elements(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv,
                        T* __restrict__ out, Blocks blocks) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const Blocks::Span span = blocks.span(block);
  for (int at = threadIdx.x % 32; at < span.length; at += 32) {
    out[span.offset + at] = dequantize<T>(data[span.offset + at], scale_inv[block]);
  }
}

template <typename T>
Status launch_as(const DequantizeRowwise& launch) {
  constexpr int kElements = 16 / sizeof(T);
  const Blocks blocks(launch.rows, launch.cols);
  const bool vectors =
      launch.cols % kElements == 0 && is_aligned(launch.out, 16) && is_aligned(launch.data, kElements);
  const int64_t grid = grid_for(blocks, vectors ? Tiling<kElements>::kBlocksPerWarp : 1);
  const Status grid_status = check_grid("dequantize_rowwise", launch.rows, launch.cols, grid);
  if (!grid_status.is_ok()) return grid_status;
  auto* kernel = &dequantize_elements<T>;
  if (vectors) kernel = &dequantize_vectors<T>;
  kernel<<<static_cast<unsigned int>(grid), kThreads, 0, launch.stream>>>(
      launch.data, launch.scale_inv, static_cast<T*>(launch.out), blocks);
  return Status::from_cuda(cudaGetLastError(), "launching dequantize_rowwise");
}

}  // namespace

Status dequantize_rowwise(const DequantizeRowwise& launch) {
  const Status status =
      check_arguments("dequantize_rowwise", launch.rows, launch.cols,
                      {launch.data, launch.scale_inv, launch.out}, "data, scale_inv and out");
  if (!status.is_ok() || launch.rows == 0 || launch.cols == 0) return status;
  return for_dtype(launch.dtype,
                   [&](auto* type) { return launch_as<std::remove_pointer_t<decltype(type)>>(launch); });
}

}  // namespace moe_ep::fp8
