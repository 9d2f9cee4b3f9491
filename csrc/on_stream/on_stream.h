#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/status.h"

// What a stream does by itself, without a kernel and so without a multiprocessor. Addresses are this
// device's, of its own memory or a peer's.
namespace moe_ep::on_stream {

// By a copy engine.
Status copy(void* to, const void* from, int64_t bytes, cudaStream_t stream);

// `*to = value`, once all that the stream did before is visible everywhere.
Status write_value(uint32_t* to, uint32_t value, cudaStream_t stream);

// Waits until `*at >= value`, without a time limit. Values may wrap around.
Status wait_value(const uint32_t* at, uint32_t value, cudaStream_t stream);

}  // namespace moe_ep::on_stream
