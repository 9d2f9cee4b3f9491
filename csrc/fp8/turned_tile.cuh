#pragma once

#include <cstdint>

#include "common/vector.cuh"
#include "fp8/byte_tile.cuh"
#include "fp8/experts.cuh"
#include "fp8/formulas.cuh"

namespace moe_ep::fp8 {

// The scales of a tile's rows in shared memory. 16 rows, which one thread takes in column order, lie 20
// floats apart from the next 16: in other banks.
struct RowScales {
  static constexpr int kRows = ColumnShare::kRows, kStride = kRows + 4;

  alignas(16) float values[kBlock / kRows * kStride];

  __device__ __forceinline__ float& of(int row) { return values[row / kRows * kStride + row % kRows]; }
};

// A tile of rows in shared memory, quantised in 1x128 blocks.
struct QuantizedTile {
  ByteTile bytes;
  RowScales scale_inv;
};

// Where the columns of each expert's rows go: see RequantizeColumns.
struct ColumnOutput {
  uint8_t* data;
  float* scale_inv;
  int64_t cols;
};

// What a thread of 256 writes of the columns of a row tile.
class ColumnWriter {
 public:
  // `number` is that of `rows`.
  __device__ __forceinline__ ColumnWriter(const ColumnOutput& out, const RowTile& rows, int64_t number)
      : scale_inv_(out.scale_inv + number * out.cols + share_.column), has_rows_(share_.row < rows.rows) {
    const ColumnPlace place = place_of_columns(rows, number, out.cols);
    to_ = out.data + place.offset + share_.row;
    column_bytes_ = static_cast<unsigned int>(place.stride);
  }

  // The tile's 128 x 128 values turned, and quantised again in blocks of 128 rows of one column.
  //
  // An element takes 9 instructions, of 15 in the time of its two bytes. Two columns at a time are few
  // registers.
  __device__ __forceinline__ void put(QuantizedTile& tile, int first_column) const {
    const auto* words = reinterpret_cast<const unsigned int*>(tile.bytes.at(share_.row, share_.column));
    const float* row_scale_inv = &tile.scale_inv.of(share_.row);
    unsigned int quads[ColumnShare::kRows];
#pragma unroll
    for (int i = 0; i < ColumnShare::kRows; ++i) quads[i] = words[i * (kBlock / 4)];
    const auto column = static_cast<unsigned int>(first_column + share_.column);
    uint8_t* to = to_ + static_cast<uint64_t>(column) * column_bytes_;
#pragma unroll
    for (int pair = 0; pair < ColumnShare::kColumns / 2; ++pair) {
      float values[2][ColumnShare::kRows];
      float amax[2] = {};
#pragma unroll
      for (int i = 0; i < ColumnShare::kRows; ++i) {
        const float2 two = to_float2(quads[i], pair);
        values[0][i] = __fmul_rn(two.x, row_scale_inv[i]);
        values[1][i] = __fmul_rn(two.y, row_scale_inv[i]);
        amax[0] = fmaxf(amax[0], fabsf(values[0][i]));
        amax[1] = fmaxf(amax[1], fabsf(values[1][i]));
      }
      Vector<float, 2> inverse;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Scale scale = scale_from_amax(max_over_column(amax[c]));
        inverse.at[c] = scale.inverse;
        if (has_rows_) {
          store(to, quantize(values[c], scale.multiply));
        } else {
          store(to, Vector<uint8_t, ColumnShare::kRows>{});
        }
        to += column_bytes_;
      }
      if (share_.row == 0) store(scale_inv_ + first_column + 2 * pair, inverse);
    }
  }

 private:
  ColumnShare share_;
  uint8_t* to_;  // the thread's rows of the expert's first column
  float* scale_inv_;
  unsigned int column_bytes_;
  bool has_rows_;  // counts are multiples of 16: all of a thread's rows, or none
};

}  // namespace moe_ep::fp8
