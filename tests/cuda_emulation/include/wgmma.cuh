// plugins/cuda/wgmma.cuh for the emulation: the same functions with the meaning that is told there.
// Included before it, and in its place (both have one guard).
//
// Products are made when the thread waits for their group: operands that were changed or given back
// before, and outputs that are read before, show as wrong answers.
#ifndef HQMQ_WGMMA_CUH_
#define HQMQ_WGMMA_CUH_

#include "ptx.cuh"

#define HQMQ_WARPGROUPS 1

namespace hqmq {
namespace cuda {
namespace ptx {

inline void InitBarrier(uint32_t barrier, uint32_t count, HQMQ_HERE) {
  emulation::BarrierInit(barrier, count, site);
}
inline void ArriveAt(uint32_t barrier, HQMQ_HERE) { emulation::BarrierArrive(barrier, 0, site); }
inline void FenceProducts() { emulation::ProxyFence(); }
inline void SyncThreads(int id, int count, HQMQ_HERE) {
  Meet(Meeting::kSyncwarp, nullptr, 0, site);
  emulation::NamedBarrier(id, count, site);
}
template <int kRegisters>
void MoreRegisters() {}
template <int kRegisters>
void FewerRegisters() {}

inline void ProductsBegin() {}
inline void ProductsCommit() { emulation::CommitProducts(); }
template <int kGroups>
void ProductsWait() {
  emulation::WaitProducts(kGroups);
}
template <int kGroups>
void ProductsWaitAfter(float) {
  ProductsWait<kGroups>();
}
template <int N>
void Hold(float (&)[N][4]) {}

// As the hardware reads it: 14 bits each of start, leading and stride offset in units of 16 bytes.
inline uint64_t Operand(uint32_t at, uint32_t part) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | static_cast<uint64_t>(part >> 4) << 16 |
         ((at & 0x3FFFFu) >> 4);
}
inline uint64_t OperandAfter(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }

template <bool kTokens>
float OperandAt(uint64_t b, int k, int column, Site site) {
  const uint32_t start = (b & 0x3FFFu) << 4, leading = (b >> 16 & 0x3FFFu) << 4,
                 stride = (b >> 32 & 0x3FFFu) << 4;
  const uint32_t at =
      kTokens ? start + column / 64 * leading + column % 64 * 2 + k / 8 * stride + k % 8 * 128
              : start + column / 8 * stride + column % 8 * 128 + k * 2;
  uint16_t x;
  emulation::LoadOperand(at ^ (at >> 7 & 7) << 4, &x, sizeof(x), site);
  return FloatFromHalf(x);
}

template <bool kAdd, bool kTokens, int N>
void MultiplyAsync(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, HQMQ_HERE) {
  emulation::AddProduct([&c, &a, b, site] {
    const char* all = Meet(Meeting::kMma, a, sizeof(a), site);
    const int r = emulation::Lane() >> 2, j = emulation::Lane() & 3;
    float left[16][2];
    for (int k = 0; k < 16; ++k)
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = Shown<uint32_t>(all, 4 * r + k % 8 / 2, k / 8 * 2 + half);
        left[k][half] = k % 2 ? HighHalf(pair) : LowHalf(pair);
      }
    for (int n = 0; n < N; ++n)
      for (int i = 0; i < 2; ++i) {
        float sum[2] = {kAdd ? c[n][i] : 0.0f, kAdd ? c[n][2 + i] : 0.0f};
        for (int k = 0; k < 16; ++k) {
          const float right = OperandAt<kTokens>(b, k, 8 * n + 2 * j + i, site);
          for (int half = 0; half < 2; ++half) sum[half] += left[k][half] * right;
        }
        for (int half = 0; half < 2; ++half) c[n][2 * half + i] = sum[half];
      }
  });
}

}  // namespace ptx
}  // namespace cuda
}  // namespace hqmq

#endif  // HQMQ_WGMMA_CUH_
