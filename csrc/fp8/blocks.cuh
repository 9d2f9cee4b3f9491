#pragma once

#include <cstdint>

namespace moe_ep::fp8 {

constexpr int kBlock = 128;  // columns that share one scale

// The 1x128 blocks of a contiguous [rows, cols] matrix, numbered row by row: block i has its scale at entry i
// of the compact row-major scale array [rows, ceil(cols / 128)].
struct Blocks {
  int64_t count;
  int64_t cols;
  int64_t per_row;

  struct Span {
    int64_t offset;  // of the block's first element in the matrix
    int length;      // elements: 128, fewer in the last block of a row, 0 past the last row
  };

  Blocks(int64_t rows, int64_t cols_)
      : count(rows * ((cols_ + kBlock - 1) / kBlock)), cols(cols_), per_row((cols_ + kBlock - 1) / kBlock) {}

  __device__ __forceinline__ Span span(int64_t block) const {
    if (block >= count) return {0, 0};
    // Rows of whole blocks lie one after the other: no division.
    if (cols % kBlock == 0) return {block * kBlock, kBlock};
    const int64_t row = block / per_row;
    const int64_t first = (block - row * per_row) * kBlock;
    return {row * cols + first, static_cast<int>(min(cols - first, static_cast<int64_t>(kBlock)))};
  }
};

// How a warp covers blocks when each lane moves `Elements` neighbouring elements a step. All steps' loads
// are issued before the first is used.
template <int Elements>
struct Tiling {
  static constexpr int kSteps = 4;
  static constexpr int kLanesPerBlock = kBlock / Elements;
  static constexpr int kBlocksPerStep = 32 / kLanesPerBlock;
  static constexpr int kBlocksPerWarp = kBlocksPerStep * kSteps;
  static_assert(kLanesPerBlock <= 32 && kSteps <= kLanesPerBlock);
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Thread blocks that give each warp `blocks_per_warp` blocks.
inline int64_t grid_for(const Blocks& blocks, int blocks_per_warp) {
  const int64_t per_thread_block = static_cast<int64_t>(kWarps) * blocks_per_warp;
  return (blocks.count + per_thread_block - 1) / per_thread_block;
}

}  // namespace moe_ep::fp8
