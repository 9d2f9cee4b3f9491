#pragma once

#include <cstdint>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/formulas.cuh"

namespace moe_ep::fp8 {

// A tile of 128 x 128 bytes in shared memory, on its way from row order to column order.
//
// Reading down the columns, the lanes of a warp take 8 groups of 16 rows times 4 neighbouring words. Rows are
// 32 words apart, so in plain order the groups would share their banks. Therefore 16-byte unit `u` of row `r`
// lies at unit u ^ (r / 16) of that row.
struct ByteTile {
  static constexpr int kUnit = 16;
  static constexpr int kUnits = kBlock / kUnit;

  alignas(16) uint8_t bytes[kBlock * kBlock];

  __device__ __forceinline__ uint8_t* at(int row, int column) {
    const int unit = (column / kUnit) ^ (row / kUnit);
    return bytes + row * kBlock + unit * kUnit + column % kUnit;
  }

  __device__ __forceinline__ unsigned int word(int row, int column) {
    return *reinterpret_cast<const unsigned int*>(at(row, column));
  }
};

// What a thread of 256 does with a tile in column order: 16 rows of 4 columns.
struct ColumnShare {
  static constexpr int kColumns = 4;
  static constexpr int kRows = 16;
  int column;  // the first
  int row;     // the first

  __device__ __forceinline__ ColumnShare()
      : column(static_cast<int>(threadIdx.x / 32 * 16 + threadIdx.x % 4 * kColumns)),
        row(static_cast<int>(threadIdx.x % 32 / 4 * kRows)) {}
};

// The largest value among the 8 lanes that share columns, given to each of them; NaN is ignored.
__device__ __forceinline__ float max_over_column(float value) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, distance));
  }
  return value;
}

}  // namespace moe_ep::fp8
