// moe_ep._C.nvlink
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/python.h"
#include "nvlink/combine.h"
#include "nvlink/dispatch.h"
#include "nvlink/group.h"
#include "nvlink/plan.h"
#include "nvlink/plan_tables.h"

namespace py = pybind11;

namespace moe_ep::nvlink {
namespace {

using Communicator = OnDevice<Group>;

Communicator make(int device, int rank, int size, int max_tokens, int num_topk, int num_experts,
                  int64_t ring_bytes, double timeout_s, const std::vector<Address>& windows,
                  Address workspace, Address host) {
  Group group{};
  group.rank = rank;
  group.size = size;
  group.max_tokens = max_tokens;
  group.num_topk = num_topk;
  group.num_experts = num_experts;
  group.num_local = num_experts / size;
  group.ring_bytes = ring_bytes;
  group.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
  group.at = window_layout(size, max_tokens, num_topk, ring_bytes);
  group.workspace = pointer<Workspace>(workspace);
  group.host = pointer<HostRecord>(host);
  for (int rank = 0; rank < size; ++rank) group.windows[rank] = pointer<char>(windows.at(rank));
  return Communicator(device, group);
}

using Failure = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::optional<Failure> failure(const Communicator& self) {
  const HostRecord* host = self.group().host;
  if (!host->failed) return std::nullopt;
  return Failure{host->phase, host->peer, host->expected, host->seen};
}

std::vector<int> bad_ranks(const Communicator& self) {
  std::vector<int> ranks;
  for (int rank = 0; rank < self.group().size; ++rank) {
    if (self.group().host->bad_ranks[rank / 64] >> rank % 64 & 1) ranks.push_back(rank);
  }
  return ranks;
}

// What the plan has reported: the rows of the exact result, and at `splits` those of each local expert,
// padded.
int64_t read_plan(const Communicator& self, int64_t alignment, Address splits) {
  const HostRecord* host = self.group().host;
  int64_t* const rows = pointer<int64_t>(splits);
  for (int expert = 0; expert < self.group().num_local; ++expert) {
    rows[expert] = (host->tokens_per_expert[expert] + alignment - 1) / alignment * alignment;
  }
  return host->rows_needed;
}

}  // namespace

void bind(py::module_& module) {
  module.attr("MAX_RANKS") = kMaxRanks;
  module.attr("MAX_TOPK") = kMaxTopk;
  module.attr("MAX_EXPERTS") = kMaxExperts;
  module.attr("MAX_ROWS") = PlanTables::kIndex - 1;
  module.attr("MAX_TOKENS") = 1 << kArrivalBits;
  module.attr("CHUNK") = kChunk;
  module.attr("HOST_BYTES") = sizeof(HostRecord);
  module.def(
      "window_bytes",
      [](int size, int max_tokens, int num_topk, int64_t ring_bytes) {
        return window_layout(size, max_tokens, num_topk, ring_bytes).bytes;
      },
      py::arg("size"), py::arg("max_tokens"), py::arg("num_topk"), py::arg("ring_bytes"));
  module.def("workspace_bytes", &workspace_bytes, py::arg("size"), py::arg("max_tokens"),
             py::arg("num_experts"));

  py::class_<Notes>(module, "Notes", "What csrc/nvlink/plan.h says.")
      .def(py::init([](Address per_rank, Address per_expert, int num_experts, int max_tokens, Address before,
                       Address places, Address host) {
             return Notes{pointer<int>(per_rank), pointer<int>(per_expert), num_experts,           max_tokens,
                          pointer<int>(before),   pointer<int>(places),     pointer<int64_t>(host)};
           }),
           py::arg("per_rank"), py::arg("per_expert"), py::arg("num_experts"), py::arg("max_tokens"),
           py::arg("before"), py::arg("places"), py::arg("host"));

  py::class_<Communicator>(
      module, "Communicator",
      "Launches on its device and the given stream. Addresses and sizes are those of tensors; the "
      "structs of csrc/nvlink say what they hold.")
      .def(py::init(&make), py::arg("device"), py::arg("rank"), py::arg("size"), py::arg("max_tokens"),
           py::arg("num_topk"), py::arg("num_experts"), py::arg("ring_bytes"), py::arg("timeout_s"),
           py::arg("windows"), py::arg("workspace"), py::arg("host"))
      .def("table_words", [](const Communicator& self,
                             int num_tokens) { return PlanTables::words(self.group(), num_tokens); })
      .def(
          "table_offsets",
          [](const Communicator& self) {
            int* const base = nullptr;
            const PlanTables tables(base, self.group());
            return std::map<std::string, int64_t>{{"recv_start", tables.recv_start - base},
                                                  {"sources", tables.sources - base},
                                                  {"arrival_rows", tables.arrival_rows - base}};
          },
          "Where some of a plan's tables begin, in words.")
      .def_property_readonly("failed",
                             [](const Communicator& self) { return self.group().host->failed != 0; })
      .def("failure", &failure, "(phase, peer, expected, seen) of the first wait that timed out, or None.")
      .def_property_readonly("bad_ids",
                             [](const Communicator& self) { return self.group().host->bad_ids != 0; })
      .def("forget_bad_ids", [](const Communicator& self) { self.group().host->bad_ids = 0; })
      .def("bad_ranks", &bad_ranks)
      .def("read_plan", &read_plan, py::arg("alignment"), py::arg("splits"))
      .def(
          "wait_for_plan",
          [](const Communicator& self, int64_t ticket, double timeout_s) {
            py::gil_scoped_release release;
            return wait_for_plan(self.group().host, ticket, timeout_s);
          },
          "Whether the plan with this ticket has reported, before a failure and within timeout_s.")
      .def(
          "plan",
          [](const Communicator& self, Address topk_idx, bool is_int64, int num_tokens, bool expert_layout,
             int alignment, int64_t max_rows, bool fixed_rows, Address tables, Address tokens_per_expert,
             Address padded_tokens_per_expert, Address rows_needed, Address ids, int64_t ticket, int num_sms,
             Address stream, bool meets, const std::optional<Notes>& notes) {
            const Plan plan{pointer<void>(topk_idx),
                            is_int64,
                            num_tokens,
                            expert_layout,
                            alignment,
                            max_rows,
                            fixed_rows,
                            pointer<int>(tables),
                            pointer<int64_t>(tokens_per_expert),
                            pointer<int64_t>(padded_tokens_per_expert),
                            pointer<int64_t>(rows_needed),
                            pointer<int64_t>(ids),
                            ticket,
                            num_sms,
                            pointer<CUstream_st>(stream),
                            notes.value_or(Notes{}),
                            meets};
            self.launch([&](const Group& group) { return launch_plan(group, plan); });
          },
          py::arg("topk_idx"), py::arg("is_int64"), py::arg("num_tokens"), py::arg("expert_layout"),
          py::arg("alignment"), py::arg("max_rows"), py::arg("fixed_rows"), py::arg("tables"),
          py::arg("tokens_per_expert"), py::arg("padded_tokens_per_expert"), py::arg("rows_needed"),
          py::arg("ids"), py::arg("ticket"), py::arg("num_sms"), py::arg("stream"), py::arg("meets"),
          py::arg("notes") = std::nullopt)
      .def(
          "dispatch",
          [](const Communicator& self, Address rows, int64_t row_bytes, std::optional<DType> quantised_from,
             Address scales, int scale_words, float scale_padding, Address weights, Address tables,
             Address out_rows, Address out_scales, Address out_weights, int64_t num_rows, bool expert_layout,
             bool has_padding, int num_blocks, int send_blocks, Address stream, bool meets) {
            const Dispatch dispatch{pointer<char>(rows),
                                    row_bytes,
                                    quantised_from.has_value(),
                                    quantised_from.value_or(DType::bfloat16),
                                    pointer<float>(scales),
                                    scale_words,
                                    scale_padding,
                                    pointer<float>(weights),
                                    pointer<int>(tables),
                                    pointer<char>(out_rows),
                                    pointer<float>(out_scales),
                                    pointer<float>(out_weights),
                                    num_rows,
                                    expert_layout,
                                    has_padding,
                                    num_blocks,
                                    send_blocks,
                                    pointer<CUstream_st>(stream),
                                    meets};
            self.launch([&](const Group& group) { return launch_dispatch(group, dispatch); });
          },
          py::arg("rows"), py::arg("row_bytes"), py::arg("quantised_from"), py::arg("scales"),
          py::arg("scale_words"), py::arg("scale_padding"), py::arg("weights"), py::arg("tables"),
          py::arg("out_rows"), py::arg("out_scales"), py::arg("out_weights"), py::arg("num_rows"),
          py::arg("expert_layout"), py::arg("has_padding"), py::arg("num_blocks"), py::arg("send_blocks"),
          py::arg("stream"), py::arg("meets"))
      .def(
          "combine",
          [](const Communicator& self, Address rows, DType dtype, int64_t row_bytes, Address row_weights,
             Address bias_0, Address bias_1, Address tables, int num_tokens, Address out, Address out_weights,
             bool expert_layout, int num_blocks, int send_blocks, Address stream, bool meets, int num_added) {
            const Combine combine{pointer<char>(rows),
                                  dtype,
                                  row_bytes,
                                  pointer<float>(row_weights),
                                  {pointer<char>(bias_0), pointer<char>(bias_1)},
                                  pointer<int>(tables),
                                  num_tokens,
                                  pointer<char>(out),
                                  pointer<float>(out_weights),
                                  expert_layout,
                                  num_blocks,
                                  send_blocks,
                                  pointer<CUstream_st>(stream),
                                  num_added,
                                  meets};
            self.launch([&](const Group& group) { return launch_combine(group, combine); });
          },
          py::arg("rows"), py::arg("dtype"), py::arg("row_bytes"), py::arg("row_weights"), py::arg("bias_0"),
          py::arg("bias_1"), py::arg("tables"), py::arg("num_tokens"), py::arg("out"), py::arg("out_weights"),
          py::arg("expert_layout"), py::arg("num_blocks"), py::arg("send_blocks"), py::arg("stream"),
          py::arg("meets"), py::arg("num_added") = 0);
}

}  // namespace moe_ep::nvlink
