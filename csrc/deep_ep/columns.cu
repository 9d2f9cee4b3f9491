#include "deep_ep/columns.h"

#include <climits>

namespace moe_ep::deep_ep {
namespace {

constexpr int kTile = 32;        // rows, and numbers of a row
constexpr int kTileThreads = 8;  // times kTile

// Whether numbers lie column behind column.
__device__ bool lies_by_columns(const Numbers& numbers) {
  return numbers.row_step < numbers.column_step;
}

__device__ int load(const Numbers& numbers, int64_t row, int64_t column) {
  const int64_t at = row * numbers.row_step + column * numbers.column_step;
  switch (numbers.type) {
    case Number::int64:
      return static_cast<int>(static_cast<const int64_t*>(numbers.at)[at]);
    case Number::uint8:
      return static_cast<const uint8_t*>(numbers.at)[at];
    default:
      return static_cast<const int*>(numbers.at)[at];
  }
}

__device__ int local_id(const Column& column, int travelled) {
  const int id = travelled - 1 - column.first;
  return id >= 0 && id < column.count ? id : -1;
}

__device__ int number_of(const Column& column, int64_t row, int in_row) {
  if (row >= column.rows) return 0;
  const int value = load(column.from, row, in_row);
  switch (column.how) {
    case How::next:
      return value + 1;
    case How::place:
      return value ? in_row : -1;
    case How::local:
      return local_id(column, value);
    case How::masked:
      return local_id(column, load(column.ids, row, in_row)) >= 0 ? value : 0;
    default:
      return value;
  }
}

__host__ __device__ int64_t tiles_of(int64_t numbers) {
  return (numbers + kTile - 1) / kTile;
}

// Calls use(row, column) for this thread's places in a tile, neighbours in memory by neighbouring threads.
template <typename Use>
__device__ __forceinline__ void for_tile(bool by_columns, Use&& use) {
#pragma unroll
  for (int i = 0; i < kTile; i += kTileThreads) {
    const int across = threadIdx.y + i, along = threadIdx.x;
    by_columns ? use(along, across) : use(across, along);
  }
}

// A tile of one column for each block.
__global__ void __launch_bounds__(kTile* kTileThreads)
    fill_tiles(const __grid_constant__ FillColumns launch) {
  __shared__ int tile[kTile][kTile + 1];
  int64_t index = blockIdx.x;
  int chosen = 0;
  for (;; ++chosen) {
    const Column& column = launch.columns[chosen];
    const int64_t tiles = tiles_of(column.to_rows) * tiles_of(column.width);
    if (index < tiles) break;
    index -= tiles;
  }
  const Column& column = launch.columns[chosen];
  const int64_t tiles_in_row = tiles_of(column.width);
  const int64_t first_row = index / tiles_in_row * kTile;
  const int first = static_cast<int>(index % tiles_in_row) * kTile;
  for_tile(lies_by_columns(column.from), [&](int r, int c) {
    if (first_row + r < column.to_rows && first + c < column.width) {
      tile[r][c] = number_of(column, first_row + r, first + c);
    }
  });
  __syncthreads();
  for_tile(lies_by_columns(column.to), [&](int r, int c) {
    const int64_t row = first_row + r;
    if (row >= column.to_rows || first + c >= column.width) return;
    const int64_t at = row * column.to.row_step + (first + c) * column.to.column_step;
    if (column.to.type == Number::int64) {
      static_cast<int64_t*>(column.to.at)[at] = tile[r][c];
    } else {
      static_cast<int*>(column.to.at)[at] = tile[r][c];
    }
  });
}

}  // namespace

Status fill_columns(const FillColumns& launch) {
  int64_t tiles = 0;
  for (int i = 0; i < launch.num_columns; ++i) {
    const Column& column = launch.columns[i];
    if (column.to.type == Number::uint8) {
      return Status::invalid("column %d goes to 8-bit numbers; it can go to 32-bit and 64-bit ones", i);
    }
    tiles += tiles_of(column.to_rows) * tiles_of(column.width);
  }
  if (tiles > INT_MAX)
    return Status::invalid("the columns have %lld tiles; up to %d can be filled",
                           static_cast<long long>(tiles), INT_MAX);
  if (tiles == 0) return Status::ok();
  fill_tiles<<<static_cast<unsigned int>(tiles), dim3(kTile, kTileThreads), 0, launch.stream>>>(launch);
  return Status::from_cuda(cudaGetLastError(), "launching the kernel that fills columns");
}

}  // namespace moe_ep::deep_ep
