#pragma once

#include "common/dtype.h"

namespace moe_ep::swiglu {

// silu(gate) * up * weight in float32, every operation rounded by itself: moe_ep.layers.swiglu states the
// same in torch.
__device__ __forceinline__ float sigmoid(float x) {
  return __frcp_rn(__fadd_rn(1.0f, expf(-x)));
}

__device__ __forceinline__ float activate(float gate, float up, float weight) {
  return __fmul_rn(__fmul_rn(__fmul_rn(gate, sigmoid(gate)), up), weight);
}

struct Gradient {
  float gate;
  float up;
  float weight;
};

// Of `activate`, where the result's gradient is `grad`.
__device__ __forceinline__ Gradient differentiate(float gate, float up, float weight, float grad) {
  const float probability = sigmoid(gate);
  const float silu = __fmul_rn(gate, probability);
  const float weighted = __fmul_rn(grad, weight);
  const float slope = __fmul_rn(probability, __fadd_rn(1.0f, __fmul_rn(gate, __fsub_rn(1.0f, probability))));
  return {__fmul_rn(__fmul_rn(weighted, up), slope), __fmul_rn(weighted, silu),
          __fmul_rn(grad, __fmul_rn(silu, up))};
}

}  // namespace moe_ep::swiglu
