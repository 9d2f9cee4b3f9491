#include "swiglu/swiglu.h"

#include <type_traits>

#include "common/vector.cuh"
#include "fp8/blocks.cuh"
#include "fp8/checks.h"
#include "fp8/formulas.cuh"
#include "swiglu/formulas.cuh"

namespace moe_ep::swiglu {
namespace {

using fp8::kBlock;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMostColumns = 1 << 30;

// A warp works on one row, from left to right; a lane has 16 bytes of a step, neighbouring elements, and
// loads for several steps before it computes. HBM is the limit only while an element takes few instructions:
// 40 forward and 60 backward are as long as its bytes.
template <typename T>
struct Walk {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kLanesPerBlock = kBlock / kElements;
  static constexpr int kStep = 32 * kElements;
};

template <typename T>
using Elements = Vector<T, Walk<T>::kElements>;

// A row of the result: rounded, or quantised with the other lanes of each 1x128 block. Every lane of a warp
// calls `put`; `active` lanes store.
template <typename T, bool kQuantised>
struct Output {
  T* rounded;
  uint8_t* data;
  float* scale_inv;

  __device__ __forceinline__ Output row(int64_t index, int64_t cols) const {
    if constexpr (kQuantised) return {nullptr, data + index * cols, scale_inv + index * (cols / kBlock)};
    return {rounded + index * cols, nullptr, nullptr};
  }

  __device__ __forceinline__ void put(int at, const float (&values)[Walk<T>::kElements], bool active) const {
    if constexpr (kQuantised) {
      float amax = 0.0f;
#pragma unroll
      for (int i = 0; i < Walk<T>::kElements; ++i) amax = fmaxf(amax, fabsf(values[i]));
      const fp8::Scale scale = fp8::scale_from_amax(max_over_lanes<Walk<T>::kLanesPerBlock>(amax));
      if (active) store(data + at, fp8::quantize(values, scale.multiply));
      if (active && at % kBlock == 0) scale_inv[at / kBlock] = scale.inverse;
    } else if (active) {
      Elements<T> out;
#pragma unroll
      for (int i = 0; i < Walk<T>::kElements; ++i) out.at[i] = from_float<T>(values[i]);
      store(rounded + at, out);
    }
  }
};

template <typename T, bool kQuantised>
__global__ void __launch_bounds__(kThreads, 4)
    activate_rows(const T* __restrict__ gate_up, const float* __restrict__ weights, int64_t rows, int width,
                  Output<T, kQuantised> outputs) {
  constexpr int kElements = Walk<T>::kElements, kSteps = 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int first = static_cast<int>(threadIdx.x) % 32 * kElements;
  const float weight = weights == nullptr ? 1.0f : weights[row];
  const T* gates = gate_up + row * 2 * width;
  const T* ups = gates + width;
  const Output<T, kQuantised> out = outputs.row(row, width);
  for (int begin = 0; begin < width; begin += kSteps * Walk<T>::kStep) {
    Elements<T> gate[kSteps], up[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {  // past the end something else is loaded, and not used
      const int at = min(begin + step * Walk<T>::kStep + first, width - kElements);
      gate[step] = load_once<T, kElements>(gates + at);
      up[step] = load_once<T, kElements>(ups + at);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = begin + step * Walk<T>::kStep + first;
      float values[kElements];
      activate(gate[step], up[step], weight, values);
      out.put(at, values, at < width);
    }
  }
}

template <typename T, bool kQuantised>
__global__ void __launch_bounds__(kThreads, 3)
    differentiate_rows(const T* __restrict__ gate_up, const float* __restrict__ weights,
                       const T* __restrict__ grad_out, int64_t rows, int width, Output<T, kQuantised> outputs,
                       float* __restrict__ grad_weights) {
  constexpr int kElements = Walk<T>::kElements, kSteps = 2;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const int first = static_cast<int>(threadIdx.x) % 32 * kElements;
  const float weight = weights == nullptr ? 1.0f : weights[row];
  const T* gates = gate_up + row * 2 * width;
  const T* ups = gates + width;
  const T* grads = grad_out + row * width;
  const Output<T, kQuantised> out = outputs.row(row, 2 * static_cast<int64_t>(width));
  float grad_weight = 0.0f;
  for (int begin = 0; begin < width; begin += kSteps * Walk<T>::kStep) {
    Elements<T> gate[kSteps], up[kSteps], grad[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = min(begin + step * Walk<T>::kStep + first, width - kElements);
      gate[step] = load_once<T, kElements>(gates + at);
      up[step] = load_once<T, kElements>(ups + at);
      grad[step] = load_once<T, kElements>(grads + at);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int at = begin + step * Walk<T>::kStep + first;
      float of_gate[kElements], of_up[kElements];
      const float sum = differentiate(gate[step], up[step], grad[step], weight, grad_weight, of_gate, of_up);
      if (at < width) grad_weight = sum;
      out.put(at, of_gate, at < width);
      out.put(width + at, of_up, at < width);
    }
  }
  if (grad_weights == nullptr) return;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    grad_weight += __shfl_xor_sync(0xFFFFFFFFu, grad_weight, distance);
  }
  if (threadIdx.x % 32 == 0) grad_weights[row] = grad_weight;
}

Status check(const char* function, int64_t rows, int64_t width, bool quantised,
             std::initializer_list<const void*> needed, std::initializer_list<const void*> vectors) {
  const Status status =
      fp8::check_arguments(function, rows, width, needed, "gate_up, its gradient and the output");
  if (!status.is_ok()) return status;
  const int64_t multiple = quantised ? kBlock : 8;
  if (width % multiple != 0) {
    return Status::invalid("%s: width must be a multiple of %lld, got %lld", function,
                           static_cast<long long>(multiple), static_cast<long long>(width));
  }
  if (width > kMostColumns) {
    return Status::invalid("%s: width must be at most %d, got %lld", function, kMostColumns,
                           static_cast<long long>(width));
  }
  for (const void* pointer : vectors) {
    if (!is_aligned(pointer, 16)) return Status::invalid("%s: matrices must be 16-byte aligned", function);
  }
  return fp8::check_grid(function, rows, width, (rows + kWarps - 1) / kWarps);
}

template <typename T>
Status forward_as(const Forward& launch) {
  const auto grid = static_cast<unsigned int>((launch.rows + kWarps - 1) / kWarps);
  const auto width = static_cast<int>(launch.width);
  const auto* gate_up = static_cast<const T*>(launch.gate_up);
  if (launch.data != nullptr) {
    const Output<T, true> out{nullptr, launch.data, launch.scale_inv};
    activate_rows<T, true>
        <<<grid, kThreads, 0, launch.stream>>>(gate_up, launch.weights, launch.rows, width, out);
  } else {
    const Output<T, false> out{static_cast<T*>(launch.out), nullptr, nullptr};
    activate_rows<T, false>
        <<<grid, kThreads, 0, launch.stream>>>(gate_up, launch.weights, launch.rows, width, out);
  }
  return Status::from_cuda(cudaGetLastError(), "launching swiglu forward");
}

template <typename T>
Status backward_as(const Backward& launch) {
  const auto grid = static_cast<unsigned int>((launch.rows + kWarps - 1) / kWarps);
  const auto width = static_cast<int>(launch.width);
  const auto* gate_up = static_cast<const T*>(launch.gate_up);
  const auto* grad_out = static_cast<const T*>(launch.grad_out);
  if (launch.data != nullptr) {
    const Output<T, true> grad{nullptr, launch.data, launch.scale_inv};
    differentiate_rows<T, true><<<grid, kThreads, 0, launch.stream>>>(
        gate_up, launch.weights, grad_out, launch.rows, width, grad, launch.grad_weights);
  } else {
    const Output<T, false> grad{static_cast<T*>(launch.grad), nullptr, nullptr};
    differentiate_rows<T, false><<<grid, kThreads, 0, launch.stream>>>(
        gate_up, launch.weights, grad_out, launch.rows, width, grad, launch.grad_weights);
  }
  return Status::from_cuda(cudaGetLastError(), "launching swiglu backward");
}

}  // namespace

Status forward(const Forward& launch) {
  const bool quantised = launch.data != nullptr;
  const void* out = quantised ? launch.data : launch.out;
  const Status status =
      check("swiglu", launch.rows, launch.width, quantised, {launch.gate_up, out}, {launch.gate_up, out});
  if (!status.is_ok() || launch.rows == 0 || launch.width == 0) return status;
  return for_dtype(launch.dtype,
                   [&](auto* type) { return forward_as<std::remove_pointer_t<decltype(type)>>(launch); });
}

Status backward(const Backward& launch) {
  const bool quantised = launch.data != nullptr;
  const void* out = quantised ? launch.data : launch.grad;
  const Status status = check("swiglu_backward", launch.rows, launch.width, quantised,
                              {launch.gate_up, launch.grad_out, out}, {launch.gate_up, launch.grad_out, out});
  if (!status.is_ok() || launch.rows == 0 || launch.width == 0) return status;
  return for_dtype(launch.dtype,
                   [&](auto* type) { return backward_as<std::remove_pointer_t<decltype(type)>>(launch); });
}

}  // namespace moe_ep::swiglu
