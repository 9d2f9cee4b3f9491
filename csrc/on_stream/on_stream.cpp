#include "on_stream/on_stream.h"

#include <cuda.h>

namespace moe_ep::on_stream {
namespace {

// A function of the driver, which is looked up when it is called: the library is not linked, so that a
// machine without a GPU can load the module.
template <typename Function>
Status find(const char* name, Function*& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned int kVersion = 12000;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, kVersion, cudaEnableDefault, &result);
  if (error != cudaSuccess) return Status::from_cuda(error, name);
  if (result != cudaDriverEntryPointSuccess) return Status::from_cuda(cudaErrorSymbolNotFound, name);
  function = reinterpret_cast<Function*>(found);
  return Status::ok();
}

using ValueFunction = CUresult(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

Status call(const char* name, const uint32_t* at, uint32_t value, unsigned int flags, cudaStream_t stream) {
  ValueFunction* function = nullptr;
  const Status status = find(name, function);
  if (!status.is_ok()) return status;
  const CUresult result = function(stream, reinterpret_cast<CUdeviceptr>(at), value, flags);
  return Status::from_cuda(static_cast<cudaError_t>(result), name);  // one numbering for both
}

}  // namespace

Status copy(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  return Status::from_cuda(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream),
      "copying to a peer");
}

Status write_value(uint32_t* to, uint32_t value, cudaStream_t stream) {
  return call("cuStreamWriteValue32", to, value, CU_STREAM_WRITE_VALUE_DEFAULT, stream);
}

Status wait_value(const uint32_t* at, uint32_t value, cudaStream_t stream) {
  return call("cuStreamWaitValue32", at, value, CU_STREAM_WAIT_VALUE_GEQ, stream);
}

}  // namespace moe_ep::on_stream
