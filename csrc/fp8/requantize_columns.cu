#include "fp8/formulas.cuh"
#include "fp8/tile_source.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int64_t kEnoughBlocks = 1024;

// Where the scale of a tile's row is kept: 16 rows, which one thread takes in column order, lie 20 floats
// apart from the next 16, in other banks.
__device__ __forceinline__ int scale_index(int row) {
  return row / ColumnShare::kRows * (ColumnShare::kRows + 4) + row % ColumnShare::kRows;
}

struct Tile {
  ByteTile bytes;
  alignas(16) float scale_inv[kBlock / ColumnShare::kRows * (ColumnShare::kRows + 4)];
};

// Bound by HBM: 2 bytes moved per element. A thread block turns tiles of 128 rows by 128 columns, side by
// side, and loads one while it turns the one before. Two blocks on a multiprocessor have registers for that;
// more would have to put some of them into memory.
__global__ void __launch_bounds__(kThreads, 2)
    requantize(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv, int64_t cols,
               int tiles_per_block, Experts experts, uint8_t* __restrict__ out,
               float* __restrict__ out_scale_inv) {
  constexpr int kRows = ColumnShare::kRows, kColumns = ColumnShare::kColumns;
  __shared__ Tile tile;
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int column_tiles = static_cast<int>(cols / kBlock);
  const int first_tile = static_cast<int>(blockIdx.x) * tiles_per_block;
  const int end_tile = min(first_tile + tiles_per_block, column_tiles);
  const ColumnShare share;
  const float* const row_scale_inv = tile.scale_inv + scale_index(share.row);
  const ColumnPlace place = place_of_columns(rows, blockIdx.y, cols);
  uint8_t* to = out + place.offset + (first_tile * kBlock + share.column) * place.stride + share.row;
  float* scale_to =
      out_scale_inv + static_cast<int64_t>(blockIdx.y) * cols + first_tile * kBlock + share.column;

  TileSource source(data, scale_inv, cols, rows, first_tile);
  Loaded loaded;
  source.load(loaded);
  for (int column_tile = first_tile; column_tile < end_tile; ++column_tile) {
    __syncthreads();  // the tile before has been turned
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = own_row() + i * kRowsPerLoad;
      *reinterpret_cast<uint4*>(tile.bytes.at(row, own_column())) = loaded.units[i];
      if (own_column() == 0) tile.scale_inv[scale_index(row)] = loaded.scale_inv[i];
    }
    if (column_tile + 1 < end_tile) source.load(loaded);
    __syncthreads();

    float values[kColumns][kRows];
    float amax[kColumns] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const unsigned int word = tile.bytes.word(share.row + i, share.column);
      const float2 low = to_float2(static_cast<__nv_fp8x2_storage_t>(word & 0xFFFFu));
      const float2 high = to_float2(static_cast<__nv_fp8x2_storage_t>(word >> 16));
      values[0][i] = __fmul_rn(low.x, row_scale_inv[i]);
      values[1][i] = __fmul_rn(low.y, row_scale_inv[i]);
      values[2][i] = __fmul_rn(high.x, row_scale_inv[i]);
      values[3][i] = __fmul_rn(high.y, row_scale_inv[i]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) amax[c] = fmaxf(amax[c], fabsf(values[c][i]));
    }
    Vector<float, kColumns> inverse;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Scale scale = scale_from_amax(max_over_column(amax[c]));
      inverse.at[c] = scale.inverse;
      store(to + c * place.stride, quantize(values[c], scale.multiply));
    }
    if (share.row == 0) store(scale_to, inverse);
    to += kBlock * place.stride;
    scale_to += kBlock;
  }
}

}  // namespace

Status requantize_columns(const Requantize& launch) {
  return launch_over_tiles("requantize_columns", launch, kEnoughBlocks, requantize);
}

}  // namespace moe_ep::fp8
