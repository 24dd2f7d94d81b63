// The part of CUDA that the kernels use, for the host compiler. Only for kernels of plugins/cuda.
#pragma once

// Headers of the C++ library first: some use attributes by the names that CUDA takes below.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <vector>

#include "emulation.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// Static shared memory: blocks run one after the other.
#define __shared__ static

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// Arithmetic.

using std::isinf;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<uint32_t>(x)) : 32; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  shift &= 31;
  return shift ? high << shift | low >> (32 - shift) : high;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// One thread runs at a time.
inline int atomicAdd(int* to, int x) {
  const int old = *to;
  *to += x;
  return old;
}
inline int atomicAnd(int* to, int x) {
  const int old = *to;
  *to &= x;
  return old;
}

// Threads that meet.

namespace emulation {

inline void CheckMask(unsigned mask, Site site) {
  if (mask != ~0u) Fail("the emulation knows collectives of whole warps only", site);
}

template <class T>
T FromLane(unsigned mask, T x, int lane, Site site) {
  CheckMask(mask, site);
  return Shown<T>(Meet(Meeting::kShuffle, &x, sizeof(x), site), lane);
}

inline uint32_t Votes(unsigned mask, bool mine, Site site) {
  CheckMask(mask, site);
  const char* all = Meet(Meeting::kVote, &mine, sizeof(mine), site);
  uint32_t votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= static_cast<uint32_t>(Shown<bool>(all, i)) << i;
  return votes;
}

template <class T, class Choose>
T Reduce(unsigned mask, T mine, Choose choose, Site site) {
  CheckMask(mask, site);
  const char* all = Meet(Meeting::kReduce, &mine, sizeof(mine), site);
  T result = Shown<T>(all, 0);
  for (int i = 1; i < kWarp; ++i) result = choose(result, Shown<T>(all, i));
  return result;
}

}  // namespace emulation

inline void __syncwarp(HQMQ_HERE) {
  emulation::Meet(emulation::Meeting::kSyncwarp, nullptr, 0, site);
}
inline void __syncthreads(HQMQ_HERE) {
  emulation::Syncthreads(emulation::Sync::kPlain, false, site);
}
inline int __syncthreads_and(int x, HQMQ_HERE) {
  return emulation::Syncthreads(emulation::Sync::kAnd, x != 0, site);
}
inline int __syncthreads_or(int x, HQMQ_HERE) {
  return emulation::Syncthreads(emulation::Sync::kOr, x != 0, site);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane, HQMQ_HERE) {
  return emulation::FromLane(mask, x, lane & 31, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset, HQMQ_HERE) {
  return emulation::FromLane(mask, x, (emulation::Lane() ^ offset) & 31, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int offset, HQMQ_HERE) {
  const int lane = emulation::Lane();
  return emulation::FromLane(mask, x, lane < offset ? lane : lane - offset, site);
}
inline uint32_t __ballot_sync(unsigned mask, int x, HQMQ_HERE) {
  return emulation::Votes(mask, x != 0, site);
}
inline int __any_sync(unsigned mask, int x, HQMQ_HERE) {
  return emulation::Votes(mask, x != 0, site) != 0;
}
inline uint32_t __reduce_max_sync(unsigned mask, uint32_t x, HQMQ_HERE) {
  return emulation::Reduce(mask, x, [](uint32_t a, uint32_t b) { return max(a, b); }, site);
}
inline int __reduce_add_sync(unsigned mask, int x, HQMQ_HERE) {
  return emulation::Reduce(mask, x, [](int a, int b) { return a + b; }, site);
}
inline uint32_t __reduce_min_sync(unsigned mask, uint32_t x, HQMQ_HERE) {
  return emulation::Reduce(mask, x, [](uint32_t a, uint32_t b) { return min(a, b); }, site);
}
inline int __reduce_min_sync(unsigned mask, int x, HQMQ_HERE) {
  return emulation::Reduce(mask, x, [](int a, int b) { return min(a, b); }, site);
}

// The runtime.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
typedef void* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
// Of cudaErrorLaunchFailure: what the last launch that failed did.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);

namespace emulation {
// kernel: only what tells it from others.
cudaError_t AllowShared(const void* kernel, int bytes);
cudaError_t Launch(const void* kernel, dim3 grid, dim3 block, size_t shared,
                   const std::function<void()>& run);
}  // namespace emulation

template <class Job>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Job), cudaFuncAttribute, int value) {
  return emulation::AllowShared(reinterpret_cast<const void*>(kernel), value);
}
template <class Job>
cudaError_t cudaLaunchKernel(void (*kernel)(Job), dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  const Job& job = *static_cast<const Job*>(arguments[0]);
  return emulation::Launch(reinterpret_cast<const void*>(kernel), grid, block, shared,
                           [&] { kernel(job); });
}
template <class Job>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Job),
                               const Job& job) {
  return emulation::Launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                           config->dynamicSmemBytes, [&] { kernel(job); });
}
