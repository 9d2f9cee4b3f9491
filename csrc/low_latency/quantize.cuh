#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "fp8/formulas.cuh"

// FP8 with deep_ep's scales, bit for bit as moe_ep/compat/deep_ep/fp8.py states them in torch: of 128
// channels, amax / 448 with an amax of at least 1e-4, or the next power of two. NaNs count for no amax.
namespace moe_ep::low_latency {

constexpr int kScaleBlock = 128;

__device__ __forceinline__ fp8::Scale scale_of(float amax, bool rounded) {
  amax = fmaxf(amax, 1e-4f);
  const float scale = __fmul_rn(amax, static_cast<float>(1.0 / 448.0));
  if (!rounded) return {__fdiv_rn(448.0f, amax), scale};
  const unsigned int exponent = (__float_as_uint(scale) + 0x7FFFFFu) >> 23;
  const float power = __uint_as_float(exponent << 23);
  return {__fdiv_rn(1.0f, power), power};
}

// 16 channels on each lane; 8 neighbouring lanes have a block.
__device__ __forceinline__ Vector<uint8_t, 16> quantize(const uint4 (&channels)[2], bool rounded,
                                                        float& scale) {
  constexpr int kLanes = kScaleBlock / 16;
  __nv_bfloat162 pairs[8];
  memcpy(pairs, channels, sizeof(pairs));
  __nv_bfloat162 most = __habs2(pairs[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) most = __hmax2(most, __habs2(pairs[i]));
  float amax = fmaxf(__low2float(most), __high2float(most));
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, distance));
  }
  float values[16];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[2 * i] = __low2float(pairs[i]);
    values[2 * i + 1] = __high2float(pairs[i]);
  }
  const fp8::Scale by = scale_of(amax, rounded);
  scale = by.inverse;
  return fp8::quantize(values, by.multiply);
}

}  // namespace moe_ep::low_latency
