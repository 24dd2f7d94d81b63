// Codecs with a quarter of the words in their tables, where all would not fit: of hq5, and at
// head_dim 256.
//
// The 12 words of a secondary are p q for the primaries p = 1, i, j, k and (1 ± i ± j ± k) / 2:
// three cosets of {±1, ±i, ±j, ±k}. A word is e times the coset's first word (rows 3s, 3s + 1,
// 3s + 2: 1, (1+i+j+k)/2, (1+i+j-k)/2 times q), which moves and negates its elements; as RowWords
// rounds sums of the same pairs for all of them, these are the bits of the word itself.
//
// Per chunk an address and the word take about 20 instructions and two more wavefronts of shared
// memory: the index becomes s = n / 12 and w = n - 12 s, and w looks up the coset, e's order of
// elements and its signs in two lists of 12 numbers, each in a bank of its own.
#pragma once

#include "decode_compact.cuh"

namespace hqmq {
namespace cuda {

template <class Codec>
struct Cosets : Compact<Codec> {
  using Base = Compact<Codec>;
  // The first of each three rows' four words.
  static constexpr bool kOneTable = false;
  static constexpr int kLeastCopies = 1, kMostCopies = 8;
  static __host__ __device__ constexpr uint32_t TableBytes(uint32_t copies) {
    return Codec::kWords / 4 * 8 * copies;
  }
  static __host__ __device__ constexpr uint32_t ReachBytes(uint32_t) { return 0; }

  struct Lane {
    uint32_t table, stride;  // stride: of three rows
    uint32_t lists;          // address of the two lists
    uint32_t last;           // largest index of the codebook
    typename Codec::Lane own;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView& view, uint32_t table,
                                                uint32_t levels, int lane) {
    return {table, 0, 0, 12u * view.role.secondaries - 1, Codec::LaneOf(view, table, levels, lane)};
  }
  // The role has all copies; the other one may have a table of its own.
  static __device__ __forceinline__ void UseCopies(uint32_t table, uint32_t levels, int copies,
                                                   Copies, int lane, Lane* out) {
    out->lists = levels + kLists;
    out->table = table + 8 * (lane & (copies - 1));
    out->stride = 24 * copies;
  }
  static __device__ __forceinline__ typename Codec::Levels LoadLevels(const Lane& lane) {
    return Codec::LoadLevels(lane.own);
  }

  static __device__ __forceinline__ void Store(uint32_t table, int copies, Copies, int row,
                                               const uint2 (&words)[4]) {
    using F = Filling<Codec>;
    for (int copy = threadIdx.x % F::kParts; copy < copies; copy += F::kParts)
      ptx::StoreShared64(table + 8 * (copies * row + copy), words[0]);
  }

  // The lists lie behind the levels.
  static constexpr uint32_t kLists = 128, kSigns = 64;
  static_assert((1 << (Codec::kCodeBits - Codec::kIndexBits - 1)) * 2 <= kLists,
                "levels end before the lists");
  // By w: 0, 1, 2, 3 for e = 1, i, j, k; whether it is negative; its coset. Two bits each.
  static constexpr uint32_t kElement = 0u | 1u << 2 | 2u << 4 | 3u << 6 | 0u << 8 | 3u << 10 |
                                       2u << 12 | 2u << 14 | 0u << 16 | 1u << 18 | 3u << 20 |
                                       1u << 22;
  static constexpr uint32_t kNegative = 1u << 12 | 1u << 14 | 1u << 18 | 1u << 20 | 1u << 22;
  static constexpr uint32_t kCoset =
      1u << 8 | 2u << 10 | 2u << 12 | 1u << 14 | 2u << 16 | 1u << 18 | 1u << 20 | 2u << 22;
  // First list: the coset's place in bytes above PRMT's selector for the first pair of elements;
  // the second pair's is that ^ 0x4444. Second list: bits 31 and 15 negate the elements of the
  // first pair, bits 30 and 14 those of the second.
  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels,
                                                    int copies) {
    Codec::FillLevels(view, levels);
    const uint32_t w = threadIdx.x;
    if (w >= 12) return;
    const uint32_t e = kElement >> 2 * w & 3, coset = kCoset >> 2 * w & 3;
    const uint32_t order = 0x3210u ^ (e & 1 ? 0x2222u : 0) ^ (e & 2 ? 0x4444u : 0);
    // i (x, y, z, w) = (-y, x, -w, z), j: (-z, w, x, -y), k: (-w, -z, y, x).
    const uint32_t first = e == 0 ? 0 : e == 3 ? 0x80008000u : 0x8000u;
    const uint32_t second = e == 1 ? 0x8000u : e == 2 ? 0x80000000u : 0;
    const uint32_t negative = kNegative >> 2 * w & 1 ? 0x80008000u : 0;
    ptx::StoreShared32(levels + kLists + 4 * w, coset * 8 * copies << 16 | order);
    ptx::StoreShared32(levels + kLists + kSigns + 4 * w,
                       (first ^ negative) | (second ^ negative) >> 1);
  }

  // As in the codec.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(
      const Lane& lane, const typename Codec::Levels& levels,
      const typename Codec::template Slice<kChunks>& slice, int group, uint2 (&out)[kCount]) {
    uint32_t radius[2];
    Codec::template Radii<kCount>(lane.own, levels, slice, group, radius);
    const uint32_t upper = Base::UpperIndices(slice, group);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t code = Base::Index(slice, upper, group, i);
      const uint32_t n = code < lane.last ? code : lane.last;
      const uint32_t s = __umulhi(n, 0x15555556u);  // n / 12
      const uint32_t at = lane.lists + 4 * n - 48 * s;
      const uint32_t where = ptx::LoadTable32(at), signs = ptx::LoadTable32(at + kSigns);
      const uint2 row = ptx::LoadTable64(s * lane.stride + (where >> 16) + lane.table);
      const uint2 word = make_uint2(
          ptx::AndXor(signs, 0x80008000u, ptx::Permute(row.x, row.y, where)),
          ptx::AndXor(signs << 1, 0x80008000u, ptx::Permute(row.x, row.y, where ^ 0x4444u)));
      out[i] = Codec::Times(word, radius, i);
    }
  }
};

// The codec of a compact instance.
template <class Codec, int D>
using CompactOf = std::conditional_t<Codec::kCodeBits == 20 || (Codec::kCodeBits > 12 && D == 256),
                                     Cosets<Codec>, Compact<Codec>>;

}  // namespace cuda
}  // namespace hqmq
