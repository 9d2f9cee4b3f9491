#include "fp8/transpose_scales.h"

#include "fp8/checks.h"
#include "fp8/experts.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int kColumns = 32;  // scales of a row that a thread block turns at once

__global__ void __launch_bounds__(kThreads)
    transpose_tiles(const float* __restrict__ scale_inv, int64_t blocks, Experts experts,
                    float* __restrict__ out) {
  __shared__ float tile[kBlock][kColumns + 1];
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int columns = static_cast<int>(min(blocks - first_column, static_cast<int64_t>(kColumns)));

  for (int row = threadIdx.x / kColumns; row < rows.rows; row += kThreads / kColumns) {
    const int column = threadIdx.x % kColumns;
    if (column < columns) tile[row][column] = scale_inv[(rows.first + row) * blocks + first_column + column];
  }
  __syncthreads();
  float* expert_out = out + rows.expert_first * blocks + (rows.first - rows.expert_first);
  const int row = threadIdx.x % kBlock;
  if (row >= rows.rows) return;
  for (int column = threadIdx.x / kBlock; column < columns; column += kThreads / kBlock) {
    expert_out[(first_column + column) * rows.expert_rows + row] = tile[row][column];
  }
}

}  // namespace

Status transpose_scales(const TransposeScales& launch) {
  const Experts& experts = launch.experts;
  const Status status =
      check_arguments("transpose_scales", experts.rows, launch.blocks,
                      {launch.scale_inv, experts.counts, launch.out}, "scale_inv, counts and out");
  if (!status.is_ok() || experts.rows == 0 || launch.blocks == 0) return status;
  const Status tiled = check_tiles("transpose_scales", experts, 0, {});
  if (!tiled.is_ok()) return tiled;
  const dim3 grid(static_cast<unsigned int>((launch.blocks + kColumns - 1) / kColumns),
                  static_cast<unsigned int>(experts.max_tiles()));
  transpose_tiles<<<grid, kThreads, 0, launch.stream>>>(launch.scale_inv, launch.blocks, experts, launch.out);
  return Status::from_cuda(cudaGetLastError(), "launching transpose_scales");
}

}  // namespace moe_ep::fp8
