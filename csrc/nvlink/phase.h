#pragma once

namespace moe_ep::nvlink {

// What a wait was for; moe_ep/backends/nvlink.py has the names.
enum class Phase : int {
  send_routing,
  receive_routing,
  plan,
  dispatch_send,
  dispatch_receive,
  combine_send,
  combine_receive
};

}  // namespace moe_ep::nvlink
