#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/python.h"
#include "router/router.h"

namespace py = pybind11;

namespace moe_ep::router {

void bind(py::module_& module) {
  module.attr("MAX_EXPERTS") = kMaxExperts;
  module.attr("MAX_TOPK") = kMaxTopk;
  module.attr("TOKENS_PER_TERM") = kTokensPerTerm;
  py::class_<Routing>(module, "Routing", "What the kernels of one routing have in common.")
      .def(py::init([](int64_t tokens, int64_t sequence_length, int experts, int topk, bool softmax,
                       float scaling) {
             return Routing{tokens, sequence_length, experts, topk, softmax, scaling};
           }),
           py::kw_only(), py::arg("tokens"), py::arg("sequence_length"), py::arg("experts"), py::arg("topk"),
           py::arg("softmax"), py::arg("scaling"));
  module.def(
      "choose",
      [](const Routing& routing, Address pieces, int slices, int parts, Address bias, int groups,
         int topk_groups, Address logits, Address topk_idx, Address topk_weights, Address load,
         Address highest, Address stream) {
        Choose launch{};
        launch.routing = routing;
        launch.pieces = pointer<float>(pieces);
        launch.slices = slices;
        launch.parts = parts;
        launch.bias = pointer<float>(bias);
        launch.groups = groups;
        launch.topk_groups = topk_groups;
        launch.logits = pointer<float>(logits);
        launch.topk_idx = pointer<int64_t>(topk_idx);
        launch.topk_weights = pointer<float>(topk_weights);
        launch.load = pointer<int64_t>(load);
        launch.highest = pointer<int>(highest);
        launch.stream = pointer<CUstream_st>(stream);
        run([&] { return choose(launch); });
      },
      py::arg("routing"), py::kw_only(), py::arg("pieces"), py::arg("slices"), py::arg("parts"),
      py::arg("bias"), py::arg("groups"), py::arg("topk_groups"), py::arg("logits"), py::arg("topk_idx"),
      py::arg("topk_weights"), py::arg("load"), py::arg("highest"), py::arg("stream"),
      "Experts and weights from pieces of logits [slices, tokens, parts, experts]; raises counts.");
  module.def(
      "balance",
      [](const Routing& routing, Address logits, Address highest, float factor, Address terms,
         Address stream) {
        const Balance launch{routing, pointer<float>(logits), pointer<int>(highest),
                             factor,  pointer<float>(terms),  pointer<CUstream_st>(stream)};
        run([&] { return balance(launch); });
      },
      py::arg("routing"), py::kw_only(), py::arg("logits"), py::arg("highest"), py::arg("factor"),
      py::arg("terms"), py::arg("stream"), "The balance loss in terms, one of each TOKENS_PER_TERM tokens.");
  module.def(
      "differentiate",
      [](const Routing& routing, Address logits, Address topk_idx, Address grad_weights, Address highest,
         Address grad_loss, float factor, Address grad, Address parts, Address stream) {
        Differentiate launch{};
        launch.routing = routing;
        launch.logits = pointer<float>(logits);
        launch.topk_idx = pointer<int64_t>(topk_idx);
        launch.grad_weights = pointer<float>(grad_weights);
        launch.highest = pointer<int>(highest);
        launch.grad_loss = pointer<float>(grad_loss);
        launch.factor = factor;
        launch.grad = pointer<float>(grad);
        launch.parts = pointer<__nv_bfloat16>(parts);
        launch.stream = pointer<CUstream_st>(stream);
        run([&] { return differentiate(launch); });
      },
      py::arg("routing"), py::kw_only(), py::arg("logits"), py::arg("topk_idx"), py::arg("grad_weights"),
      py::arg("highest"), py::arg("grad_loss"), py::arg("factor"), py::arg("grad"), py::arg("parts"),
      py::arg("stream"), "The gradient of the logits: into grad, or as bfloat16 parts; the other 0.");
  module.def(
      "split",
      [](Address x, int64_t count, Address parts, Address stream) {
        const Split launch{pointer<float>(x), count, pointer<__nv_bfloat16>(parts),
                           pointer<CUstream_st>(stream)};
        run([&] { return split(launch); });
      },
      py::kw_only(), py::arg("x"), py::arg("count"), py::arg("parts"), py::arg("stream"),
      "Float32 numbers as bfloat16 parts [4, count]: the third, the second, the first, the first.");
}

}  // namespace moe_ep::router
