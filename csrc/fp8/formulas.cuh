#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/vector.cuh"

namespace moe_ep::fp8 {

// The arithmetic of Transformer Engine's Float8BlockScaling recipe (E4M3, power-of-two scales, amax epsilon
// 0), bit for bit: compute_scale_from_amax in its common/recipe/recipe_common.cuh. moe_ep.fp8 states the same
// in torch. NOTE: needs subnormals: never build with fast math.

struct Scale {
  float multiply;  // by this when quantising
  float inverse;   // by this when dequantising: the scale_inv that travels with the data
};

// The scale of a block whose largest magnitude is `amax`; a block of zeros or with an Inf gets 1.
//
// The recipe divides 448 by amax, rounds to float32, replaces Inf by the largest finite value and rounds down
// to a power of two. With 448 = 1.75 * 2^8 and amax = m * 2^e that is 2^(8 - e), or half of it where m
// > 1.75, and at most 2^127: the quotient just below a power of two never rounds up to it, since 1.75 is a
// float32 and the next m gives 1 - 2^-23 / 1.75, which is nearer to 1 - 2^-24 than to 1. So no division is
// needed, which would cost more than the memory traffic.
__device__ __forceinline__ Scale scale_from_amax(float amax) {
  constexpr unsigned int kExponent = 0x7F800000u, kMantissa = 0x007FFFFFu, kMantissaOf1_75 = 0x00600000u;
  const unsigned int bits = __float_as_uint(amax);
  if (bits == 0 || bits >= kExponent) return {1.0f, 1.0f};
  const int biased = 262 - static_cast<int>(bits >> 23) - ((bits & kMantissa) > kMantissaOf1_75);
  const int exponent = min(biased, 254);
  const unsigned int inverse =
      exponent == 254 ? 0x00400000u : static_cast<unsigned int>(254 - exponent) << 23;
  return {__uint_as_float(static_cast<unsigned int>(exponent) << 23), __uint_as_float(inverse)};
}

// The largest magnitude among N elements; NaN is ignored (and the result, if there is nothing else).
template <typename T, int N>
__device__ __forceinline__ float amax_of(const Vector<T, N>& values) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) amax = fmaxf(amax, fabsf(moe_ep::to_float(values.at[i])));
  return amax;
}

// Two elements an instruction.
template <typename Pair, typename T, int N>
__device__ __forceinline__ float amax_of_pairs(const Vector<T, N>& values) {
  Pair pairs[N / 2];
  memcpy(pairs, &values, sizeof(pairs));
  Pair amax = __habs2(pairs[0]);
#pragma unroll
  for (int i = 1; i < N / 2; ++i) amax = __hmax2(amax, __habs2(pairs[i]));
  return fmaxf(moe_ep::to_float(amax.x), moe_ep::to_float(amax.y));
}

template <int N>
__device__ __forceinline__ float amax_of(const Vector<__nv_bfloat16, N>& values) {
  return amax_of_pairs<__nv_bfloat162>(values);
}

template <int N>
__device__ __forceinline__ float amax_of(const Vector<__half, N>& values) {
  return amax_of_pairs<__half2>(values);
}

// To nearest even; saturates to +-448, Inf included; NaN becomes 0x7F whatever its sign.
template <int N>
__device__ __forceinline__ Vector<uint8_t, N> quantize(const float (&values)[N], float scale) {
  static_assert(N % 4 == 0);
  unsigned int words[N / 4];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float2 low = make_float2(__fmul_rn(values[i], scale), __fmul_rn(values[i + 1], scale));
    const float2 high = make_float2(__fmul_rn(values[i + 2], scale), __fmul_rn(values[i + 3], scale));
    words[i / 4] = __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
                   static_cast<unsigned int>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
  }
  Vector<uint8_t, N> bytes;
  memcpy(&bytes, words, sizeof(words));
  return bytes;
}

__device__ __forceinline__ uint8_t quantize(float value, float scale) {
  return __nv_cvt_float_to_fp8(__fmul_rn(value, scale), __NV_SATFINITE, __NV_E4M3);
}

// Exact: every E4M3 value is a float16.
__device__ __forceinline__ float2 to_float2(__nv_fp8x2_storage_t bytes) {
  return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(bytes, __NV_E4M3)));
}

__device__ __forceinline__ float to_float(uint8_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}

}  // namespace moe_ep::fp8
