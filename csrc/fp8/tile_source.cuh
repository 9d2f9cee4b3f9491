#pragma once

#include <algorithm>
#include <cstdint>

#include "fp8/byte_tile.cuh"
#include "fp8/experts.cuh"

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

// Column tiles for each thread block: as many as leave enough blocks for all multiprocessors.
inline int tiles_per_block(int64_t column_tiles, int64_t row_tiles, int64_t enough_blocks) {
  constexpr int64_t kMost = 8;
  return static_cast<int>(std::max<int64_t>(1, std::min(kMost, column_tiles * row_tiles / enough_blocks)));
}

}  // namespace moe_ep::fp8
