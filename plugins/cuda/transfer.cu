// What hosts need beside the operators, so that they need no CUDA runtime of their own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace hqmq {
namespace cuda {
namespace {

struct ConvertJob {
  const void* x;
  float* out;
  int64_t count;
};

template <class T>
__global__ void ToFloat(ConvertJob job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < job.count) job.out[i] = static_cast<float>(static_cast<const T*>(job.x)[i]);
}

Status Failed(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {HQMQ_CUDA_FAILED, std::string("CUDA: ") + cudaGetErrorString(error)};
}

}  // namespace
}  // namespace cuda
}  // namespace hqmq

using namespace hqmq;

int hqmq_cuda_copy(void* to, const void* from, size_t bytes, void* stream) {
  return Guard([&]() -> Status {
    if (bytes == 0) return {};
    if (!to || !from) return Invalid("to or from is missing");
    return cuda::Failed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                        static_cast<cudaStream_t>(stream)));
  });
}

int hqmq_cuda_to_float(const void* x, int32_t dtype, int64_t count, float* out, void* stream) {
  return Guard([&]() -> Status {
    if (count < 0 || count > 0x7FFFFFFF) return Invalid("count is out of range");
    if (count == 0) return {};
    if (!x || !out) return Invalid("x or out is missing");
    constexpr int kThreads = 256;
    const cuda::ConvertJob job = {x, out, count};
    const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
    const auto on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
      case HQMQ_FLOAT32:
        return cuda::Launch(cuda::ToFloat<float>, grid, kThreads, 0, on, job);
      case HQMQ_FLOAT16:
        return cuda::Launch(cuda::ToFloat<__half>, grid, kThreads, 0, on, job);
      case HQMQ_BFLOAT16:
        return cuda::Launch(cuda::ToFloat<__nv_bfloat16>, grid, kThreads, 0, on, job);
      default:
        return Invalid("unknown dtype of x");
    }
  });
}
