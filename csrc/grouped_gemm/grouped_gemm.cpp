#include "grouped_gemm/grouped_gemm.h"

#include "grouped_gemm/lanes.h"
#include "grouped_gemm/te_api.h"

namespace moe_ep::grouped_gemm {

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kAlignment = 256;  // of workspaces

int64_t blocks(int64_t size) {
  return (size + kBlock - 1) / kBlock;
}

TeType te_type(DType dtype) {
  switch (dtype) {
    case DType::float16:
      return TeType::float16;
    case DType::bfloat16:
      return TeType::bfloat16;
    default:
      return TeType::float32;
  }
}

int64_t element_bytes(const Matrices& matrices) {
  if (matrices.scales != nullptr) return 1;
  return matrices.dtype == DType::float32 ? 4 : 2;
}

BasicTensor basic(void* data, TeType dtype, int64_t rows, int64_t columns) {
  BasicTensor tensor{data, dtype, {}};
  tensor.shape.ndim = 2;
  tensor.shape.data[0] = static_cast<size_t>(rows);
  tensor.shape.data[1] = static_cast<size_t>(columns);
  return tensor;
}

bool is_by_column(const Matrices& matrices) {
  return matrices.form == Form::columns || matrices.form == Form::column_tiles;
}

// Goes through the experts' matrices.
class Cursor {
 public:
  explicit Cursor(const Matrices& matrices)
      : matrices_(matrices), data_(static_cast<char*>(matrices.data)), scales_(matrices.scales) {}

  BasicTensor data(int64_t m) const {
    const TeType dtype = matrices_.scales != nullptr ? TeType::float8_e4m3 : te_type(matrices_.dtype);
    if (is_by_column(matrices_)) return basic(data_, dtype, matrices_.width, m);
    void* place = matrices_.places.empty() ? data_ : matrices_.places[expert_];
    return basic(place, dtype, height(m), matrices_.width);
  }

  BasicTensor scales(int64_t m) const {
    const auto [rows, columns] = scale_shape(m);
    return basic(scales_, TeType::float32, rows, columns);
  }

  void advance(int64_t m) {
    ++expert_;
    data_ += height(m) * matrices_.width * element_bytes(matrices_);
    if (scales_ == nullptr) return;
    const auto [rows, columns] = scale_shape(m);
    scales_ += rows * columns;
  }

  int64_t bytes(int64_t m) const { return height(m) * matrices_.width * element_bytes(matrices_); }

 private:
  struct Extent {
    int64_t rows, columns;
  };

  int64_t height(int64_t m) const { return matrices_.form == Form::weights ? matrices_.height : m; }

  Extent scale_shape(int64_t m) const {
    switch (matrices_.form) {
      case Form::rows:
        return {blocks(matrices_.width), m};
      case Form::columns:
        return {blocks(m), matrices_.width};
      case Form::column_tiles:
        return {blocks(matrices_.width), (blocks(m) + 3) / 4 * 4};
      default:
        return {blocks(matrices_.height), matrices_.scale_width};
    }
  }

  const Matrices& matrices_;
  size_t expert_ = 0;
  char* data_;
  float* scales_;
};

// A tensor of Transformer Engine's that is filled anew for each expert.
class TeTensor {
 public:
  TeTensor(const TeApi& api, Scaling scaling) : api_(api) { api_.create_tensors(scaling, &tensor_, 1); }
  ~TeTensor() { api_.destroy_tensors(&tensor_, 1); }
  TeTensor(const TeTensor&) = delete;
  TeTensor& operator=(const TeTensor&) = delete;

  Tensor get() const { return tensor_; }

  void set(TensorParam param, const BasicTensor& value) {
    api_.set_tensor_param(tensor_, param, &value, sizeof(value));
  }

 private:
  const TeApi& api_;
  Tensor tensor_ = nullptr;
};

// The operand, or result, of one expert after the other.
class Operand {
 public:
  Operand(const TeApi& api, const Matrices& matrices)
      : cursor_(matrices), matrices_(matrices), tensor_(api, scaling(matrices)) {}

  Tensor at_expert(int64_t m) {
    const bool columnwise = is_by_column(matrices_);
    tensor_.set(columnwise ? TensorParam::columnwise_data : TensorParam::rowwise_data, cursor_.data(m));
    if (matrices_.scales != nullptr)
      tensor_.set(columnwise ? TensorParam::columnwise_scale : TensorParam::rowwise_scale, cursor_.scales(m));
    return tensor_.get();
  }

  BasicTensor data(int64_t m) const { return cursor_.data(m); }
  int64_t bytes(int64_t m) const { return cursor_.bytes(m); }
  void advance(int64_t m) { cursor_.advance(m); }

 private:
  static Scaling scaling(const Matrices& matrices) {
    if (matrices.scales == nullptr) return Scaling::none;
    const bool is_tiled = matrices.form == Form::weights || matrices.form == Form::column_tiles;
    return is_tiled ? Scaling::block_2d : Scaling::block_1d;
  }

  Cursor cursor_;
  const Matrices& matrices_;
  TeTensor tensor_;
};

class GemmConfig {
 public:
  explicit GemmConfig(const TeApi& api) : api_(api), config_(api.create_config()) {
    const uint8_t split_accumulator = 1;  // FP8 products add up in float32
    api_.set_config(config_, ConfigAttribute::use_split_accumulator, &split_accumulator, 1);
  }
  ~GemmConfig() { api_.destroy_config(config_); }
  GemmConfig(const GemmConfig&) = delete;
  GemmConfig& operator=(const GemmConfig&) = delete;

  Config get() const { return config_; }

 private:
  const TeApi& api_;
  Config config_;
};

// Whatever happens: memory that the caller's stream is done with may be used again.
class Joined {
 public:
  explicit Joined(const Lanes& lanes) : lanes_(lanes) {}
  ~Joined() { lanes_.join(); }
  Joined(const Joined&) = delete;
  Joined& operator=(const Joined&) = delete;

 private:
  const Lanes& lanes_;
};

Status check(const Call& call) {
  if (te_api() == nullptr)
    return Status::invalid("Transformer Engine is not loaded, or lacks its C interface");
  for (const int64_t m : call.rows)
    if (m < 0) return Status::invalid("an expert has %lld rows", static_cast<long long>(m));
  for (const Matrices* matrices : {&call.a, &call.b, &call.out})
    if (!matrices->places.empty() && (matrices->form != Form::weights || matrices->scales != nullptr ||
                                      matrices->places.size() != call.rows.size()))
      return Status::invalid("places are for weights that are not FP8, one for each of the %zu experts",
                             call.rows.size());
  if (call.workspace_bytes < kLanes * kAlignment)
    return Status::invalid("workspace_bytes is %lld; it must be at least %lld",
                           static_cast<long long>(call.workspace_bytes),
                           static_cast<long long>(kLanes * kAlignment));
  return Status::ok();
}

}  // namespace

Status multiply(const Call& call) {
  Status status = check(call);
  if (!status.is_ok()) return status;
  const TeApi& api = *te_api();
  const Lanes* lanes = nullptr;
  status = lanes_of(call.stream, &lanes);
  if (!status.is_ok()) return status;

  // cuBLAS counts in columns, so that its first operand is our second.
  const bool transa = call.product == Product::rows_by_weights;
  const bool transb = call.product == Product::columns_by_columns;
  Operand a(api, call.b), b(api, call.a), out(api, call.out);
  TeTensor workspace(api, Scaling::none);
  const GemmConfig config(api);
  const int64_t share = call.workspace_bytes / kLanes / kAlignment * kAlignment;
  const float one = 1, of_out = call.adds ? 1 : 0;

  status = lanes->fork();
  const Joined joined(*lanes);
  int lane = 0;
  for (const int64_t m : call.rows) {
    if (!status.is_ok()) return status;
    const cudaStream_t stream = lanes->streams[lane];
    if (m > 0) {
      BasicTensor space = basic(static_cast<char*>(call.workspace) + lane * share, TeType::byte, share, 1);
      space.shape.ndim = 1;
      workspace.set(TensorParam::rowwise_data, space);
      const Tensor result = out.at_expert(m);
      api.gemm(transa, transb, &one, a.at_expert(m), b.at_expert(m), &of_out, result, result, workspace.get(),
               config.get(), stream);
      lane = (lane + 1) % kLanes;
    } else if (call.out.form == Form::weights && !call.adds) {
      status = Status::from_cuda(cudaMemsetAsync(out.data(m).data, 0, out.bytes(m), stream),
                                 "a product without rows");
    }
    a.advance(m), b.advance(m), out.advance(m);
  }
  return status;
}

}  // namespace moe_ep::grouped_gemm
