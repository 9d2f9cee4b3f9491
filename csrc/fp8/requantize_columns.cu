#include "fp8/requantize_columns.h"

#include <algorithm>

#include "fp8/byte_tile.cuh"
#include "fp8/checks.h"
#include "fp8/experts.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int kMostTiles = 8;  // of a thread block
constexpr int kLoads = kBlock * ByteTile::kUnits / kThreads;

// What a thread loads of a tile: 16 bytes each of rows `kThreads / ByteTile::kUnits` apart, and a row's
// scale.
struct Loaded {
  Vector<uint8_t, 16> units[kLoads];
  float scale_inv;

  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x + i * kThreads) / ByteTile::kUnits;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x) % ByteTile::kUnits * ByteTile::kUnit;
  }

  __device__ __forceinline__ void load(const uint8_t* data, const float* scale_inv_of, int64_t cols,
                                       const RowTile& rows, int column_tile) {
    const int64_t first_column = static_cast<int64_t>(column_tile) * kBlock;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      units[i] = {};
      if (row(i) < rows.rows)
        units[i] = load_once<uint8_t, 16>(data + (rows.first + row(i)) * cols + first_column + column());
    }
    scale_inv = 1.0f;
    if (static_cast<int>(threadIdx.x) < rows.rows)
      scale_inv = scale_inv_of[(rows.first + threadIdx.x) * (cols / kBlock) + column_tile];
  }
};

// Bound by HBM: 2 bytes moved per element. A thread block turns tiles of 128 rows by 128 columns, side by
// side, and loads one while it turns the one before.
__global__ void __launch_bounds__(kThreads, 2)
    requantize_tiles(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv, int64_t cols,
                     int tiles_per_block, Experts experts, uint8_t* __restrict__ out,
                     float* __restrict__ out_scale_inv) {
  __shared__ ByteTile tile;
  __shared__ float row_scale_inv[kBlock];
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int column_tiles = static_cast<int>(cols / kBlock);
  const int first_tile = static_cast<int>(blockIdx.x) * tiles_per_block;
  const int end_tile = min(first_tile + tiles_per_block, column_tiles);
  const ColumnShare share;

  Loaded loaded;
  loaded.load(data, scale_inv, cols, rows, first_tile);
  for (int column_tile = first_tile; column_tile < end_tile; ++column_tile) {
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store(tile.at(Loaded::row(i), Loaded::column()), loaded.units[i]);
    if (threadIdx.x < kBlock) row_scale_inv[threadIdx.x] = loaded.scale_inv;
    __syncthreads();
    if (column_tile + 1 < end_tile) loaded.load(data, scale_inv, cols, rows, column_tile + 1);

    const int64_t first_column = static_cast<int64_t>(column_tile) * kBlock;
    float values[ColumnShare::kColumns][ColumnShare::kRows];
    float amax[ColumnShare::kColumns] = {};
#pragma unroll
    for (int i = 0; i < ColumnShare::kRows; ++i) {
      const unsigned int word = tile.word(share.row + i, share.column);
      const float row_scale = row_scale_inv[share.row + i];
      const float2 low = to_float2(static_cast<__nv_fp8x2_storage_t>(word & 0xFFFFu));
      const float2 high = to_float2(static_cast<__nv_fp8x2_storage_t>(word >> 16));
      values[0][i] = __fmul_rn(low.x, row_scale);
      values[1][i] = __fmul_rn(low.y, row_scale);
      values[2][i] = __fmul_rn(high.x, row_scale);
      values[3][i] = __fmul_rn(high.y, row_scale);
#pragma unroll
      for (int c = 0; c < ColumnShare::kColumns; ++c) amax[c] = fmaxf(amax[c], fabsf(values[c][i]));
    }
    uint8_t* column_out = out + rows.expert_first * cols + (first_column + share.column) * rows.expert_rows +
                          (rows.first - rows.expert_first) + share.row;
    Vector<float, ColumnShare::kColumns> inverse;
#pragma unroll
    for (int c = 0; c < ColumnShare::kColumns; ++c) {
      const Scale scale = scale_from_amax(max_over_column(amax[c]));
      inverse.at[c] = scale.inverse;
      if (share.row < rows.rows) {
        store(column_out + c * rows.expert_rows, quantize(values[c], scale.multiply));
      }
    }
    if (share.row == 0) store(out_scale_inv + blockIdx.y * cols + first_column + share.column, inverse);
  }
}

// Column tiles for each thread block: as many as leave every multiprocessor some blocks.
int tiles_per_block(int64_t column_tiles, int64_t row_tiles) {
  constexpr int64_t kEnoughBlocks = 1024;
  const int64_t most = std::min<int64_t>(kMostTiles, column_tiles * row_tiles / kEnoughBlocks);
  return static_cast<int>(std::max<int64_t>(1, most));
}

}  // namespace

Status requantize_columns(const RequantizeColumns& launch) {
  const int64_t rows = launch.experts.rows, cols = launch.cols;
  const Status status = check_arguments(
      "requantize_columns", rows, cols,
      {launch.data, launch.scale_inv, launch.experts.counts, launch.out, launch.out_scale_inv},
      "data, scale_inv, counts, out and out_scale_inv");
  if (!status.is_ok() || rows == 0 || cols == 0) return status;
  const Status tiled = check_tiles("requantize_columns", launch.experts, cols, {launch.data, launch.out});
  if (!tiled.is_ok()) return tiled;
  const int64_t column_tiles = cols / kBlock, row_tiles = launch.experts.max_tiles();
  const int per_block = tiles_per_block(column_tiles, row_tiles);
  const dim3 grid(static_cast<unsigned int>((column_tiles + per_block - 1) / per_block),
                  static_cast<unsigned int>(row_tiles));
  requantize_tiles<<<grid, kThreads, 0, launch.stream>>>(launch.data, launch.scale_inv, cols, per_block,
                                                         launch.experts, launch.out, launch.out_scale_inv);
  return Status::from_cuda(cudaGetLastError(), "launching requantize_columns");
}

}  // namespace moe_ep::fp8
