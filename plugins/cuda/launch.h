// Launching kernels and reporting what CUDA says.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "host/status.h"
#include "hqmq_cuda.h"

namespace hqmq {
namespace cuda {

// Enqueues kernel(job); `shared` bytes of dynamic shared memory, more than 48 KiB allowed.
template <class Job>
Status Launch(void (*kernel)(Job), dim3 grid, int threads, size_t shared, cudaStream_t stream,
              const Job& job) {
  cudaError_t error = cudaSuccess;
  if (shared > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
  }
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared, stream>>>(job);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return {};
  return {HQMQ_CUDA_FAILED, std::string("CUDA: ") + cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace hqmq
