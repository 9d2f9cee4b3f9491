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

// The scale of a block whose largest magnitude is `amax`; a block of zeros, with an Inf or of NaNs gets 1.
//
// The recipe divides 448 by amax, rounds to float32, replaces Inf by the largest finite value and rounds down
// to a power of two. With 448 = 1.75 * 2^8 and amax = m * 2^e that is 2^(8 - e), or half of it where m
// > 1.75, and at most 2^127: the quotient just below a power of two never rounds up to it, since 1.75 is a
// float32 and the next m gives 1 - 2^-23 / 1.75, which is nearer to 1 - 2^-24 than to 1. So no division is
// needed, which would cost more than the memory traffic, and no branch: what is added to amax carries into
// its exponent where m > 1.75.
__device__ __forceinline__ Scale scale_from_amax(float amax) {
  constexpr unsigned int kExponent = 0xFF800000u, kInf = 0x7F800000u, kUpTo1_75 = 0x001FFFFFu;
  constexpr unsigned int kOne = 135u << 23, kSum = 262u << 23;  // of the exponents of amax and its scale
  constexpr int kLeast = 8 << 23, kLeastInverse = 0x00400000;   // where the scale is 2^127, and 2^-127
  const unsigned int bits = __float_as_uint(amax);
  const int carried = max(static_cast<int>(bits + kUpTo1_75), kLeast);
  const unsigned int exponent = (bits - 1 < kInf - 1 ? static_cast<unsigned int>(carried) : kOne) & kExponent;
  const int inverse = max(static_cast<int>(exponent) - kLeast, kLeastInverse);
  return {__uint_as_float(kSum - exponent), __int_as_float(inverse)};
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

// Four values as four bytes, the first lowest. To nearest even; saturates to +-448, Inf included; NaN becomes
// 0x7F whatever its sign.
__device__ __forceinline__ unsigned int to_bytes(float a, float b, float c, float d) {
  unsigned int word;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
}

template <int N>
__device__ __forceinline__ Vector<uint8_t, N> quantize(const float (&values)[N], float scale) {
  static_assert(N % 4 == 0);
  unsigned int words[N / 4];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    words[i / 4] = to_bytes(__fmul_rn(values[i], scale), __fmul_rn(values[i + 1], scale),
                            __fmul_rn(values[i + 2], scale), __fmul_rn(values[i + 3], scale));
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
