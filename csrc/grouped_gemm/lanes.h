#pragma once

#include <cuda_runtime_api.h>

#include <array>

#include "common/status.h"

// Streams beside the caller's for products that fill a GPU only together: the end of one runs beside the
// beginning of the next.
namespace moe_ep::grouped_gemm {

constexpr int kLanes = 4;

struct Lanes {
  std::array<cudaStream_t, kLanes> streams;  // the first is the caller's
  cudaEvent_t begun;
  std::array<cudaEvent_t, kLanes> ended;  // of the first: not used

  // The other streams wait for what the caller's has to do so far.
  Status fork() const;
  // The caller's stream waits for the others. An error of the device stays for the next call to report.
  void join() const;
};

// Those of a stream on the current device: made when first asked for, and kept. Ranks that share a GPU have a
// stream each and so lanes of their own; in common ones their products would wait for each other's.
Status lanes_of(cudaStream_t stream, const Lanes** lanes);

}  // namespace moe_ep::grouped_gemm
