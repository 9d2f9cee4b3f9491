#include <cooperative_groups.h>

#include "common/vector.cuh"
#include "fp8/checks.h"
#include "fp8/turned_tile.cuh"
#include "swiglu/formulas.cuh"
#include "swiglu/swiglu.h"
#include "swiglu/vectors.cuh"

namespace moe_ep::swiglu {
namespace {

namespace cg = cooperative_groups;

// How a thread block goes over a tile of 128 x 128: a warp has 16 neighbouring rows, two a step.
template <typename T>
struct TileWalk {
  static constexpr int kRowsOfWarp = kBlock / kWarps;
  static constexpr int kRowsPerStep = 32 / Walk<T>::kLanesPerBlock;
  static constexpr int kSteps = kRowsOfWarp / kRowsPerStep;
};

// What a lane reads of one step. NOTE: kept as words; the compiler would take apart 16-bit numbers that live
// from one iteration to the next.
template <typename T>
struct Inputs {
  uint4 gate, up, grad;

  __device__ __forceinline__ void load(const T* gates, const T* grads, int width) {
    gate = __ldcs(reinterpret_cast<const uint4*>(gates));
    up = __ldcs(reinterpret_cast<const uint4*>(gates + width));
    grad = __ldcs(reinterpret_cast<const uint4*>(grads));
  }

  static __device__ __forceinline__ Elements<T> elements(const uint4& words) {
    Elements<T> elements;
    memcpy(&elements, &words, sizeof(words));
    return elements;
  }
};

// Of two 1x128 blocks that the same lanes have: half of the lanes work on each. `inverse` is that of the
// lane's.
struct TwoScales {
  float multiply[2];
  float inverse;
};

template <typename T>
__device__ __forceinline__ bool has_second() {
  return threadIdx.x % Walk<T>::kLanesPerBlock >= Walk<T>::kLanesPerBlock / 2;
}

template <typename T>
__device__ __forceinline__ TwoScales scales_of_blocks(const float (&first)[Walk<T>::kElements],
                                                      const float (&second)[Walk<T>::kElements]) {
  constexpr unsigned int kAllLanes = 0xFFFFFFFFu;
  constexpr int kHalf = Walk<T>::kLanesPerBlock / 2;
  float amax[2] = {};
#pragma unroll
  for (int i = 0; i < Walk<T>::kElements; ++i) {
    amax[0] = fmaxf(amax[0], fabsf(first[i]));
    amax[1] = fmaxf(amax[1], fabsf(second[i]));
  }
  const bool second_is_own = has_second<T>();
  const float given = second_is_own ? amax[0] : amax[1];
  const float own = fmaxf(second_is_own ? amax[1] : amax[0], __shfl_xor_sync(kAllLanes, given, kHalf));
  const fp8::Scale scale = fp8::scale_from_amax(max_over_lanes<kHalf>(own));
  const float other = __shfl_xor_sync(kAllLanes, scale.multiply, kHalf);
  return {{second_is_own ? other : scale.multiply, second_is_own ? scale.multiply : other}, scale.inverse};
}

// Differentiates tiles of 128 rows of an expert by 128 columns, quantises the rows of the two gradients, and
// then, from shared memory, their columns. Bound by HBM: an element is 10 bytes, as long as 75 instructions;
// it takes 60.
//
// A cluster has the tiles of the same rows, each thread block those of one class. So the sums for the router
// weights meet in the cluster, and blocks are enough for all multiprocessors.
template <typename T>
__global__ void __cluster_dims__(kClasses, 1, 1) __launch_bounds__(kThreads, 2)
    differentiate_tiles(const T* __restrict__ gate_up, const float* __restrict__ weights,
                        const T* __restrict__ grad_out, int width, fp8::Experts experts,
                        uint8_t* __restrict__ data, float* __restrict__ scale_inv, fp8::ColumnOutput columns,
                        float* __restrict__ grad_weights) {
  constexpr int kElements = Walk<T>::kElements, kLanes = Walk<T>::kLanesPerBlock;
  constexpr int kSteps = TileWalk<T>::kSteps, kRowsPerStep = TileWalk<T>::kRowsPerStep;
  constexpr int kAhead = 2;  // steps
  static_assert(kSteps % kAhead == 0);
  __shared__ fp8::QuantizedTile tiles[2];  // of gate, of up
  __shared__ float row_weights[kBlock], row_sums[kBlock];
  __shared__ float sums[kSteps][kThreads];  // each thread has its own

  const fp8::RowTile rows = fp8::find_tile(experts, blockIdx.y);
  if (rows.rows == 0) return;  // all of the cluster
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int own_row = static_cast<int>(threadIdx.x / 32) * TileWalk<T>::kRowsOfWarp + lane / kLanes;
  const int own_column = lane % kLanes * kElements;
  const int first_column = static_cast<int>(blockIdx.x) * kBlock;
  const int num_tiles = (width / kBlock - static_cast<int>(blockIdx.x) + kClasses - 1) / kClasses;
  // Counts are multiples of 16: a warp has all of its rows, or none.
  const bool has_rows = own_row < rows.rows && num_tiles > 0;

  // Rows lie `step_of_rows` numbers apart from one step to the next, in gate_up and in the results.
  const int64_t step_of_rows = static_cast<int64_t>(kRowsPerStep) * 2 * width;
  const int64_t own_first = (rows.first + own_row) * 2 * width + first_column + own_column;
  const T* gates = gate_up + own_first;  // from where to load next
  const T* grads = grad_out + (rows.first + own_row) * width + first_column + own_column;
  Inputs<T> inputs[kAhead];
  if (has_rows) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      inputs[i].load(gates + i * step_of_rows, grads + i * (step_of_rows / 2), width);
  }
  if (threadIdx.x < kBlock) {
    const bool weighted = weights != nullptr && static_cast<int>(threadIdx.x) < rows.rows;
    row_weights[threadIdx.x] = weighted ? weights[rows.first + threadIdx.x] : 1.0f;
  }
  for (int step = 0; step < kSteps; ++step) {
    sums[step][threadIdx.x] = 0.0f;
    for (fp8::QuantizedTile& tile : tiles) {
      const int row = own_row + step * kRowsPerStep;
      if (!has_rows) store(tile.bytes.at(row, own_column), Vector<uint8_t, kElements>{});
      if (!has_rows) tile.scale_inv.of(row) = 1.0f;
    }
  }

  const fp8::ColumnWriter writer(columns, rows, blockIdx.y);
  uint8_t* const tile_bytes = tiles[0].bytes.at(own_row, own_column);
  float* const tile_scale_inv = &tiles[has_second<T>()].scale_inv.of(own_row);
  const bool writes_scale = own_column % (kBlock / 2) == 0;
  for (int tile = 0; tile < num_tiles; ++tile) {
    const int column = tile * kClasses * kBlock;  // behind the first
    uint8_t* to = data + own_first + column;
    float* to_scale_inv = scale_inv + (own_first + column + (has_second<T>() ? width : 0)) / kBlock;
    __syncthreads();  // the tiles before have been turned
    if (has_rows) {
#pragma unroll 1
      for (int begin = 0; begin < kSteps; begin += kAhead) {
        const bool is_last = begin + kAhead == kSteps;  // of this tile: next are rows of the next one
        const int64_t further = is_last ? -(kSteps - kAhead) * step_of_rows : kAhead * step_of_rows;
        gates += further + (is_last ? kClasses * kBlock : 0);
        grads += further / 2 + (is_last ? kClasses * kBlock : 0);
        const bool has_next = !is_last || tile + 1 < num_tiles;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int row = (begin + i) * kRowsPerStep;  // behind the own one
          float& sum = sums[begin + i][threadIdx.x];
          float of_gate[kElements], of_up[kElements];
          sum = differentiate(inputs[i].elements(inputs[i].gate), inputs[i].elements(inputs[i].up),
                              inputs[i].elements(inputs[i].grad), row_weights[own_row + row], sum, of_gate,
                              of_up);
          if (has_next) inputs[i].load(gates + i * step_of_rows, grads + i * (step_of_rows / 2), width);

          const TwoScales scales = scales_of_blocks<T>(of_gate, of_up);
          const auto gate_bytes = fp8::quantize(of_gate, scales.multiply[0]);
          const auto up_bytes = fp8::quantize(of_up, scales.multiply[1]);
          store(to, gate_bytes);
          store(to + width, up_bytes);
          store(tile_bytes + row * kBlock, gate_bytes);
          store(tile_bytes + row * kBlock + sizeof(tiles[0]), up_bytes);
          if (writes_scale) *to_scale_inv = tile_scale_inv[row] = scales.inverse;
          to += step_of_rows;
          to_scale_inv += step_of_rows / kBlock;
        }
      }
    }
    __syncthreads();
    writer.put(tiles[0], first_column + column);
    writer.put(tiles[1], first_column + column + width);
  }
  if (grad_weights == nullptr) return;

  for (int step = 0; step < kSteps; ++step) {
    const float sum = add_over_lanes<T>(sums[step][threadIdx.x]);
    if (own_column == 0) row_sums[own_row + step * kRowsPerStep] = sum;
  }
  cg::cluster_group cluster = cg::this_cluster();
  cluster.sync();
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < rows.rows) {
    float classes[kClasses];
#pragma unroll
    for (int i = 0; i < kClasses; ++i) classes[i] = cluster.map_shared_rank(row_sums, i)[threadIdx.x];
    grad_weights[rows.first + threadIdx.x] = add_classes(classes[0], classes[1], classes[2], classes[3]);
  }
  cluster.sync();  // the others' shared memory is there until it has been read
}

template <typename T>
Status launch_as(const BackwardColumns& launch) {
  const Backward& rows = launch.rows;
  const dim3 grid(kClasses, static_cast<unsigned int>(launch.experts.max_tiles()));
  const fp8::ColumnOutput columns{launch.columns, launch.columns_scale_inv, 2 * rows.width};
  differentiate_tiles<T><<<grid, kThreads, 0, rows.stream>>>(
      static_cast<const T*>(rows.gate_up), rows.weights, static_cast<const T*>(rows.grad_out),
      static_cast<int>(rows.width), launch.experts, rows.data, rows.scale_inv, columns, rows.grad_weights);
  return Status::from_cuda(cudaGetLastError(), "launching swiglu_backward_columns");
}

}  // namespace

Status backward_with_columns(const BackwardColumns& launch) {
  constexpr const char* kName = "swiglu_backward_columns";
  const Backward& rows = launch.rows;
  const Status status =
      fp8::check_arguments(kName, rows.rows, rows.width,
                           {rows.gate_up, rows.grad_out, rows.data, rows.scale_inv, launch.columns,
                            launch.columns_scale_inv, launch.experts.counts},
                           "gate_up, grad_out, data, columns, their scales and counts");
  if (!status.is_ok() || rows.rows == 0 || rows.width == 0) return status;
  if (rows.width > kMostColumns || rows.width % kBlock != 0) {
    return Status::invalid("%s: width must be a multiple of 128 up to %d, got %lld", kName, kMostColumns,
                           static_cast<long long>(rows.width));
  }
  const Status tiled = fp8::check_tiles(kName, launch.experts, 2 * rows.width,
                                        {rows.gate_up, rows.grad_out, rows.data, launch.columns});
  if (!tiled.is_ok()) return tiled;
  switch (rows.dtype) {
    case DType::bfloat16:
      return launch_as<__nv_bfloat16>(launch);
    case DType::float16:
      return launch_as<__half>(launch);
    default:
      return Status::invalid("%s: dtype must be bfloat16 or float16, got float32", kName);
  }
}

}  // namespace moe_ep::swiglu
