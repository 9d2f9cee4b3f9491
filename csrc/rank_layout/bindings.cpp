// moe_ep._C.rank_layout
#include <pybind11/pybind11.h>

#include "common/python.h"
#include "rank_layout/number.h"
#include "rank_layout/rows.h"

namespace py = pybind11;

namespace moe_ep::rank_layout {

void bind(py::module_& module) {
  module.attr("MAX_EXPERTS") = kMaxExperts;
  module.attr("MAX_TOPK") = kMaxTopk;
  module.attr("MAX_COUNT_BLOCKS") = kMaxCountBlocks;
  module.def(
      "number",
      [](Address topk_idx, int64_t rows, int num_topk, int num_experts, int64_t alignment, int64_t num_slots,
         Address counts, Address slots, Address gaps, Address tokens_per_expert, Address stream) {
        const Number launch{pointer<int64_t>(topk_idx),
                            rows,
                            num_topk,
                            num_experts,
                            alignment,
                            num_slots,
                            pointer<int>(counts),
                            pointer<int>(slots),
                            pointer<int>(gaps),
                            pointer<int64_t>(tokens_per_expert),
                            pointer<CUstream_st>(stream)};
        run([&] { return number(launch); });
      },
      py::kw_only(), py::arg("topk_idx"), py::arg("rows"), py::arg("num_topk"), py::arg("num_experts"),
      py::arg("alignment"), py::arg("num_slots"), py::arg("counts"), py::arg("slots"), py::arg("gaps"),
      py::arg("tokens_per_expert"), py::arg("stream"));
  module.def(
      "expand",
      [](Address slots, int64_t rows, int num_topk, Address gaps, int num_gaps, Address from, Address to,
         int64_t row_bytes, Address scales, Address to_scales, int num_scales, Address weights,
         Address to_weights, Address stream) {
        const Expand launch{{pointer<int>(slots), rows, num_topk},
                            pointer<int>(gaps),
                            num_gaps,
                            pointer<void>(from),
                            pointer<void>(to),
                            row_bytes,
                            pointer<float>(scales),
                            pointer<float>(to_scales),
                            num_scales,
                            pointer<float>(weights),
                            pointer<float>(to_weights),
                            pointer<CUstream_st>(stream)};
        run([&] { return expand(launch); });
      },
      py::kw_only(), py::arg("slots"), py::arg("rows"), py::arg("num_topk"), py::arg("gaps"),
      py::arg("num_gaps"), py::arg("from_rows"), py::arg("to_rows"), py::arg("row_bytes"), py::arg("scales"),
      py::arg("to_scales"), py::arg("num_scales"), py::arg("weights"), py::arg("to_weights"),
      py::arg("stream"));
  module.def(
      "reduce",
      [](Address slots, int64_t rows, int num_topk, Address from, Address to, DType dtype, int64_t row_bytes,
         Address weights, Address to_weights, Address stream) {
        const Reduce launch{{pointer<int>(slots), rows, num_topk},
                            pointer<void>(from),
                            pointer<void>(to),
                            dtype,
                            row_bytes,
                            pointer<float>(weights),
                            pointer<float>(to_weights),
                            pointer<CUstream_st>(stream)};
        run([&] { return reduce(launch); });
      },
      py::kw_only(), py::arg("slots"), py::arg("rows"), py::arg("num_topk"), py::arg("from_rows"),
      py::arg("to_rows"), py::arg("dtype"), py::arg("row_bytes"), py::arg("weights"), py::arg("to_weights"),
      py::arg("stream"));
}

}  // namespace moe_ep::rank_layout
