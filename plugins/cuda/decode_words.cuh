// What the codecs of the decode kernel share: codes from shared memory, words as fp16, the tables
// of words, levels as bytes.
//
// Optimised secondaries of K and V are one set, each turned by a unit quaternion on the right
// (hqmq_trt/codebooks.py). Then v = k t for all words of a head, and K's table serves both: the
// kernel sums V's outputs with K's words and turns the sums by t at the end. Whether it is so is
// found out when a table is filled; if not, each role has half of the copies.
#pragma once

#include "decode_job.h"
#include "decode_tile.cuh"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {

// kBytes (a power of two) at a multiple of kBytes or 16.
template <int kBytes>
__device__ __forceinline__ void LoadCodes(uint32_t at, uint32_t (&out)[(kBytes + 3) / 4]) {
  if constexpr (kBytes == 1) {
    out[0] = ptx::LoadShared8(at);
  } else if constexpr (kBytes == 2) {
    out[0] = ptx::LoadShared16(at);
  } else if constexpr (kBytes == 4) {
    out[0] = ptx::LoadShared32(at);
  } else if constexpr (kBytes == 8) {
    const uint2 x = ptx::LoadShared64(at);
    out[0] = x.x;
    out[1] = x.y;
  } else {
    static_assert(kBytes % 16 == 0, "whole words");
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 x = ptx::LoadShared128(at + 16 * i);
      out[4 * i] = x.x;
      out[4 * i + 1] = x.y;
      out[4 * i + 2] = x.z;
      out[4 * i + 3] = x.w;
    }
  }
}

// A word times the lower or the upper half of `radii`.
__device__ __forceinline__ uint2 TimesRadius(uint2 word, uint32_t radii, bool upper) {
  return upper ? make_uint2(ptx::MultiplyHigh(word.x, radii), ptx::MultiplyHigh(word.y, radii))
               : make_uint2(ptx::MultiplyLow(word.x, radii), ptx::MultiplyLow(word.y, radii));
}

// Low (shift 0) or high (8) bytes of levels first…first+3 as fp16.
__device__ __forceinline__ uint32_t LevelBytes(const RoleView& view, int first, int shift) {
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    bytes |= (static_cast<uint32_t>(HalfFromFloat(view.levels[first + i])) >> shift & 255) << 8 * i;
  return bytes;
}

// Eight levels at address `levels`: words of four low bytes, then of four high bytes.
__device__ __forceinline__ void StoreEightLevels(const RoleView& view, uint32_t levels) {
  const int i = threadIdx.x;
  if (i < 4) ptx::StoreShared32(levels + 4 * i, LevelBytes(view, 4 * (i & 1), i < 2 ? 0 : 8));
}

// x, which ptxas does not know any more to be one number for the warp: it would keep it in a
// uniform register, from which every PRMT that reads it copies it first. (No square is 2 modulo 3.)
__device__ __forceinline__ uint32_t ByLane(uint32_t x, int lane) {
  const uint32_t square = static_cast<uint32_t>(lane * lane);
  return x + (square % 3 >> 1);
}

// Hamilton's product.
__device__ __forceinline__ float4 Product(const float4& a, const float4& b) {
  return make_float4(Fma(-a.w, b.w, Fma(-a.z, b.z, Fma(-a.y, b.y, a.x * b.x))),
                     Fma(-a.w, b.z, Fma(a.z, b.w, Fma(a.y, b.x, a.x * b.y))),
                     Fma(a.w, b.y, Fma(a.z, b.x, Fma(-a.y, b.w, a.x * b.z))),
                     Fma(a.w, b.x, Fma(-a.z, b.y, Fma(a.y, b.z, a.x * b.w))));
}

__device__ __forceinline__ float4 Secondary(const RoleView& view, int h, int s) {
  return reinterpret_cast<const float4*>(
      view.secondaries)[static_cast<int64_t>(h) * view.role.secondaries + s];
}

// A table's rows of four words: row 3s + g has words 4g… of secondary s. Codes beyond the codebook
// get its last word.
struct WordRow {
  int secondary, group;
  bool beyond;
};
__device__ __forceinline__ WordRow RowOf(const RoleView& view, int row) {
  const int last = 3 * view.role.secondaries - 1, at = row < last ? row : last;
  const int secondary = at / 3;
  return {secondary, at - 3 * secondary, row > last};
}

// Words of a row as fp16, from its secondary q: 1, i, j, k times q (group 0), ½(1 ± i ± j ± k)
// times q, +k in group 1 and -k in group 2.
__device__ __forceinline__ void RowWords(const WordRow& row, const float4& q, uint2 (&out)[4]) {
  const float unit[4][4] = {
      {q.x, q.y, q.z, q.w}, {-q.y, q.x, -q.w, q.z}, {-q.z, q.w, q.x, -q.y}, {-q.w, -q.z, q.y, q.x}};
  float word[4][4];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const float one = 0.5f * unit[0][n], i = 0.5f * unit[1][n], j = 0.5f * unit[2][n];
    const float base = Fma(row.group == 2 ? -0.5f : 0.5f, unit[3][n], one);
    word[0][n] = base + (i + j);
    word[1][n] = base - (i - j);
    word[2][n] = base + (i - j);
    word[3][n] = base - (i + j);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if (row.group == 0) word[w][n] = unit[w][n];
    }
  }
#pragma unroll
  for (int w = 0; w < 4; ++w)
    out[w] =
        make_uint2(ptx::PackHalf(word[w][0], word[w][1]), ptx::PackHalf(word[w][2], word[w][3]));
  if (row.beyond) out[0] = out[1] = out[2] = out[3];
}

// How the threads of a block share the rows of a table: kParts a row, each with kRounds rows. A
// table may have the words once for each level, times that: kTableLevels of the codec.
template <class Codec>
struct Filling {
  static constexpr int kRows = Codec::kWords / 4;
  static constexpr int kParts = kRows < kDecodeThreads ? kDecodeThreads / kRows : 1;
  static constexpr int kRounds = (kRows * kParts + kDecodeThreads - 1) / kDecodeThreads;
  // Else the last round is not for all threads.
  static constexpr bool kEven = kRows * kParts % kDecodeThreads == 0;

  static __device__ __forceinline__ int Row(int round) {
    return (threadIdx.x + round * kDecodeThreads) / kParts;
  }
  // Row of words, and the level that they are times.
  static constexpr int kWordRows = kRows / Codec::kTableLevels;
  static_assert(Codec::kTableLevels == 1 || kRounds == 1, "a thread has rows of one level");
  static __device__ __forceinline__ int WordsOf(int row) {
    return Codec::kTableLevels == 1 ? row : row % kWordRows;
  }
  static __device__ __forceinline__ int LevelOf(int row) { return row / kWordRows; }

  // This thread's part of a row: kBytes of copies of each word, in an order that depends on the
  // lane, so that lanes write to different banks.
  template <int kBytes>
  static __device__ __forceinline__ void Store(uint32_t table, int row, const uint2 (&words)[4]) {
    if constexpr (Codec::kCopies == 1) {
      const uint32_t at = table + Codec::WordAt(4 * row);
      ptx::StoreShared128(at, make_uint4(words[0].x, words[0].y, words[1].x, words[1].y));
      ptx::StoreShared128(at + 16, make_uint4(words[2].x, words[2].y, words[3].x, words[3].y));
    } else {
      static_assert(kBytes == 8 ? kParts == 1 : kBytes >= 16 * kParts, "something for all threads");
      constexpr int kUnits = kBytes == 8 ? 1 : kBytes / 16 / kParts;
      const int part = threadIdx.x % kParts * kUnits, first = row & (kUnits - 1);
      const int swap = row >> 2 & 1;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 word = swap ? words[i ^ 1] : words[i];
        const uint32_t at = table + Codec::WordAt(4 * row + (i ^ swap));
        if constexpr (kBytes == 8) {
          ptx::StoreShared64(at, word);
        } else {
#pragma unroll
          for (int unit = 0; unit < kUnits; ++unit)
            ptx::StoreShared128(at + 16 * (part + (unit ^ first)),
                                make_uint4(word.x, word.y, word.x, word.y));
        }
      }
    }
  }
};

// What a thread needs for its part of a role's table.
template <class Codec>
struct LoadedRows {
  float4 q[Filling<Codec>::kRounds];
  float level;  // if the table has words times levels
};

// Fills one role's table with the words of head h; store(row, words) stores this thread's part of
// a row. All threads. Loading and storing are apart, so that loads of both roles are under way
// together.
template <class Codec>
__device__ __forceinline__ void LoadRole(const RoleView& view, int h, LoadedRows<Codec>* out) {
  using F = Filling<Codec>;
#pragma unroll
  for (int i = 0; i < F::kRounds; ++i)
    out->q[i] = Secondary(view, h, RowOf(view, F::WordsOf(F::Row(i))).secondary);
  if constexpr (Codec::kTableLevels > 1) out->level = view.levels[F::LevelOf(F::Row(0))];
}
template <class Codec, class Store>
__device__ __forceinline__ void StoreRole(const RoleView& view, const LoadedRows<Codec>& loaded,
                                          const Store& store) {
  using F = Filling<Codec>;
#pragma unroll
  for (int i = 0; i < F::kRounds; ++i) {
    if (!F::kEven && F::Row(i) >= F::kRows) continue;
    uint2 words[4];
    RowWords(RowOf(view, F::WordsOf(F::Row(i))), loaded.q[i], words);
    if constexpr (Codec::kTableLevels > 1) {
      const uint32_t level = HalfFromFloat(loaded.level);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = TimesRadius(words[w], level, false);
    }
    store(F::Row(i), words);
  }
}

// Brings near what filling the tables for head h will load. All threads.
__device__ __forceinline__ void PrefetchWords(const RoleView& key, const RoleView& value, int h) {
  constexpr int kLine = 128, kHalf = kDecodeThreads / 2;
  const RoleView& view = threadIdx.x < kHalf ? key : value;
  const int line = threadIdx.x % kHalf, secondary = line * (kLine / 16);
  if (secondary < view.role.secondaries) {
    ptx::Prefetch(view.secondaries +
                  (static_cast<int64_t>(h) * view.role.secondaries + secondary) * 4);
  } else if (line == kHalf - 1) {
    ptx::Prefetch(view.levels);
  }
}

// Who has copies of a word.
enum class Copies { kAll, kFirstHalf, kSecondHalf };

// Fills the table of both roles; returns whether K's words and levels are for V, too, and t. If
// not, the first half of the copies is K's. store(copies, row, words) stores this thread's part of
// a row. All threads.
template <class Codec, class Store>
__device__ __forceinline__ bool FillBoth(const RoleView& key, const RoleView& value, int h,
                                         float4* turn, const Store& store) {
  using F = Filling<Codec>;
  static_assert(F::kRounds == 1 && Codec::kCopies > 1, "a row a thread");
  const int row = F::Row(0);
  const WordRow of_key = RowOf(key, row), of_value = RowOf(value, row);
  const float4 k = Secondary(key, h, of_key.secondary), v = Secondary(value, h, of_value.secondary);
  const float4 k0 = Secondary(key, h, 0);
  const float4 t = Product(make_float4(k0.x, -k0.y, -k0.z, -k0.w), Secondary(value, h, 0));
  const float4 x = Product(k, t);
  const float apart = fabsf(x.x - v.x) + fabsf(x.y - v.y) + fabsf(x.z - v.z) + fabsf(x.w - v.w);
  bool same = key.role.secondaries == value.role.secondaries && apart < 4e-6f;
  constexpr int kLevels = 1 << (Codec::kCodeBits - Codec::kIndexBits - 1);
  if (threadIdx.x < kLevels) same = same && key.levels[threadIdx.x] == value.levels[threadIdx.x];
  uint2 words[4];
  RowWords(of_key, k, words);
  *turn = t;
  // Every secondary is some thread's: there are more rows than theirs.
  if (__syncthreads_and(same)) {
    store(Copies::kAll, row, words);
    return true;
  }
  store(Copies::kFirstHalf, row, words);
  RowWords(of_value, v, words);
  store(Copies::kSecondHalf, row, words);
  return false;
}

// Where a lane's copy of a word begins: a role has all copies of it, or half of them.
template <class Codec>
__device__ __forceinline__ uint32_t CopyOf(int role, bool all, int lane) {
  constexpr int kHalf = Codec::kCopies / 2;
  return all ? 8 * (lane & (Codec::kCopies - 1)) : 8 * (role * kHalf + (lane & (kHalf - 1)));
}

}  // namespace cuda
}  // namespace hqmq
