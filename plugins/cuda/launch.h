// Launching kernels and reporting what CUDA says.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "host/status.h"
#include "hqmq_cuda.h"

namespace hqmq {
namespace cuda {

// What launches ask of the current GPU.
struct Gpu {
  int multiprocessors, shared_limit, major;  // bytes of shared memory a block may have
};

inline Status CurrentGpu(Gpu* gpu) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount);
  get(&gpu->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&gpu->major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) return {};
  return {HQMQ_CUDA_FAILED, std::string("CUDA: ") + cudaGetErrorString(error)};
}

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
    void* arguments[] = {const_cast<Job*>(&job)};
    cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), arguments, shared, stream);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return {};
  return {HQMQ_CUDA_FAILED, std::string("CUDA: ") + cudaGetErrorString(error)};
}

// The same for a kernel that waits itself for the one before it (ptx::GridWait) and may start while
// that one runs, where the GPU can do this.
template <class Job>
Status LaunchEarly(void (*kernel)(Job), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   const Job& job, const Gpu& gpu) {
  if (gpu.major < 9) return Launch(kernel, grid, threads, shared, stream, job);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(shared));
  if (error == cudaSuccess) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, job);
  }
  if (error == cudaSuccess) return {};
  return {HQMQ_CUDA_FAILED, std::string("CUDA: ") + cudaGetErrorString(error)};
}

}  // namespace cuda
}  // namespace hqmq
