#include "fp8/requantize_columns.h"

#include <algorithm>

#include "fp8/byte_tile.cuh"
#include "fp8/checks.h"
#include "fp8/experts.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int kMostTiles = 8;  // of a thread block
constexpr int kRowsPerLoad = kThreads / ByteTile::kUnits;
constexpr int kLoads = kBlock / kRowsPerLoad;

// Where the scale of a tile's row is kept: 16 rows, which one thread takes in column order, lie 20 floats
// apart from the next 16, in other banks.
__device__ __forceinline__ int scale_index(int row) {
  return row / ColumnShare::kRows * (ColumnShare::kRows + 4) + row % ColumnShare::kRows;
}

struct Tile {
  ByteTile bytes;
  alignas(16) float scale_inv[kBlock / ColumnShare::kRows * (ColumnShare::kRows + 4)];
};

// What a thread loads of one tile after the other, side by side: 16 bytes each of rows `kRowsPerLoad` apart,
// and a row's scale. Zeros below the last row.
class Loader {
 public:
  __device__ __forceinline__ Loader(const uint8_t* data, const float* scale_inv, int64_t cols,
                                    const RowTile& rows, int first_tile)
      : from_(data + (rows.first + row(0)) * cols + first_tile * kBlock + column()),
        scale_from_(scale_inv + (rows.first + threadIdx.x % kBlock) * (cols / kBlock) + first_tile),
        rows_apart_(kRowsPerLoad * cols),
        rows_(rows.rows) {}

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      units_[i] = make_uint4(0, 0, 0, 0);
      if (row(i) < rows_) units_[i] = __ldcs(reinterpret_cast<const uint4*>(from_ + i * rows_apart_));
    }
    scale_inv_ = static_cast<int>(threadIdx.x % kBlock) < rows_ ? *scale_from_ : 1.0f;
    from_ += kBlock;
    ++scale_from_;
  }

  __device__ __forceinline__ void store_into(Tile& tile) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      *reinterpret_cast<uint4*>(tile.bytes.at(row(i), column())) = units_[i];
    }
    if (threadIdx.x < kBlock) tile.scale_inv[scale_index(static_cast<int>(threadIdx.x))] = scale_inv_;
  }

 private:
  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x / ByteTile::kUnits) + i * kRowsPerLoad;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x % ByteTile::kUnits) * ByteTile::kUnit;
  }

  const uint8_t* from_;
  const float* scale_from_;
  int64_t rows_apart_;
  int rows_;
  uint4 units_[kLoads];  // NOTE: of a vector of bytes the compiler would make single bytes
  float scale_inv_;
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

  Loader loader(data, scale_inv, cols, rows, first_tile);
  loader.load();
  for (int column_tile = first_tile; column_tile < end_tile; ++column_tile) {
    __syncthreads();  // the tile before has been turned
    loader.store_into(tile);
    if (column_tile + 1 < end_tile) loader.load();
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
  requantize<<<grid, kThreads, 0, launch.stream>>>(launch.data, launch.scale_inv, cols, per_block,
                                                   launch.experts, launch.out, launch.out_scale_inv);
  return Status::from_cuda(cudaGetLastError(), "launching requantize_columns");
}

}  // namespace moe_ep::fp8
