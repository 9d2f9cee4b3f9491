#include "grouped_gemm/lanes.h"

#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace moe_ep::grouped_gemm {

namespace {

Status make(cudaStream_t stream, Lanes& lanes) {
  int priority = 0;
  cudaError_t error = cudaStreamGetPriority(stream, &priority);
  const auto and_then = [&](cudaError_t next) { error = error == cudaSuccess ? next : error; };
  lanes.streams[0] = stream;
  and_then(cudaEventCreateWithFlags(&lanes.begun, cudaEventDisableTiming));
  for (int i = 1; i < kLanes; ++i) {
    and_then(cudaStreamCreateWithPriority(&lanes.streams[i], cudaStreamNonBlocking, priority));
    and_then(cudaEventCreateWithFlags(&lanes.ended[i], cudaEventDisableTiming));
  }
  return Status::from_cuda(error, "making streams for grouped products");
}

}  // namespace

Status Lanes::fork() const {
  cudaError_t error = cudaEventRecord(begun, streams[0]);
  for (int i = 1; i < kLanes && error == cudaSuccess; ++i) error = cudaStreamWaitEvent(streams[i], begun, 0);
  return Status::from_cuda(error, "grouped products: fork");
}

void Lanes::join() const {
  for (int i = 1; i < kLanes; ++i) {
    if (cudaEventRecord(ended[i], streams[i]) == cudaSuccess) cudaStreamWaitEvent(streams[0], ended[i], 0);
  }
}

Status lanes_of(cudaStream_t stream, const Lanes** lanes) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, std::unique_ptr<Lanes>> all;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return Status::from_cuda(error, "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Lanes>& found = all[{device, stream}];
  if (!found) {
    auto made = std::make_unique<Lanes>();
    const Status status = make(stream, *made);
    if (!status.is_ok()) return status;
    found = std::move(made);
  }
  *lanes = found.get();
  return Status::ok();
}

}  // namespace moe_ep::grouped_gemm
