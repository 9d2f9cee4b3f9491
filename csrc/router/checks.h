#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/status.h"
#include "router/router.h"

namespace moe_ep::router {

// What all kernels ask; `pointers` may be null only where there are no tokens.
inline Status check_routing(const char* function, const Routing& routing,
                            std::initializer_list<const void*> pointers, const char* pointer_names) {
  const long long tokens = routing.tokens;
  if (tokens < 0 || tokens > INT32_MAX || routing.sequence_length < 1) {
    return Status::invalid("%s: tokens must be 0 to 2^31 - 1 and sequence_length >= 1, got %lld and %lld",
                           function, tokens, static_cast<long long>(routing.sequence_length));
  }
  if (routing.experts < 1 || routing.experts > kMaxExperts) {
    return Status::invalid("%s: experts must be 1 to %d, got %d", function, kMaxExperts, routing.experts);
  }
  const int most = routing.experts < kMaxTopk ? routing.experts : kMaxTopk;
  if (routing.topk < 1 || routing.topk > most) {
    return Status::invalid("%s: topk must be 1 to %d, got %d", function, most, routing.topk);
  }
  for (const void* pointer : pointers) {
    if (pointer == nullptr && tokens > 0) {
      return Status::invalid("%s: %s must not be null for %lld tokens", function, pointer_names, tokens);
    }
  }
  return Status::ok();
}

}  // namespace moe_ep::router
