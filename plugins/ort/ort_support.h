// ONNX Runtime's C API with C++ manners: errors as exceptions inside the library, never across its
// boundary.
#pragma once

#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "ort_abi.h"

namespace hqmq::ort {

extern Functions api;

class Error : public std::exception {
 public:
  explicit Error(std::string text, int code = kInvalidArgument)
      : text_(std::move(text)), code_(code) {}
  const char* what() const noexcept override { return text_.c_str(); }
  int code() const { return code_; }

 private:
  std::string text_;
  int code_;
};

inline void Check(Status* status) {
  if (status == nullptr) return;
  const std::string text = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(text, kFail);
}

// Whether the call worked; for questions that may be answered "no".
inline bool Works(Status* status) {
  if (status) api.ReleaseStatus(status);
  return status == nullptr;
}

// Runs a function at the boundary: what it throws becomes a Status.
template <class Function>
Status* Guard(Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const Error& error) {
    return api.CreateStatus(error.code(), error.what());
  } catch (const std::exception& error) {
    return api.CreateStatus(kRuntimeException, error.what());
  } catch (...) {
    return api.CreateStatus(kRuntimeException, "unknown failure");
  }
}

using Dims = std::vector<int64_t>;

std::string Text(const Dims& dims);      // "[1, 2, 3]"
std::string TypeName(int element_type);  // "float32"

struct Tensor {
  int type = kUndefined;
  Dims dims;
  void* data = nullptr;  // inputs must not be written

  size_t bytes() const;
};

Tensor ReadTensor(const Value* value);
Tensor Input(const KernelContext* context, size_t index);
// Allocates the output, or gives the buffer bound to it.
Tensor Output(KernelContext* context, size_t index, int type, const Dims& dims);

}  // namespace hqmq::ort
