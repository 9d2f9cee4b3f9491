#include "fp8/requantize_columns.h"

#include <cuda_pipeline.h>

#include <algorithm>

#include "fp8/checks.h"
#include "fp8/experts.cuh"
#include "fp8/turned_tile.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int kMostTiles = 8;          // of a thread block
constexpr int kMostColumns = 1 << 24;  // 128 rows have less than 2^32 bytes

// Brings tiles of some rows into shared memory, one 16-byte unit after the other, while other threads
// compute. A thread has the same units of every tile. Below the last row it comes again, which no column's
// largest magnitude notices.
class TileLoader {
 public:
  __device__ __forceinline__ TileLoader(const uint8_t* data, const float* scale_inv, int64_t cols,
                                        const RowTile& rows, int first_tile, int tiles_apart)
      : from_(data + rows.first * cols + first_tile * kBlock + column()), tiles_apart_(tiles_apart) {
    const int last = rows.rows - 1;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) offsets_[i] = static_cast<unsigned int>(min(row(i), last) * cols);
    const int scale_row = min(static_cast<int>(threadIdx.x % kBlock), last);
    scale_from_ = scale_inv + (rows.first + scale_row) * (cols / kBlock) + first_tile;
  }

  // Begins with the next tile.
  __device__ __forceinline__ void begin(QuantizedTile& tile) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      __pipeline_memcpy_async(tile.bytes.at(row(i), column()), from_ + offsets_[i], ByteTile::kUnit);
    }
    if (threadIdx.x < kBlock) {
      __pipeline_memcpy_async(&tile.scale_inv.of(threadIdx.x), scale_from_, sizeof(float));
    }
    __pipeline_commit();
    from_ += tiles_apart_ * kBlock;
    scale_from_ += tiles_apart_;
  }

 private:
  static constexpr int kRowsApart = kThreads / ByteTile::kUnits;
  static constexpr int kLoads = kBlock / kRowsApart;

  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x / ByteTile::kUnits) + i * kRowsApart;
  }
  static __device__ __forceinline__ int column() {
    return static_cast<int>(threadIdx.x % ByteTile::kUnits) * ByteTile::kUnit;
  }

  const uint8_t* from_;
  unsigned int offsets_[kLoads];
  const float* scale_from_;
  int tiles_apart_;
};

// Bound by HBM: 2 bytes moved per element. A thread block turns tiles of 128 rows by 128 columns, and loads
// one while it turns the one before. Blocks that run together have neighbouring tiles, and so read
// neighbouring bytes.
__global__ void __launch_bounds__(kThreads, 3)
    requantize_tiles(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv, Experts experts,
                     ColumnOutput out) {
  __shared__ QuantizedTile tiles[2];
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int column_tiles = static_cast<int>(out.cols / kBlock);
  const int apart = static_cast<int>(gridDim.x);
  TileLoader loader(data, scale_inv, out.cols, rows, static_cast<int>(blockIdx.x), apart);
  const ColumnWriter writer(out, rows, blockIdx.y);

  int current = 0;
  loader.begin(tiles[current]);
  for (int tile = static_cast<int>(blockIdx.x); tile < column_tiles; tile += apart) {
    __pipeline_wait_prior(0);
    __syncthreads();  // all have loaded this tile, and turned the one before
    if (tile + apart < column_tiles) loader.begin(tiles[1 - current]);
    writer.put(tiles[current], tile * kBlock);
    current = 1 - current;
  }
}

// Thread blocks for each row tile: few, but some for every multiprocessor.
int64_t blocks_per_row(int64_t column_tiles, int64_t row_tiles) {
  constexpr int64_t kEnoughBlocks = 1024;
  const int64_t most = std::min<int64_t>(kMostTiles, column_tiles * row_tiles / kEnoughBlocks);
  const int64_t tiles_per_block = std::max<int64_t>(1, most);
  return (column_tiles + tiles_per_block - 1) / tiles_per_block;
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
  if (cols > kMostColumns) {
    return Status::invalid("requantize_columns: cols must be at most %d, got %lld", kMostColumns,
                           static_cast<long long>(cols));
  }
  const int64_t column_tiles = cols / kBlock, row_tiles = launch.experts.max_tiles();
  const dim3 grid(static_cast<unsigned int>(blocks_per_row(column_tiles, row_tiles)),
                  static_cast<unsigned int>(row_tiles));
  const ColumnOutput out{launch.out, launch.out_scale_inv, cols};
  requantize_tiles<<<grid, kThreads, 0, launch.stream>>>(launch.data, launch.scale_inv, launch.experts, out);
  return Status::from_cuda(cudaGetLastError(), "launching requantize_columns");
}

}  // namespace moe_ep::fp8
