// libhqmq_cuda.so, found beside this library when a node is placed on the CUDA execution provider:
// this library itself loads where there is no CUDA.
#pragma once

#include "cuda/hqmq_cuda.h"
#include "ort_support.h"

namespace hqmq::ort {

#define HQMQ_CUDA_FUNCTIONS(X)     \
  X(hqmq_cuda_format_version)      \
  X(hqmq_cuda_version)             \
  X(hqmq_cuda_role_params_size)    \
  X(hqmq_cuda_role_cache_size)     \
  X(hqmq_cuda_last_error)          \
  X(hqmq_cuda_append_workspace)    \
  X(hqmq_cuda_append)              \
  X(hqmq_cuda_load)                \
  X(hqmq_cuda_attention_workspace) \
  X(hqmq_cuda_attention)           \
  X(hqmq_cuda_copy)                \
  X(hqmq_cuda_to_float)

struct CudaLibrary {
#define X(name) decltype(&::name) name = nullptr;
  HQMQ_CUDA_FUNCTIONS(X)
#undef X

  // Raises what a function of the library returned.
  void Check(int status) const {
    if (status == HQMQ_OK) return;
    const bool fault = status == HQMQ_CUDA_FAILED || status == HQMQ_INTERNAL;
    throw Error(hqmq_cuda_last_error(), fault ? kRuntimeException : kInvalidArgument);
  }
};

// The library, loaded at the first call that finds it. Throws Error if it is missing or of another
// version.
const CudaLibrary& LoadCudaLibrary();

}  // namespace hqmq::ort
