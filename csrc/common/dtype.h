#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace moe_ep {

// The element types of token rows that Python names.
enum class DType { float32, float16, bfloat16 };

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);

template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Calls `launch` with a null pointer of the C++ type that `dtype` names: launch(static_cast<T*>(nullptr)).
template <typename Launch>
auto for_dtype(DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::float16:
      return launch(static_cast<__half*>(nullptr));
    case DType::bfloat16:
      return launch(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return launch(static_cast<float*>(nullptr));
  }
}

}  // namespace moe_ep
