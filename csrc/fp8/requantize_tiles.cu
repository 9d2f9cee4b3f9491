#include "fp8/formulas.cuh"
#include "fp8/tile_source.cuh"
#include "fp8/turn.cuh"

namespace moe_ep::fp8 {
namespace {

constexpr int64_t kEnoughBlocks = 2048;

__device__ __forceinline__ bool is_zero(uint4 unit) {
  return ((unit.x | unit.y | unit.z | unit.w) & 0x7F7F7F7Fu) == 0;
}

// Each byte's value times `factor`, which is at most 1 where there are others than zeros.
__device__ __forceinline__ unsigned int scaled(unsigned int word, float factor) {
  const float2 low = to_float2(static_cast<__nv_fp8x2_storage_t>(word & 0xFFFFu));
  const float2 high = to_float2(static_cast<__nv_fp8x2_storage_t>(word >> 16));
  return to_bytes(__fmul_rn(low.x, factor), __fmul_rn(low.y, factor), __fmul_rn(high.x, factor),
                  __fmul_rn(high.y, factor));
}

// Where the expert's scales begin: all experts before it have a multiple of 4 for each block of columns.
// Every lane of a warp calls it and gets the answer.
__device__ __forceinline__ int64_t padded_tiles(int64_t rows) {
  return (rows + 4 * kBlock - 1) / (4 * kBlock) * 4;
}

__device__ __forceinline__ int64_t padded_tiles_before(const Experts& experts, int expert) {
  int64_t sum = 0;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < expert; e += 32)
    sum += padded_tiles(experts.counts[e]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  return sum;
}

// Bound by HBM: 2 bytes moved per element. A thread block turns tiles side by side, and loads one while it
// turns the one before.
__global__ void __launch_bounds__(kThreads, 4)
    requantize(const uint8_t* __restrict__ data, const float* __restrict__ scale_inv, int64_t cols,
               int tiles_per_block, Experts experts, uint8_t* __restrict__ out,
               float* __restrict__ out_scale_inv) {
  __shared__ ByteTile tile;
  __shared__ float largest_of_warp[kWarps];
  const RowTile rows = find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;
  const int column_tiles = static_cast<int>(cols / kBlock);
  const int first_tile = static_cast<int>(blockIdx.x) * tiles_per_block;
  const int end_tile = min(first_tile + tiles_per_block, column_tiles);
  const int64_t scale_width = padded_tiles(rows.expert_rows);
  float* const scale_out = out_scale_inv + padded_tiles_before(experts, rows.expert) * column_tiles +
                           (rows.first - rows.expert_first) / kBlock;
  const ColumnPlace place = place_of_columns(rows, blockIdx.y, cols);
  uint8_t* rows_out = out + place.offset + static_cast<int64_t>(first_tile) * kBlock * place.stride;
  const ColumnShare share;

  TileSource source(data, scale_inv, cols, rows, first_tile);
  Loaded loaded;
  source.load(loaded);
  for (int column_tile = first_tile; column_tile < end_tile; ++column_tile) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!is_zero(loaded.units[i])) largest = fmaxf(largest, loaded.scale_inv[i]);
    }
    largest = max_over_lanes<32>(largest);
    if (threadIdx.x % 32 == 0) largest_of_warp[threadIdx.x / 32] = largest;
    __syncthreads();  // and the tile before has been read
    largest = max_over_lanes<kWarps>(largest_of_warp[threadIdx.x % kWarps]);
    if (largest == 0.0f) largest = 1.0f;
    const float reciprocal = __frcp_rn(largest);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float factor = __fmul_rn(loaded.scale_inv[i], reciprocal);
      uint4 unit = loaded.units[i];
      if (factor != 1.0f) {
        unit = make_uint4(scaled(unit.x, factor), scaled(unit.y, factor), scaled(unit.z, factor),
                          scaled(unit.w, factor));
      }
      *reinterpret_cast<uint4*>(tile.at(own_row() + i * kRowsPerLoad, own_column())) = unit;
    }
    __syncthreads();
    if (column_tile + 1 < end_tile) source.load(loaded);
    if (threadIdx.x == 0) scale_out[column_tile * scale_width] = largest;
    store_turned(tile, share, rows_out, place.stride);
    rows_out += kBlock * place.stride;
  }
}

}  // namespace

Status requantize_tiles(const Requantize& launch) {
  return launch_over_tiles("requantize_tiles", launch, kEnoughBlocks, requantize);
}

}  // namespace moe_ep::fp8
