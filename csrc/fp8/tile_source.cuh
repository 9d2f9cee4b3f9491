#pragma once

#include <algorithm>
#include <cstdint>

#include "fp8/byte_tile.cuh"
#include "fp8/checks.h"
#include "fp8/experts.cuh"
#include "fp8/requantize.h"

namespace moe_ep::fp8 {

constexpr int kRowsPerLoad = kThreads / ByteTile::kUnits;
constexpr int kLoads = kBlock / kRowsPerLoad;

// A thread has 16 bytes each of rows `kRowsPerLoad` apart, and those rows' scales.
struct Loaded {
  uint4 units[kLoads];  // NOTE: of a vector of bytes the compiler would make single bytes
  float scale_inv[kLoads];
};

__device__ __forceinline__ int own_row() {
  return static_cast<int>(threadIdx.x) / ByteTile::kUnits;
}

__device__ __forceinline__ int own_column() {
  return static_cast<int>(threadIdx.x) % ByteTile::kUnits * ByteTile::kUnit;
}

// A thread's share of tiles side by side, one after the other. Zeros below the last row.
class TileSource {
 public:
  __device__ __forceinline__ TileSource(const uint8_t* data, const float* scale_inv, int64_t cols,
                                        const RowTile& rows, int first_tile)
      : unit_(data + (rows.first + own_row()) * cols + first_tile * kBlock + own_column()),
        scale_inv_(scale_inv + (rows.first + own_row()) * (cols / kBlock) + first_tile),
        cols_(cols),
        rows_(rows.rows - own_row()) {}

  __device__ __forceinline__ void load(Loaded& loaded) {
    const uint8_t* unit = unit_;
    const float* scale_inv = scale_inv_;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      loaded.units[i] = make_uint4(0, 0, 0, 0);
      loaded.scale_inv[i] = 0.0f;
      if (i * kRowsPerLoad < rows_) {
        loaded.units[i] = __ldcs(reinterpret_cast<const uint4*>(unit));
        loaded.scale_inv[i] = *scale_inv;
      }
      unit += kRowsPerLoad * cols_;
      scale_inv += kRowsPerLoad * (cols_ / kBlock);
    }
    unit_ += kBlock;
    ++scale_inv_;
  }

 private:
  const uint8_t* unit_;
  const float* scale_inv_;
  int64_t cols_;
  int rows_;  // from this thread's first
};

// Launches a kernel whose thread blocks have up to 8 column tiles each, as many as leave at least
// `enough_blocks` of them: enough for all multiprocessors.
template <typename Kernel>
Status launch_over_tiles(const char* function, const Requantize& launch, int64_t enough_blocks,
                         Kernel* kernel) {
  constexpr int64_t kMostTiles = 8;
  const int64_t rows = launch.experts.rows, cols = launch.cols;
  const Status status = check_arguments(
      function, rows, cols,
      {launch.data, launch.scale_inv, launch.experts.counts, launch.out, launch.out_scale_inv},
      "data, scale_inv, counts, out and out_scale_inv");
  if (!status.is_ok() || rows == 0 || cols == 0) return status;
  const Status tiled = check_tiles(function, launch.experts, cols, {launch.data, launch.out});
  if (!tiled.is_ok()) return tiled;
  const int64_t column_tiles = cols / kBlock, row_tiles = launch.experts.max_tiles();
  const int64_t most = std::min(kMostTiles, column_tiles * row_tiles / enough_blocks);
  const int tiles_per_block = static_cast<int>(std::max<int64_t>(1, most));
  const dim3 grid(static_cast<unsigned int>((column_tiles + tiles_per_block - 1) / tiles_per_block),
                  static_cast<unsigned int>(row_tiles));
  kernel<<<grid, kThreads, 0, launch.stream>>>(launch.data, launch.scale_inv, cols, tiles_per_block,
                                               launch.experts, launch.out, launch.out_scale_inv);
  return Status::from_cuda(cudaGetLastError(), function);
}

}  // namespace moe_ep::fp8
