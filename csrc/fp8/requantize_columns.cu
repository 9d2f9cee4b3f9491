#include "fp8/requantize_columns.h"

#include "fp8/byte_tile.cuh"
#include "fp8/checks.h"
#include "fp8/experts.cuh"

namespace moe_ep::fp8 {
namespace {

// Bound by HBM: 2 bytes moved per element. A thread block turns a tile of 128 rows by 128 columns.
__global__ void __launch_bounds__(kThreads)
    requantize_tiles(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv, int64_t cols,
                     Experts experts, uint8_t* __restrict__ out, float* __restrict__ out_scale_inv) {
  __shared__ ByteTile tile;
  __shared__ float row_scale_inv[kBlock];
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kBlock;

  constexpr int kLoads = kBlock * ByteTile::kUnits / kThreads;
  Vector<uint8_t, 16> loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = (threadIdx.x + i * kThreads) / ByteTile::kUnits;
    const int column = threadIdx.x % ByteTile::kUnits * ByteTile::kUnit;
    loaded[i] = {};
    if (row < rows.rows) {
      loaded[i] = load_once<uint8_t, 16>(data + (rows.first + row) * cols + first_column + column);
    }
  }
  if (threadIdx.x < kBlock) {
    const bool there = static_cast<int>(threadIdx.x) < rows.rows;
    const int64_t at = (rows.first + threadIdx.x) * (cols / kBlock) + blockIdx.x;
    row_scale_inv[threadIdx.x] = there ? scale_inv[at] : 1.0f;
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int row = (threadIdx.x + i * kThreads) / ByteTile::kUnits;
    store(tile.at(row, threadIdx.x % ByteTile::kUnits * ByteTile::kUnit), loaded[i]);
  }
  __syncthreads();

  const ColumnShare share;
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
  const dim3 grid(static_cast<unsigned int>(cols / kBlock),
                  static_cast<unsigned int>(launch.experts.max_tiles()));
  requantize_tiles<<<grid, kThreads, 0, launch.stream>>>(launch.data, launch.scale_inv, cols, launch.experts,
                                                         launch.out, launch.out_scale_inv);
  return Status::from_cuda(cudaGetLastError(), "launching requantize_columns");
}

}  // namespace moe_ep::fp8
