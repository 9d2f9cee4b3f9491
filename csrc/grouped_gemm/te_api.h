#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// The part of Transformer Engine's C interface that grouped products need: of its headers
// transformer_engine.h and gemm.h, version 2.20. Its library is not linked: Python has loaded it, or there
// are no such products.
namespace moe_ep::grouped_gemm {

using Tensor = void*;
using Config = void*;

enum class TeType : int { byte = 0, float32 = 4, float16 = 5, bfloat16 = 6, float8_e4m3 = 7 };

enum class Scaling : int { none = 0, block_1d = 2, block_2d = 3 };

enum class TensorParam : int {
  rowwise_data = 0,
  columnwise_data = 1,
  rowwise_scale = 4,
  columnwise_scale = 5
};

enum class ConfigAttribute : int { use_split_accumulator = 5 };

struct Shape {
  size_t data[15];
  size_t ndim;
};

struct BasicTensor {
  void* data;
  TeType dtype;
  Shape shape;
};

struct TeApi {
  void (*create_tensors)(Scaling, Tensor*, size_t);
  void (*destroy_tensors)(Tensor*, size_t);
  void (*set_tensor_param)(Tensor, TensorParam, const void*, size_t);
  Config (*create_config)();
  void (*set_config)(Config, ConfigAttribute, const void*, size_t);
  void (*destroy_config)(Config);
  // D = alpha op(A) op(B) + beta C, all column-major: of row-major matrices, D = op(B) op(A).
  void (*gemm)(int transa, int transb, const float* alpha, Tensor a, Tensor b, const float* beta, Tensor c,
               Tensor d, Tensor workspace, Config config, cudaStream_t stream);
};

// Null where Transformer Engine is not loaded, or lacks one of these. It reports errors by C++ exceptions.
const TeApi* te_api();

}  // namespace moe_ep::grouped_gemm
