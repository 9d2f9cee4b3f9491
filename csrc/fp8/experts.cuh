#pragma once

#include <cstdint>

#include "fp8/blocks.cuh"
#include "fp8/experts.h"

namespace moe_ep::fp8 {

// Up to 128 rows of one expert; `rows` is 0 past the last tile.
struct RowTile {
  int64_t first;         // row of the matrix
  int rows;              // in the tile
  int64_t expert_first;  // the expert's first row
  int64_t expert_rows;
  int expert;
};

// Where a tile's columns begin among those of all experts: for each expert a matrix [cols, rows rounded up to
// 128], one after the other, with zeros behind its rows. So the columns of a tile are whole cache lines,
// whatever the number of rows; lines that two tiles share took a fifth longer.
struct ColumnPlace {
  int64_t offset;  // of the first column
  int64_t stride;  // from a column to the next
};

// `number` is that of the tile.
__device__ __forceinline__ ColumnPlace place_of_columns(const RowTile& tile, int64_t number, int64_t cols) {
  const int64_t row = tile.first - tile.expert_first;
  const int64_t stride = (tile.expert_rows + kBlock - 1) / kBlock * kBlock;
  return {(number - row / kBlock) * kBlock * cols + row, stride};
}

// Tile number `tile`, counted expert by expert. Every lane of a warp calls it and gets the answer.
__device__ __forceinline__ RowTile find_tile(const Experts& experts, int64_t tile) {
  constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
  const int lane = threadIdx.x % 32;
  int64_t rows_before = 0, tiles_before = 0;
  for (int base = 0; base < experts.num; base += 32) {
    const int64_t count = base + lane < experts.num ? experts.counts[base + lane] : 0;
    int64_t end = count;  // prefix sums over lanes
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, end, distance);
      if (lane >= distance) end += lower;
    }
    const int64_t first = rows_before + end - count;
    const int64_t rows = max(static_cast<int64_t>(0), min(count, experts.rows - first));
    const int64_t tiles = (rows + kBlock - 1) / kBlock;
    int64_t last = tiles;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t lower = __shfl_up_sync(kAllLanes, last, distance);
      if (lane >= distance) last += lower;
    }
    last += tiles_before;
    const unsigned int found = __ballot_sync(kAllLanes, last - tiles <= tile && tile < last);
    if (found != 0) {
      const int owner = __ffs(static_cast<int>(found)) - 1;
      const int64_t expert_first = __shfl_sync(kAllLanes, first, owner);
      const int64_t expert_rows = __shfl_sync(kAllLanes, rows, owner);
      const int64_t offset = (tile - __shfl_sync(kAllLanes, last - tiles, owner)) * kBlock;
      const int64_t left = min(expert_rows - offset, static_cast<int64_t>(kBlock));
      return {expert_first + offset, static_cast<int>(left), expert_first, expert_rows, base + owner};
    }
    rows_before += __shfl_sync(kAllLanes, end, 31);
    tiles_before = __shfl_sync(kAllLanes, last, 31);
  }
  return {0, 0, 0, 0, 0};
}

}  // namespace moe_ep::fp8
