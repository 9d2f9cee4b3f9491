#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "common/vector.cuh"

namespace moe_ep::fp8 {

// The arithmetic of Transformer Engine's Float8BlockScaling recipe (E4M3, power-of-two scales, amax epsilon
// 0), bit for bit: compute_scale_from_amax in its common/recipe/recipe_common.cuh. moe_ep.fp8 states the same
// in torch. NOTE: needs correctly rounded division and no flushing of subnormals: never build with fast math.

constexpr float kMax = 448.0f;  // largest E4M3 value

template <typename T>
constexpr float kLargestFinite = 3.40282347e38f;
template <>
constexpr float kLargestFinite<__half> = 65504.0f;
template <>
constexpr float kLargestFinite<__nv_bfloat16> = 3.38953139e38f;

struct Scale {
  float multiply;  // by this when quantising
  float inverse;   // by this when dequantising: the scale_inv that travels with the data
};

// The scale of a block of `T` whose largest magnitude is `amax`; a block of zeros or with an Inf gets 1.
template <typename T>
__device__ __forceinline__ Scale scale_from_amax(float amax) {
  if (amax == 0.0f || isinf(amax) || isnan(amax)) return {1.0f, 1.0f};
  float scale = __fdiv_rn(kMax, amax);
  if (isinf(scale)) scale = kLargestFinite<T>;
  scale = __uint_as_float(__float_as_uint(scale) & 0xFF800000u);  // down to a power of two
  return {scale, __fdiv_rn(1.0f, scale)};
}

// To nearest even; saturates to +-448, Inf included; NaN becomes 0x7F whatever its sign.
template <int N>
__device__ __forceinline__ Vector<uint8_t, N> quantize(const float (&values)[N], float scale) {
  static_assert(N % 2 == 0);
  Vector<uint8_t, N> bytes;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const float2 pair = make_float2(__fmul_rn(values[i], scale), __fmul_rn(values[i + 1], scale));
    const __nv_fp8x2_storage_t packed = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    bytes.at[i] = static_cast<uint8_t>(packed & 0xFF);
    bytes.at[i + 1] = static_cast<uint8_t>(packed >> 8);
  }
  return bytes;
}

__device__ __forceinline__ uint8_t quantize(float value, float scale) {
  return __nv_cvt_float_to_fp8(__fmul_rn(value, scale), __NV_SATFINITE, __NV_E4M3);
}

// Exact: every E4M3 value is a float16.
__device__ __forceinline__ float to_float(uint8_t byte) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
}

}  // namespace moe_ep::fp8
