#pragma once

#include <cstdint>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/formulas.cuh"

namespace moe_ep::swiglu {

using fp8::kBlock;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostColumns = 1 << 30;

// How warps go over rows: a lane has 16 bytes of a step, neighbouring elements.
template <typename T>
struct Walk {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kLanesPerBlock = kBlock / kElements;
  static constexpr int kStep = 32 * kElements;
};

template <typename T>
using Elements = Vector<T, Walk<T>::kElements>;

// Of the 1x128 block of which each lane has `values`; every lane of a warp calls it.
template <typename T>
__device__ __forceinline__ fp8::Scale scale_of_block(const float (&values)[Walk<T>::kElements]) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < Walk<T>::kElements; ++i) amax = fmaxf(amax, fabsf(values[i]));
  return fp8::scale_from_amax(max_over_lanes<Walk<T>::kLanesPerBlock>(amax));
}

// The gradient of a row's weight is a sum over the row. Each of four classes of blocks (block number modulo
// 4) is a sum by lanes: a lane adds up its elements of a block and goes on to the next block; then the lanes
// are added in pairs, neighbours first. (class 0 + class 1) + (class 2 + class 3) is the gradient. Thus
// kernels that share out the blocks of a row differently get the same bits.
constexpr int kClasses = 4;

__device__ __forceinline__ float add_classes(float class0, float class1, float class2, float class3) {
  return __fadd_rn(__fadd_rn(class0, class1), __fadd_rn(class2, class3));
}

// Over the lanes that share a block; each of them gets it.
template <typename T>
__device__ __forceinline__ float add_over_lanes(float sum) {
#pragma unroll
  for (int distance = 1; distance < Walk<T>::kLanesPerBlock; distance *= 2) {
    sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, distance));
  }
  return sum;
}

// For a warp that has whole rows: the sums of a lane's classes, one for each step of 4 blocks.
template <typename T, int kSteps>
__device__ __forceinline__ float add_classes(const float (&sums)[kSteps]) {
  static_assert(kSteps == kClasses * kBlock / Walk<T>::kStep && (kSteps == 2 || kSteps == 4));
  float classes[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) classes[step] = add_over_lanes<T>(sums[step]);
  if constexpr (kSteps == 4) {
    return add_classes(classes[0], classes[1], classes[2], classes[3]);
  } else {
    const float other0 = __shfl_xor_sync(0xFFFFFFFFu, classes[0], 16);
    const float other1 = __shfl_xor_sync(0xFFFFFFFFu, classes[1], 16);
    return add_classes(classes[0], other0, classes[1], other1);
  }
}

}  // namespace moe_ep::swiglu
