// Tiny kernels, right ones and wrong ones, that show what the emulation finds.
#include <cstring>

#include "launch.h"
#include "wgmma.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 64;
constexpr uint32_t kSharedBytes = 2048;

struct FaultJob {
  const uint32_t* in;  // [256], 64-byte aligned
  uint32_t* out;       // [64]
};

__device__ __forceinline__ float4* Memory() {
  HQMQ_DYNAMIC_SHARED(memory);
  return memory;
}
__device__ __forceinline__ uint32_t Base() { return ptx::SharedAddress(Memory()); }

// Each thread gets what its neighbour loaded.
__global__ void Exchange(const __grid_constant__ FaultJob job) {
  const uint32_t at = Base();
  ptx::StoreShared32(at + 4 * threadIdx.x, job.in[threadIdx.x]);
  __syncthreads();
  job.out[threadIdx.x] = ptx::LoadShared32(at + 4 * ((threadIdx.x + 33) % kThreads));
}

__global__ void ExchangeWithoutBarrier(const __grid_constant__ FaultJob job) {
  const uint32_t at = Base();
  ptx::StoreShared32(at + 4 * threadIdx.x, job.in[threadIdx.x]);
  job.out[threadIdx.x] = ptx::LoadShared32(at + 4 * ((threadIdx.x + 33) % kThreads));
}

__global__ void DivergentShuffle(const __grid_constant__ FaultJob job) {
  uint32_t x = job.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(~0u, x, 1);
  __syncwarp();
  job.out[threadIdx.x] = x;
}

__global__ void ShuffleByHalfAWarp(const __grid_constant__ FaultJob job) {
  uint32_t x = job.in[threadIdx.x];
  if (threadIdx.x % 32 < 16) x = __shfl_xor_sync(~0u, x, 1);
  job.out[threadIdx.x] = x;
}

__global__ void BarrierThatOneWarpLeft(const __grid_constant__ FaultJob job) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  job.out[threadIdx.x] = 0;
}

__global__ void TwoBarriers(const __grid_constant__ FaultJob job) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  job.out[threadIdx.x] = 0;
}

template <int kGroups, bool kMeets>
__global__ void Copy(const __grid_constant__ FaultJob job) {
  const uint32_t at = Base();
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x < 16)
      ptx::CopyAsync16(at + 512 * i + 16 * threadIdx.x, job.in + 4 * threadIdx.x);
    ptx::CopyCommit();
  }
  ptx::CopyWait<kGroups>();
  if (kMeets) __syncthreads();
  job.out[threadIdx.x] = ptx::LoadShared32(at + 512 + 4 * threadIdx.x);
}

enum class Bulk { kRight, kUnawaited, kTooFewBytes, kUnfenced };

template <Bulk kind>
__global__ void CopyInBulk(const __grid_constant__ FaultJob job) {
  const uint32_t at = Base(), barrier = at + 1024;
  if (threadIdx.x == 0) ptx::BarrierInit(barrier, 1);
  ptx::StoreShared32(at + 4 * threadIdx.x, 1);
  if (kind != Bulk::kUnfenced) ptx::ProxyFence();
  __syncthreads();
  if (threadIdx.x < 32) {
    if (ptx::Elect()) {
      ptx::BarrierExpect(barrier, kind == Bulk::kTooFewBytes ? 272 : 256);
      ptx::BulkCopy(at, job.in, 256, barrier);
    }
    __syncwarp();
  }
  if (kind != Bulk::kUnawaited) ptx::BarrierWait(barrier, 0);
  job.out[threadIdx.x] = ptx::LoadShared32(at + 4 * threadIdx.x);
}

enum class Product { kRight, kUnfenced, kUnmet, kOneWarp };

// Row r of a is 1 in column r alone: each warp's product has b's rows, of which it keeps a part.
template <Product kind>
__global__ void MultiplyStored(const __grid_constant__ FaultJob job) {
  const uint32_t at = Base();
  const int token = threadIdx.x / 4, r = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  for (int unit = 2 * j; unit < 2 * j + 2; ++unit) {
    uint32_t x[4];
    for (int k = 0; k < 4; ++k)
      x[k] = unit < 2 ? ptx::PackHalf(static_cast<float>(job.in[32 * unit + 4 * token + k]), 0) : 0;
    ptx::StoreShared128(at + 128 * token + 16 * (unit ^ (token & 7)),
                        make_uint4(x[0], x[1], x[2], x[3]));
  }
  if (kind != Product::kUnfenced) ptx::FenceProducts();
  if (kind != Product::kUnmet && (kind != Product::kOneWarp || threadIdx.x < 32))
    ptx::SyncThreads(1, kThreads);
  const uint32_t a[4] = {ptx::PackHalf(2 * j == r, 2 * j + 1 == r), 0, 0, 0};
  float c[8][4];
  ptx::ProductsBegin();
  ptx::MultiplyAsync<false, true>(c, a, ptx::Operand(at, kSharedBytes));
  ptx::ProductsCommit();
  ptx::ProductsWait<0>();
  job.out[threadIdx.x] = static_cast<uint32_t>(threadIdx.x < 32 ? c[0][0] : c[1][0]);
}

__global__ void StoreBehind(const __grid_constant__ FaultJob job) {
  ptx::StoreShared32(Base() + kSharedBytes - 4 * 63 + 4 * threadIdx.x, job.in[threadIdx.x]);
}

__global__ void LoadBehindByPointer(const __grid_constant__ FaultJob job) {
  const float4 x = Memory()[kSharedBytes / 16 - 63 + threadIdx.x];
  job.out[threadIdx.x] = __float_as_uint(x.x);
}

__global__ void StoreBeforeByPointer(const __grid_constant__ FaultJob job) {
  uint32_t* memory = reinterpret_cast<uint32_t*>(Memory());
  memory[static_cast<int>(threadIdx.x) - 1] = job.in[threadIdx.x];
}

__global__ void Misaligned(const __grid_constant__ FaultJob job) {
  job.out[threadIdx.x] = ptx::LoadShared64(Base() + 4 * threadIdx.x).x;
}

__global__ void NullPointer(const __grid_constant__ FaultJob job) {
  if (threadIdx.x == 5)
    *const_cast<volatile uint32_t*>(job.in - reinterpret_cast<uintptr_t>(job.in) / 4) = 1;
}

struct Named {
  const char* name;
  void (*kernel)(FaultJob);
};
constexpr Named kKernels[] = {
    {"exchange", Exchange},
    {"copy", Copy<0, true>},
    {"bulk copy", CopyInBulk<Bulk::kRight>},
    {"product", MultiplyStored<Product::kRight>},
    {"product of unfenced stores", MultiplyStored<Product::kUnfenced>},
    {"product without a barrier", MultiplyStored<Product::kUnmet>},
    {"named barrier of one warp", MultiplyStored<Product::kOneWarp>},
    {"exchange without a barrier", ExchangeWithoutBarrier},
    {"divergent shuffle", DivergentShuffle},
    {"shuffle by half a warp", ShuffleByHalfAWarp},
    {"barrier that one warp left", BarrierThatOneWarpLeft},
    {"two barriers", TwoBarriers},
    {"copy, one group awaited", Copy<1, true>},
    {"copy without a barrier", Copy<0, false>},
    {"bulk copy, not awaited", CopyInBulk<Bulk::kUnawaited>},
    {"bulk copy, other bytes expected", CopyInBulk<Bulk::kTooFewBytes>},
    {"bulk copy over unfenced stores", CopyInBulk<Bulk::kUnfenced>},
    {"store behind", StoreBehind},
    {"load behind by pointer", LoadBehindByPointer},
    {"store before by pointer", StoreBeforeByPointer},
    {"misaligned", Misaligned},
    {"null pointer", NullPointer},
};

}  // namespace
}  // namespace cuda
}  // namespace hqmq

using namespace hqmq;

extern "C" {

// Runs the kernel of that name with `in` [256] and out [64]; 2048 bytes of shared memory, of which
// `shared` are asked for. Returns an hqmq_status; hqmq_cuda_last_error says why.
HQMQ_API int hqmq_emulation_fault(const char* name, const uint32_t* in, uint32_t* out) {
  return Guard([&]() -> Status {
    for (const cuda::Named& named : cuda::kKernels) {
      if (std::strcmp(named.name, name) == 0) {
        return cuda::Launch(named.kernel, dim3(2), cuda::kThreads, cuda::kSharedBytes, nullptr,
                            cuda::FaultJob{in, out});
      }
    }
    return Invalid(std::string("no kernel is called ") + name);
  });
}

}  // extern "C"
