// The CUDA runtime of the emulation: launches that wait, and what they are refused for.
#include <map>

#include "cuda_runtime.h"
#include "host/hqmq_host.h"

namespace emulation {
namespace {

constexpr size_t kUsualShared = 48 * 1024;  // that a kernel may have without asking

Gpu gpu = {0, 3, 227 * 1024, 9};
std::map<const void*, int> allowed;  // bytes of dynamic shared memory, by kernel
std::string fault;
cudaError_t last = cudaSuccess;
std::mutex launching;

cudaError_t Refuse(const std::string& text) {
  fault = "emulation: " + text;
  return last = cudaErrorLaunchFailure;
}

}  // namespace

Gpu& CurrentGpu() { return gpu; }

cudaError_t AllowShared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > gpu.shared_limit) return last = cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t Launch(const void* kernel, dim3 grid, dim3 block, size_t shared,
                   const std::function<void()>& run) {
  const std::lock_guard<std::mutex> lock(launching);
  if (grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 65535 || grid.z != 1)
    return Refuse("a grid that cannot be launched");
  if (block.x == 0 || block.x > kMostThreads || block.y != 1 || block.z != 1)
    return Refuse("a block that cannot be launched");
  if (block.x % kWarp) return Refuse("blocks of whole warps only");
  const auto found = allowed.find(kernel);
  const size_t most = found == allowed.end() ? 0 : static_cast<size_t>(found->second);
  if (shared > std::max(most, kUsualShared)) {
    return Refuse("the kernel was not allowed " + std::to_string(shared) +
                  " bytes of shared memory");
  }
  const std::string text = RunGrid(grid.x, grid.y, block.x, static_cast<uint32_t>(shared), run);
  return text.empty() ? cudaSuccess : Refuse(text);
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::gpu.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulation::gpu.shared_limit;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::gpu.major;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last;
  emulation::last = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return emulation::fault.c_str();
  }
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

extern "C" {

// The GPU that calls from now on find. seed: of the random orders; each launch takes the next one.
HQMQ_API void hqmq_emulation_gpu(uint64_t seed, int32_t multiprocessors, int32_t shared_limit,
                                 int32_t major) {
  emulation::gpu = {seed, multiprocessors, shared_limit, major};
}

}  // extern "C"
