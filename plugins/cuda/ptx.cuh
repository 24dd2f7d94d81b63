// The PTX that the kernels use, one small function an instruction. Nothing but wgmma.cuh holds
// inline assembly beside it, so that the emulation on the CPU (tests/cuda_emulation) replaces these
// two files only: by their guards. Shared memory is addressed by 32-bit addresses of the shared
// window (SharedAddress).
#ifndef HQMQ_PTX_CUH_
#define HQMQ_PTX_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// Declares `name`, float4[]: the block's dynamic shared memory.
#define HQMQ_DYNAMIC_SHARED(name) extern __shared__ float4 name[]

namespace hqmq {
namespace cuda {
namespace ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// c [16, 8] += a [16, 16] (row) * b [16, 8] (col), fp16 into float. Lane (r = lane/4, j = lane%4):
// a0 row r, a1 row r+8, columns 2j and 2j+1; a2, a3 the same rows, columns 2j+8, 2j+9; b0 rows 2j,
// 2j+1, b1 rows 2j+8, 2j+9 of column r; c0, c1 row r, c2, c3 row r+8, columns 2j, 2j+1.
__device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c [16, 8] += a [16, 8] (row) * b [8, 8] (col), tf32 into float: of a and b, floats, the 13 lowest
// bits do not count. Lane (r, j): a0 row r, a1 row r+8, column j; a2, a3 the same rows, column j+4;
// b0 row j, b1 row j+4 of column r; c as above. With a0, a1, b0 alone: four columns of a.
__device__ __forceinline__ void MmaTf32(float (&c)[4], float a0, float a1, float a2, float a3,
                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void MmaTf32(float (&c)[4], float a0, float a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3},{%4,%5},{%6},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(b0));
}

// Transposes an 8x8 matrix of 16-bit elements: lane (r, j) holds row r, columns 2j and 2j+1.
__device__ __forceinline__ uint32_t Transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8i + r gives the address of row r
// of matrix i (a multiple of 16), and lane (r, j) gets its row r, columns 2j and 2j+1, as x[i];
// transposed: column r, rows 2j and 2j+1.
__device__ __forceinline__ uint4 LoadMatrices(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}
__device__ __forceinline__ uint4 LoadTransposed(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

// Four bytes of {a: 0-3, b: 4-7}, one a nibble of `selector` (bits 15-0); a nibble with bit 3 gives
// eight copies of that byte's bit 7.
__device__ __forceinline__ uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
  return y;
}

// (x & mask) | base in one instruction.
__device__ __forceinline__ uint32_t AndOr(uint32_t x, uint32_t mask, uint32_t base) {
  uint32_t y;
  asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(base));
  return y;
}

// (x & mask) ^ base in one instruction.
__device__ __forceinline__ uint32_t AndXor(uint32_t x, uint32_t mask, uint32_t base) {
  uint32_t y;
  asm("lop3.b32 %0,%1,%2,%3,0x6A;" : "=r"(y) : "r"(x), "r"(mask), "r"(base));
  return y;
}

// Loads and stores of shared memory. Volatile: they stay in order with barriers and copies.
__device__ __forceinline__ uint32_t LoadShared8(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0,[%1];" : "=r"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ uint32_t LoadShared16(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ uint32_t LoadShared32(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ uint2 LoadShared64(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
  return x;
}
__device__ __forceinline__ uint4 LoadShared128(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}
__device__ __forceinline__ void StoreShared32(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0],%1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void StoreShared64(uint32_t address, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
}
__device__ __forceinline__ void StoreShared128(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

// Entries of the decode tables: written once before a barrier, so that the compiler may move these.
__device__ __forceinline__ uint2 LoadTable64(uint32_t address) {
  uint2 x;
  asm("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
  return x;
}
__device__ __forceinline__ uint32_t LoadTable16(uint32_t address) {
  uint16_t x;
  asm("ld.shared.u16 %0,[%1];" : "=h"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ uint32_t LoadTable32(uint32_t address) {
  uint32_t x;
  asm("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(address));
  return x;
}

// 16 bytes of global into shared memory, past L1. Both addresses are multiples of 16.
__device__ __forceinline__ void CopyAsync16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
// 8 bytes; both addresses are multiples of 8.
__device__ __forceinline__ void CopyAsync8(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(to), "l"(from) : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void CopyCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
__device__ __forceinline__ void CopyWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Bytes of shared memory that a block may have on the GPU that is compiled for.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ / 100 == 12)
constexpr uint32_t kMostShared = 99 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr uint32_t kMostShared = 163 * 1024;
#else
constexpr uint32_t kMostShared = 227 * 1024;
#endif

// Copies of whole tiles by one thread (sm_90): their bytes count against a barrier in shared
// memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kBulkCopies = true;
#else
constexpr bool kBulkCopies = false;
#endif

// A barrier (8 bytes) that `count` threads arrive at.
__device__ __forceinline__ void BarrierInit(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(barrier), "r"(count) : "memory");
}
// Arrives; what the thread wrote before is seen by those who wait.
__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t,[%0];}" ::"r"(barrier) : "memory");
}
// Makes BarrierInit known to copies; by the thread that called it.
__device__ __forceinline__ void BarrierFence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Arrives, and lets the phase end when `bytes` have been copied.
__device__ __forceinline__ void BarrierExpect(uint32_t barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
// Waits for the end of the phase with this parity: 0, 1, 0, …
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    asm volatile(
        "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
#else
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
#endif
  } while (!done);
}
// True in one lane of a whole warp. (Of a branch by it the compiler knows that one lane takes it,
// which saves loops around instructions that want uniform registers.)
__device__ __forceinline__ bool Elect() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p,0xFFFFFFFF; selp.u32 %0,1,0,p;}" : "=r"(elected));
  return elected != 0;
#else
  return (threadIdx.x & 31) == 0;
#endif
}
// `bytes` and both addresses are multiples of 16.
__device__ __forceinline__ void BulkCopy(uint32_t to, const void* from, uint32_t bytes,
                                         uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
          to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// Lets bulk copies overwrite shared memory that this thread has written or read; before the warp
// meets.
__device__ __forceinline__ void ProxyFence() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// x plus that of the lane `offset` before this one, if it is of the same half of the warp.
__device__ __forceinline__ uint32_t AddLower16(uint32_t x, uint32_t offset) {
  uint32_t y;
  asm volatile("{.reg .pred p; shfl.sync.up.b32 %0|p,%1,%2,0x1000,0xFFFFFFFF; @p add.u32 %0,%0,%1;}"
               : "=&r"(y)
               : "r"(x), "r"(offset));
  return y;
}

// Brings the line of an address near. Nothing waits for it.
__device__ __forceinline__ void Prefetch(const void* from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from) : "memory");
}

// 16 bytes that another block wrote during this kernel: past L1.
__device__ __forceinline__ float4 LoadGlobal128(const float* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3},[%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ float LoadGlobal32(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0,[%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}

// Bits of the cache, past L1: each is read once or twice.
__device__ __forceinline__ uint32_t LoadGlobalBits16(const void* from) {
  uint16_t x;
  asm volatile("ld.global.cg.u16 %0,[%1];" : "=h"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ uint32_t LoadGlobalBits32(const void* from) {
  uint32_t x;
  asm volatile("ld.global.cg.u32 %0,[%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// Adds and returns the old value. What the thread, and those that it has met at a barrier, wrote
// before is seen by those who add later and read past L1.
__device__ __forceinline__ uint32_t AddInOrder(uint32_t* to, uint32_t x) {
  uint32_t y;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0,[%1],%2;"
               : "=r"(y)
               : "l"(to), "r"(x)
               : "memory");
  return y;
}

// Products of pairs of fp16; MultiplyLow, MultiplyHigh: by the lower, upper half of b.
__device__ __forceinline__ uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t MultiplyLow(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .f16 l,h; .reg .b32 s; mov.b32 {l,h},%2; mov.b32 s,{l,l}; mul.rn.f16x2 %0,%1,s;}"
      : "=r"(y)
      : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t MultiplyHigh(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("{.reg .f16 l,h; .reg .b32 s; mov.b32 {l,h},%2; mov.b32 s,{h,h}; mul.rn.f16x2 %0,%1,s;}"
      : "=r"(y)
      : "r"(a), "r"(b));
  return y;
}

// Two floats as fp16, `low` in the lower half.
__device__ __forceinline__ uint32_t PackHalf(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

__device__ __forceinline__ float2 FloatsFromHalves(uint32_t x) {
  float2 y;
  asm("{.reg .f16 l,h; mov.b32 {l,h},%2; cvt.f32.f16 %0,l; cvt.f32.f16 %1,h;}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}

// 2^x; 0 for -infinity, NaN for NaN.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler knows nothing: what is made of it is made here, not ahead of a loop to
// wait in local memory.
__device__ __forceinline__ int Late(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Programmatic dependent launch. GridWait: until the kernels before this one are complete and their
// writes are seen. GridTrigger: the next kernel may start. Nothing happens where neither is used.
__device__ __forceinline__ void GridWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void GridTrigger() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
}  // namespace cuda
}  // namespace hqmq

#endif  // HQMQ_PTX_CUH_
