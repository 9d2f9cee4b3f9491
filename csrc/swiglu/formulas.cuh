#pragma once

#include <cstring>

#include "common/dtype.h"
#include "common/vector.cuh"

namespace moe_ep::swiglu {

// silu(gate) * up * weight in float32, every operation rounded by itself: moe_ep.layers.swiglu states the
// same in torch.

// 1 / (1 + exp(-gate)) for any gate.
__device__ __forceinline__ float sigmoid(float gate) {
  return __frcp_rn(__fadd_rn(1.0f, expf(-gate)));
}

// The same bits for gates of at least this: the denominator is below 2^126, its reciprocal no subnormal
// number.
// __frcp_rn does this too, after a branch that keeps the compiler from mixing elements.
constexpr float kLeastUsualGate = -87.0f;

__device__ __forceinline__ float sigmoid_of_usual(float gate) {
  const float denominator = __fadd_rn(1.0f, expf(-gate));
  float about;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(about) : "f"(denominator));
  return __fmaf_rn(about, __fmaf_rn(-denominator, about, 1.0f), about);
}

// Whether no gate needs `sigmoid`. NaNs may be either.
template <int N>
__device__ __forceinline__ bool are_usual(const Vector<float, N>& gates) {
  float least = gates.at[0];
#pragma unroll
  for (int i = 1; i < N; ++i) least = fminf(least, gates.at[i]);
  return least >= kLeastUsualGate;
}

template <typename Pair, typename T, int N>
__device__ __forceinline__ bool are_usual_pairs(const Vector<T, N>& gates) {
  Pair pairs[N / 2];
  memcpy(pairs, &gates, sizeof(pairs));
  Pair least = pairs[0];
#pragma unroll
  for (int i = 1; i < N / 2; ++i) least = __hmin2(least, pairs[i]);
  const T limit = from_float<T>(kLeastUsualGate);
  return __hbge2(least, Pair{limit, limit});
}

template <int N>
__device__ __forceinline__ bool are_usual(const Vector<__nv_bfloat16, N>& gates) {
  return are_usual_pairs<__nv_bfloat162>(gates);
}

template <int N>
__device__ __forceinline__ bool are_usual(const Vector<__half, N>& gates) {
  return are_usual_pairs<__half2>(gates);
}

template <typename T, int N>
__device__ __forceinline__ void to_floats(const Vector<T, N>& vector, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = to_float(vector.at[i]);
}

// An instruction each: a bfloat16 is the upper half of its float32.
template <int N>
__device__ __forceinline__ void to_floats(const Vector<__nv_bfloat16, N>& vector, float (&values)[N]) {
  unsigned int words[N / 2];
  memcpy(words, &vector, sizeof(words));
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
  }
}

// Of N gates, which are `values` in float32.
template <typename T, int N>
__device__ __forceinline__ void sigmoids(const Vector<T, N>& gates, const float (&values)[N],
                                         float (&probabilities)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) probabilities[i] = sigmoid_of_usual(values[i]);
  if (__builtin_expect(!are_usual(gates), 0)) {
#pragma unroll
    for (int i = 0; i < N; ++i) probabilities[i] = sigmoid(values[i]);
  }
}

template <typename T, int N>
__device__ __forceinline__ void activate(const Vector<T, N>& gates, const Vector<T, N>& ups, float weight,
                                         float (&values)[N]) {
  float gate[N], up[N], probability[N];
  to_floats(gates, gate);
  to_floats(ups, up);
  sigmoids(gates, gate, probability);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = __fmul_rn(__fmul_rn(__fmul_rn(gate[i], probability[i]), up[i]), weight);
  }
}

// Of `activate`, where the result's gradient is `grads`: gradients of gates and ups; `sum` plus those of the
// weight, one after the other, is returned.
template <typename T, int N>
__device__ __forceinline__ float differentiate(const Vector<T, N>& gates, const Vector<T, N>& ups,
                                               const Vector<T, N>& grads, float weight, float sum,
                                               float (&of_gate)[N], float (&of_up)[N]) {
  float gate[N], up[N], grad[N], probability[N];
  to_floats(gates, gate);
  to_floats(ups, up);
  to_floats(grads, grad);
  sigmoids(gates, gate, probability);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float silu = __fmul_rn(gate[i], probability[i]);
    const float weighted = __fmul_rn(grad[i], weight);
    const float rest = __fsub_rn(1.0f, probability[i]);
    const float slope = __fmul_rn(probability[i], __fadd_rn(1.0f, __fmul_rn(gate[i], rest)));
    of_gate[i] = __fmul_rn(__fmul_rn(weighted, up[i]), slope);
    of_up[i] = __fmul_rn(weighted, silu);
    sum = __fadd_rn(sum, __fmul_rn(grad[i], __fmul_rn(silu, up[i])));
  }
  return sum;
}

}  // namespace moe_ep::swiglu
