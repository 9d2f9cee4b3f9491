#include "grouped_gemm/te_api.h"

#include <dlfcn.h>

namespace moe_ep::grouped_gemm {

namespace {

template <typename Function>
bool find(const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  return function != nullptr;
}

}  // namespace

const TeApi* te_api() {
  static TeApi api;
  static bool is_complete = false;
  if (!is_complete) {  // Not for ever: Transformer Engine may come later.
    is_complete = find("nvte_create_tensors", api.create_tensors) &&
                  find("nvte_destroy_tensors", api.destroy_tensors) &&
                  find("nvte_set_tensor_param_v2", api.set_tensor_param) &&
                  find("nvte_create_matmul_config", api.create_config) &&
                  find("nvte_set_matmul_config_attribute", api.set_config) &&
                  find("nvte_destroy_matmul_config", api.destroy_config) &&
                  find("nvte_cublas_gemm_v2", api.gemm);
  }
  return is_complete ? &api : nullptr;
}

}  // namespace moe_ep::grouped_gemm
