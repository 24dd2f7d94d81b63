// The PTX of warpgroups (sm_90a): matrix products that read their second operand from shared memory
// while the threads go on.
#ifndef HQMQ_WGMMA_CUH_
#define HQMQ_WGMMA_CUH_

#include "ptx.cuh"

// Where these instructions exist; elsewhere the functions do nothing and no kernel may call them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HQMQ_WARPGROUPS 1
#endif

namespace hqmq {
namespace cuda {
namespace ptx {

// A barrier (8 bytes of shared memory) that `count` threads arrive at.
__device__ __forceinline__ void InitBarrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void ArriveAt(uint32_t barrier) {
#ifdef HQMQ_WARPGROUPS
  asm volatile("mbarrier.arrive.shared.b64 _,[%0];" ::"r"(barrier) : "memory");
#endif
}
// Makes this thread's stores to shared memory known to products and copies.
__device__ __forceinline__ void FenceProducts() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
// All of `count` threads of the block that name the same id.
__device__ __forceinline__ void SyncThreads(int id, int count) {
  asm volatile("bar.sync %0,%1;" ::"r"(id), "r"(count) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void MoreRegisters() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void FewerRegisters() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Before the first product after registers that products use were written.
__device__ __forceinline__ void ProductsBegin() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Ends a group of products.
__device__ __forceinline__ void ProductsCommit() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until at most kGroups groups are under way.
template <int kGroups>
__device__ __forceinline__ void ProductsWait() {
#ifdef HQMQ_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}
// The same, not before x, which is never negative, is known: ptxas would otherwise wait first and
// make x, which is what the threads have to do meanwhile, afterwards.
template <int kGroups>
__device__ __forceinline__ void ProductsWaitAfter(float x) {
#ifdef HQMQ_WARPGROUPS
  asm volatile(
      "{.reg .pred p; setp.lt.f32 p,%1,0f00000000; @p nanosleep.u32 20; "
      "wgmma.wait_group.sync.aligned %0;}" ::"n"(kGroups),
      "f"(x)
      : "memory");
#endif
}
// Keeps the compiler from moving uses of accumulators across this place.
template <int N>
__device__ __forceinline__ void Hold(float (&c)[N][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(c[i][k])::"memory");
#endif
}

// Second operand in shared memory: parts of 64 elements, 128 bytes a token, whose 16-byte units lie
// at unit ^ (token & 7); the parts start at multiples of 1024 bytes, `part` bytes apart. Products
// over elements (tokens are its columns): `at` is the first of 16 elements. Products over tokens
// (elements are its columns): `at` is the first of 16 tokens.
__device__ __forceinline__ uint64_t Operand(uint32_t at, uint32_t part) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightTokens = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightTokens | static_cast<uint64_t>(part >> 4) << 16 |
         ((at & 0x3FFFFu) >> 4);
}
// The same, `bytes` further on. An addition instead of an operand made anew, which takes about as
// long as a product: shared memory ends before the address's field does.
__device__ __forceinline__ uint64_t OperandAfter(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

// c [64, N] (+)= a [64, 16] * b, fp16 into float. Warp w of the four has rows 16 w…, its lanes'
// registers as of Mma: c[n] columns 8 n…. kTokens: over 16 tokens, the columns are elements; else
// over 16 elements, the columns are tokens.
template <bool kAdd, bool kTokens>
__device__ __forceinline__ void MultiplyAsync(float (&c)[8][4], const uint32_t (&a)[4],
                                              uint64_t b) {
#ifdef HQMQ_WARPGROUPS
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%37,0; "
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
      "{%32,%33,%34,%35},%36,p,1,1,%38;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0),
        "n"(kTokens ? 1 : 0));
#endif
}
template <bool kAdd, bool kTokens>
__device__ __forceinline__ void MultiplyAsync(float (&c)[16][4], const uint32_t (&a)[4],
                                              uint64_t b) {
#ifdef HQMQ_WARPGROUPS
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%69,0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
      "{%64,%65,%66,%67},%68,p,1,1,%70;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]),
        "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]),
        "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]), "+f"(c[8][3]),
        "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]),
        "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]),
        "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]), "+f"(c[12][2]), "+f"(c[12][3]),
        "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]), "+f"(c[13][3]), "+f"(c[14][0]),
        "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]), "+f"(c[15][0]), "+f"(c[15][1]),
        "+f"(c[15][2]), "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0),
        "n"(kTokens ? 1 : 0));
#endif
}

}  // namespace ptx
}  // namespace cuda
}  // namespace hqmq

#endif  // HQMQ_WGMMA_CUH_
