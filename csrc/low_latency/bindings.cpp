// moe_ep._C.low_latency
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/python.h"
#include "low_latency/combine.h"
#include "low_latency/dispatch.h"
#include "low_latency/group.h"

namespace py = pybind11;

namespace moe_ep::low_latency {
namespace {

using Calls = OnDevice<Group>;  // of one shape

Calls make(int device, int rank, int size, int hidden, int max_tokens, int num_experts, int num_blocks,
           double timeout_s, const std::vector<Address>& windows, Address masked, Address failed,
           Address calls, Address host) {
  Group group{};
  group.rank = rank;
  group.size = size;
  group.hidden = hidden;
  group.max_tokens = max_tokens;
  group.num_experts = num_experts;
  group.num_local = num_experts / size;
  group.num_blocks = num_blocks;
  group.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  group.at = window_layout(size, max_tokens, group.num_local, hidden);
  group.masked = pointer<unsigned int>(masked);
  group.failed = pointer<unsigned int>(failed);
  group.calls = pointer<unsigned int>(calls);
  group.host = pointer<HostRecord>(host);
  for (int r = 0; r < size; ++r) group.windows[r] = pointer<char>(windows.at(r));
  return Calls(device, group);
}

using Failure = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::optional<Failure> failure(Address record) {
  const HostRecord* host = pointer<HostRecord>(record);
  if (!host->failed) return std::nullopt;
  return Failure{host->phase, host->peer, host->expected, host->seen};
}

}  // namespace

void bind(py::module_& module) {
  module.attr("MAX_RANKS") = kMaxRanks;
  module.attr("MAX_TOPK") = kMaxTopk;
  module.attr("MAX_EXPERTS") = kMaxExperts;
  module.attr("MAX_TOKENS") = kMaxTokens;
  module.attr("BLOCKS_PER_SM") = kBlocksPerSm;
  module.attr("PEER_WORDS") = sizeof(Peer) / 4;
  module.attr("HOST_BYTES") = sizeof(HostRecord);
  module.def(
      "window_bytes",
      [](int size, int max_tokens, int num_local, int hidden) {
        return window_layout(size, max_tokens, num_local, hidden).bytes;
      },
      py::arg("size"), py::arg("max_tokens"), py::arg("num_local"), py::arg("hidden"));
  module.def(
      "call_words", [](int size, int num_blocks) { return 2 * size * num_blocks; }, py::arg("size"),
      py::arg("num_blocks"), "Words that count the calls.");
  module.def("failure", &failure, py::arg("host"),
             "(phase, peer, expected, seen) of the first wait that timed out, or None.");
  py::enum_<Format>(module, "Format")
      .value("bfloat16", Format::bfloat16)
      .value("fp8", Format::fp8)
      .value("fp8_rounded", Format::fp8_rounded)
      .value("fp8_exponents", Format::fp8_exponents);

  py::class_<Calls>(module, "Calls",
                    "Launches on its device and the given stream. Addresses and sizes are those of tensors; "
                    "the structs of csrc/low_latency say what they hold.")
      .def(py::init(&make), py::arg("device"), py::arg("rank"), py::arg("size"), py::arg("hidden"),
           py::arg("max_tokens"), py::arg("num_experts"), py::arg("num_blocks"), py::arg("timeout_s"),
           py::arg("windows"), py::arg("masked"), py::arg("failed"), py::arg("calls"), py::arg("host"))
      .def(
          "table_words",
          [](const Calls& self, int num_topk) { return Tables::words(self.group(), num_topk); },
          py::arg("num_topk"))
      .def(
          "dispatch",
          [](const Calls& self, bool send, bool receive, Address x, Address topk_idx, bool is_int64,
             int num_tokens, int num_topk, Format format, Address tables, Address rows, Address scales,
             Address tokens_of_expert, Address source_token, Address ranges, Address statistics,
             Address stream) {
            const Dispatch dispatch{send,
                                    receive,
                                    pointer<void>(x),
                                    pointer<void>(topk_idx),
                                    is_int64,
                                    num_tokens,
                                    num_topk,
                                    format,
                                    pointer<int>(tables),
                                    pointer<char>(rows),
                                    pointer<void>(scales),
                                    pointer<int>(tokens_of_expert),
                                    pointer<int>(source_token),
                                    pointer<int64_t>(ranges),
                                    pointer<int>(statistics),
                                    pointer<CUstream_st>(stream)};
            self.launch([&](const Group& group) { return launch_dispatch(group, dispatch); });
          },
          py::arg("send"), py::arg("receive"), py::arg("x"), py::arg("topk_idx"), py::arg("is_int64"),
          py::arg("num_tokens"), py::arg("num_topk"), py::arg("format"), py::arg("tables"), py::arg("rows"),
          py::arg("scales"), py::arg("tokens_of_expert"), py::arg("source_token"), py::arg("ranges"),
          py::arg("statistics"), py::arg("stream"))
      .def(
          "combine",
          [](const Calls& self, bool send, bool receive, Address rows, Address topk_idx, bool is_int64,
             Address topk_weights, int num_tokens, int num_topk, Address tables, Address peers, Address out,
             Address stream) {
            const Combine combine{send,
                                  receive,
                                  pointer<char>(rows),
                                  pointer<void>(topk_idx),
                                  is_int64,
                                  pointer<float>(topk_weights),
                                  num_tokens,
                                  num_topk,
                                  pointer<int>(tables),
                                  pointer<Peer>(peers),
                                  pointer<char>(out),
                                  pointer<CUstream_st>(stream)};
            self.launch([&](const Group& group) { return launch_combine(group, combine); });
          },
          py::arg("send"), py::arg("receive"), py::arg("rows"), py::arg("topk_idx"), py::arg("is_int64"),
          py::arg("topk_weights"), py::arg("num_tokens"), py::arg("num_topk"), py::arg("tables"),
          py::arg("peers"), py::arg("out"), py::arg("stream"));
}

}  // namespace moe_ep::low_latency
