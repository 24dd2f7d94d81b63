// Messages to TensorRT's logger, or to stderr where there is none.
#pragma once

#include <NvInferRuntime.h>

#include <stdexcept>
#include <string>

namespace hqmq::trt {

// Something is wrong with a node or a call. Never leaves the library.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

void UseLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

enum class Severity { kError, kWarning };
void Log(Severity severity, const std::string& text) noexcept;

// Runs a function that returns T; what it throws is logged behind `title`, and `failed` returned.
template <class T, class Function>
T Logged(const std::string& title, T failed, Function function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    try {
      Log(Severity::kError, title + error.what());
    } catch (...) {
      Log(Severity::kError, "hqmq-trt: out of memory");
    }
  } catch (...) {
    Log(Severity::kError, "hqmq-trt: unknown failure");
  }
  return failed;
}

}  // namespace hqmq::trt
