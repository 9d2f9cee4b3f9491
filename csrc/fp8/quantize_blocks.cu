#include "fp8/quantize_blocks.h"

#include <type_traits>

#include "fp8/checks.h"
#include "fp8/turn.cuh"

namespace moe_ep::fp8 {
namespace {

// One block of 128 x 128: blockIdx is (block of columns, block of rows, matrix).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_block(const T* __restrict__ x, int64_t rows, int64_t cols, uint8_t* __restrict__ data,
                   float* __restrict__ scale_inv, int64_t scale_stride, uint8_t* __restrict__ transposed,
                   float* __restrict__ transposed_scale_inv, int64_t transposed_scale_stride) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kLanesPerRow = kBlock / kElements;
  constexpr int kRowsPerLoad = kThreads / kLanesPerRow;
  constexpr int kLoads = kBlock / kRowsPerLoad;
  __shared__ ByteTile tile;
  __shared__ float warp_amax[kWarps];

  const int64_t matrix = blockIdx.z;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kBlock;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kBlock;
  const int own_row = threadIdx.x / kLanesPerRow;
  const int own_column = threadIdx.x % kLanesPerRow * kElements;
  const int64_t offset = (matrix * rows + first_row + own_row) * cols + first_column + own_column;

  Vector<T, kElements> loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    loaded[i] = load_once<T, kElements>(x + offset + static_cast<int64_t>(i) * kRowsPerLoad * cols);
  }
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kLoads; ++i) amax = fmaxf(amax, amax_of(loaded[i]));
  amax = max_over_lanes<32>(amax);
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
  amax = max_over_lanes<kWarps>(warp_amax[threadIdx.x % kWarps]);
  const Scale scale = scale_from_amax(amax);

#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    float values[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = moe_ep::to_float(loaded[i].at[j]);
    const Vector<uint8_t, kElements> bytes = quantize(values, scale.multiply);
    if (data != nullptr) store(data + offset + static_cast<int64_t>(i) * kRowsPerLoad * cols, bytes);
    if (transposed != nullptr) store(tile.at(own_row + i * kRowsPerLoad, own_column), bytes);
  }
  if (threadIdx.x == 0) {
    const int64_t row_blocks = rows / kBlock, column_blocks = cols / kBlock;
    if (data != nullptr) {
      scale_inv[(matrix * row_blocks + blockIdx.y) * scale_stride + blockIdx.x] = scale.inverse;
    }
    if (transposed != nullptr) {
      transposed_scale_inv[(matrix * column_blocks + blockIdx.x) * transposed_scale_stride + blockIdx.y] =
          scale.inverse;
    }
  }
  if (transposed == nullptr) return;
  __syncthreads();

  store_turned(tile, ColumnShare(), transposed + (matrix * cols + first_column) * rows + first_row, rows);
}

template <typename T>
Status launch_as(const QuantizeBlocks& launch) {
  const dim3 grid(static_cast<unsigned int>(launch.cols / kBlock),
                  static_cast<unsigned int>(launch.rows / kBlock),
                  static_cast<unsigned int>(launch.matrices));
  quantize_block<T><<<grid, kThreads, 0, launch.stream>>>(
      static_cast<const T*>(launch.x), launch.rows, launch.cols, launch.data, launch.scale_inv,
      launch.scale_stride, launch.transposed, launch.transposed_scale_inv, launch.transposed_scale_stride);
  return Status::from_cuda(cudaGetLastError(), "launching quantize_blocks");
}

}  // namespace

Status quantize_blocks(const QuantizeBlocks& launch) {
  constexpr int64_t kMost = 65535;  // blocks of a grid along y and z
  const long long shape[] = {launch.matrices, launch.rows, launch.cols};
  if (launch.rows % kBlock != 0 || launch.cols % kBlock != 0 || launch.rows / kBlock > kMost ||
      launch.matrices < 0 || launch.matrices > kMost) {
    return Status::invalid(
        "quantize_blocks: up to 65535 matrices of multiples of 128 are allowed, got %lld of %lld x %lld",
        shape[0], shape[1], shape[2]);
  }
  const bool turns = launch.transposed != nullptr;
  const Status status = check_arguments("quantize_blocks", launch.matrices * launch.rows, launch.cols,
                                        {launch.x, turns ? launch.transposed : launch.data,
                                         turns ? launch.transposed_scale_inv : launch.scale_inv},
                                        "x, data and scale_inv");
  if (!status.is_ok() || launch.matrices * launch.rows * launch.cols == 0) return status;
  for (const void* pointer :
       {launch.x, static_cast<const void*>(launch.data), static_cast<const void*>(launch.transposed)}) {
    if (!is_aligned(pointer, 16)) return Status::invalid("quantize_blocks: data must be 16-byte aligned");
  }
  return for_dtype(launch.dtype,
                   [&](auto* type) { return launch_as<std::remove_pointer_t<decltype(type)>>(launch); });
}

}  // namespace moe_ep::fp8
