#pragma once

#include <cuda_runtime_api.h>

#include <cstdarg>
#include <cstdio>
#include <string>
#include <utility>

namespace moe_ep {

// What every host function of csrc returns. Only the Python binding turns it into an exception, so that
// the code below it can be called from anywhere, a thread without the GIL included.
class [[nodiscard]] Status {
 public:
  enum class Code { ok, invalid_argument, cuda_error };

  static Status ok() { return Status(Code::ok, {}); }

  // A printf-style message that names the argument, the value seen and the value allowed.
  __attribute__((format(printf, 1, 2))) static Status invalid(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    return Status(Code::invalid_argument, text);
  }

  static Status from_cuda(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return ok();
    return Status(Code::cuda_error,
                  std::string(doing) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }

  Code code() const { return code_; }
  bool is_ok() const { return code_ == Code::ok; }
  const std::string& message() const { return message_; }

 private:
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  Code code_;
  std::string message_;
};

}  // namespace moe_ep
