// plugins/cuda/ptx.cuh for the emulation: the same functions with the meaning that is told there.
// Included before it, and in its place (both have one guard).
#ifndef HQMQ_PTX_CUH_
#define HQMQ_PTX_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "codec/numeric.h"

#define HQMQ_DYNAMIC_SHARED(name) \
  float4* const name = reinterpret_cast<float4*>(::emulation::DynamicShared())

namespace hqmq {
namespace cuda {
namespace ptx {

using emulation::Meet;
using emulation::Meeting;
using emulation::Shown;
using emulation::Site;

inline uint32_t SharedAddress(const void* pointer, HQMQ_HERE) {
  return emulation::AddressOf(pointer, site);
}

inline float LowHalf(uint32_t x) { return FloatFromHalf(static_cast<uint16_t>(x)); }
inline float HighHalf(uint32_t x) { return FloatFromHalf(static_cast<uint16_t>(x >> 16)); }

// What a lane shows of its operands, as floats: kA of a (columns kA/2 * … of row r, then row r +
// 8), kB of b. Adds the products of kDepth columns of a and rows of b in their order.
template <int kDepth, int kPairs>
struct Operands {
  float a[kDepth / 4][2];  // [column of the lane][row r, row r + 8]
  float b[kDepth / 4];

  // Column k of a and row k of b: whose, and which of that lane's.
  static int LaneOf(int k) { return kPairs == 2 ? k % 8 / 2 : k % 4; }
  static int IndexOf(int k) { return kPairs == 2 ? k / 8 * 2 + k % 2 : k / 4; }

  void Multiply(float (&c)[4], Site site) const {
    static_assert(sizeof(*this) <= emulation::kSlot, "a slot holds them");
    const char* all = Meet(Meeting::kMma, this, sizeof(*this), site);
    const int r = emulation::Lane() >> 2, j = emulation::Lane() & 3;
    for (int n = 0; n < 2; ++n) {  // column of c
      for (int k = 0; k < kDepth; ++k) {
        const char* row = all + (4 * r + LaneOf(k)) * emulation::kSlot;
        const char* column = all + (4 * (2 * j + n) + LaneOf(k)) * emulation::kSlot;
        const Operands& left = *reinterpret_cast<const Operands*>(row);
        const float right = reinterpret_cast<const Operands*>(column)->b[IndexOf(k)];
        for (int half = 0; half < 2; ++half) c[2 * half + n] += left.a[IndexOf(k)][half] * right;
      }
    }
  }
};

inline void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1, HQMQ_HERE) {
  const Operands<16, 2> mine = {{{LowHalf(a0), LowHalf(a1)},
                                 {HighHalf(a0), HighHalf(a1)},
                                 {LowHalf(a2), LowHalf(a3)},
                                 {HighHalf(a2), HighHalf(a3)}},
                                {LowHalf(b0), HighHalf(b0), LowHalf(b1), HighHalf(b1)}};
  mine.Multiply(c, site);
}

inline float Tf32(uint32_t bits) { return __uint_as_float(bits & 0xFFFFE000u); }
inline float Tf32(float x) { return Tf32(__float_as_uint(x)); }

inline void MmaTf32(float (&c)[4], float a0, float a1, float a2, float a3, uint32_t b0, uint32_t b1,
                    HQMQ_HERE) {
  const Operands<8, 1> mine = {{{Tf32(a0), Tf32(a1)}, {Tf32(a2), Tf32(a3)}}, {Tf32(b0), Tf32(b1)}};
  mine.Multiply(c, site);
}
inline void MmaTf32(float (&c)[4], float a0, float a1, uint32_t b0, HQMQ_HERE) {
  const Operands<4, 1> mine = {{{Tf32(a0), Tf32(a1)}}, {Tf32(b0)}};
  mine.Multiply(c, site);
}

inline uint32_t HalfOf(uint32_t pair, int which) { return which ? pair >> 16 : pair & 0xFFFFu; }

inline uint32_t Transpose(uint32_t x, HQMQ_HERE) {
  const char* all = Meet(Meeting::kTranspose, &x, sizeof(x), site);
  const int r = emulation::Lane() >> 2, j = emulation::Lane() & 3;
  const auto at = [&](int row) { return HalfOf(Shown<uint32_t>(all, 4 * row + r / 2), r % 2); };
  return at(2 * j) | at(2 * j + 1) << 16;
}

template <class T>
T LoadAs(uint32_t address, Site site) {
  T x;
  emulation::Load(address, &x, sizeof(x), site);
  return x;
}

template <bool kTransposed>
uint4 LoadFourMatrices(uint32_t address, Site site) {
  if (address % 16) emulation::Fail("the address of a matrix's row is no multiple of 16", site);
  const char* all = Meet(Meeting::kLoadMatrices, &address, sizeof(address), site);
  const int r = emulation::Lane() >> 2, j = emulation::Lane() & 3;
  uint32_t out[4];
  for (int i = 0; i < 4; ++i) {
    const auto half = [&](int row, int column) {
      const uint32_t from = Shown<uint32_t>(all, 8 * i + row) + 2 * column;
      return static_cast<uint32_t>(LoadAs<uint16_t>(from, site));
    };
    out[i] = kTransposed ? half(2 * j, r) | half(2 * j + 1, r) << 16
                         : half(r, 2 * j) | half(r, 2 * j + 1) << 16;
  }
  return {out[0], out[1], out[2], out[3]};
}
inline uint4 LoadMatrices(uint32_t address, HQMQ_HERE) {
  return LoadFourMatrices<false>(address, site);
}
inline uint4 LoadTransposed(uint32_t address, HQMQ_HERE) {
  return LoadFourMatrices<true>(address, site);
}

inline uint32_t Permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    y |= byte << 8 * i;
  }
  return y;
}
inline uint32_t AndOr(uint32_t x, uint32_t mask, uint32_t base) { return (x & mask) | base; }
inline uint32_t AndXor(uint32_t x, uint32_t mask, uint32_t base) { return (x & mask) ^ base; }

inline uint32_t LoadShared8(uint32_t address, HQMQ_HERE) { return LoadAs<uint8_t>(address, site); }
inline uint32_t LoadShared16(uint32_t address, HQMQ_HERE) {
  return LoadAs<uint16_t>(address, site);
}
inline uint32_t LoadShared32(uint32_t address, HQMQ_HERE) {
  return LoadAs<uint32_t>(address, site);
}
inline uint2 LoadShared64(uint32_t address, HQMQ_HERE) { return LoadAs<uint2>(address, site); }
inline uint4 LoadShared128(uint32_t address, HQMQ_HERE) { return LoadAs<uint4>(address, site); }
inline void StoreShared32(uint32_t address, uint32_t x, HQMQ_HERE) {
  emulation::Store(address, &x, sizeof(x), site);
}
inline void StoreShared64(uint32_t address, uint2 x, HQMQ_HERE) {
  emulation::Store(address, &x, sizeof(x), site);
}
inline void StoreShared128(uint32_t address, uint4 x, HQMQ_HERE) {
  emulation::Store(address, &x, sizeof(x), site);
}
inline uint2 LoadTable64(uint32_t address, HQMQ_HERE) { return LoadAs<uint2>(address, site); }
inline uint32_t LoadTable16(uint32_t address, HQMQ_HERE) { return LoadAs<uint16_t>(address, site); }
inline uint32_t LoadTable32(uint32_t address, HQMQ_HERE) { return LoadAs<uint32_t>(address, site); }

inline void CopyAsync16(uint32_t to, const void* from, HQMQ_HERE) {
  emulation::CopyAsync(to, from, 16, site);
}
inline void CopyAsync8(uint32_t to, const void* from, HQMQ_HERE) {
  emulation::CopyAsync(to, from, 8, site);
}
inline void CopyCommit() { emulation::CopyCommit(); }
template <int kGroups>
void CopyWait() {
  emulation::CopyWait(kGroups);
}

// The emulated GPU gives a block as much as an H100, whatever it is compiled for.
constexpr uint32_t kMostShared = 227 * 1024;
// HQMQ_EMULATED_SM: the architecture whose code a source is compiled for (CMakeLists.txt). Nothing
// but templates of a pair of codecs depends on it.
constexpr bool kBulkCopies = HQMQ_EMULATED_SM >= 90;

inline void BarrierInit(uint32_t barrier, uint32_t count, HQMQ_HERE) {
  emulation::BarrierInit(barrier, count, site);
}
inline void BarrierArrive(uint32_t barrier, HQMQ_HERE) {
  emulation::BarrierArrive(barrier, 0, site);
}
inline void BarrierFence() {}
inline void BarrierExpect(uint32_t barrier, uint32_t bytes, HQMQ_HERE) {
  emulation::BarrierArrive(barrier, bytes, site);
}
inline void BarrierWait(uint32_t barrier, uint32_t parity, HQMQ_HERE) {
  emulation::BarrierWait(barrier, parity, site);
}
inline bool Elect(HQMQ_HERE) {
  Meet(Meeting::kElect, nullptr, 0, site);
  return emulation::Lane() == emulation::Meetings() % emulation::kWarp;  // any, but one of them
}
inline void BulkCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, HQMQ_HERE) {
  emulation::BulkCopy(to, from, bytes, barrier, site);
}
inline void ProxyFence() { emulation::ProxyFence(); }

inline uint32_t AddLower16(uint32_t x, uint32_t offset, HQMQ_HERE) {
  const int lane = emulation::Lane(), from = lane - static_cast<int>(offset);
  const char* all = Meet(Meeting::kShuffle, &x, sizeof(x), site);
  return from >= (lane & 16) ? x + Shown<uint32_t>(all, from) : x;
}

inline void Prefetch(const void*) {}

template <class T>
T LoadGlobal(const void* from, Site site) {
  emulation::CheckAligned(from, sizeof(T), site);
  T x;
  memcpy(&x, from, sizeof(x));
  return x;
}
inline float4 LoadGlobal128(const float* from, HQMQ_HERE) { return LoadGlobal<float4>(from, site); }
inline float LoadGlobal32(const float* from, HQMQ_HERE) { return LoadGlobal<float>(from, site); }
inline uint32_t LoadGlobalBits16(const void* from, HQMQ_HERE) {
  return LoadGlobal<uint16_t>(from, site);
}
inline uint32_t LoadGlobalBits32(const void* from, HQMQ_HERE) {
  return LoadGlobal<uint32_t>(from, site);
}

inline uint32_t AddInOrder(uint32_t* to, uint32_t x) {
  const uint32_t old = *to;
  *to += x;
  return old;
}

inline uint32_t PackHalf(float low, float high) {
  return HalfFromFloat(low) | static_cast<uint32_t>(HalfFromFloat(high)) << 16;
}
inline uint32_t Multiply(uint32_t a, uint32_t b) {
  return PackHalf(LowHalf(a) * LowHalf(b), HighHalf(a) * HighHalf(b));
}
inline uint32_t MultiplyLow(uint32_t a, uint32_t b) {
  return PackHalf(LowHalf(a) * LowHalf(b), HighHalf(a) * LowHalf(b));
}
inline uint32_t MultiplyHigh(uint32_t a, uint32_t b) {
  return PackHalf(LowHalf(a) * HighHalf(b), HighHalf(a) * HighHalf(b));
}
inline float2 FloatsFromHalves(uint32_t x) { return {LowHalf(x), HighHalf(x)}; }

inline float Exp2(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // subnormal results are zeros
}

inline void GridWait() {}
inline void GridTrigger() {}
inline int Late(int x) { return x; }

}  // namespace ptx
}  // namespace cuda
}  // namespace hqmq

#endif  // HQMQ_PTX_CUH_
