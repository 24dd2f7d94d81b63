// Codecs whose tables have as many copies of the words as there is shared memory for: for GPUs with
// less of it than an H100 (DecodeMemory tells how many). The same words at other addresses, so that
// y has the same bits.
//
// Per chunk an address takes 2 to 3 instructions: the index as a number, then times the bytes of a
// word's copies. Wavefronts of shared memory for 32 chunks: 6.1, 5.9, 5.3, 4.0, 2.0 with 1, 2, 4,
// 8, 16 copies.
#pragma once

#include "decode_codec10.cuh"
#include "decode_codec12.cuh"
#include "decode_codec14.cuh"
#include "decode_codec16.cuh"
#include "decode_codec20.cuh"

namespace hqmq {
namespace cuda {

template <class Codec>
struct Compact : Codec {
  using Large = Codec;
  static constexpr bool kCompact = true;
  static constexpr int kCodeBits = Codec::kCodeBits;
  // Both roles have one table, whose copies they halve if V's words are not turned ones of K's.
  // (Codec12 has one too, but with words of both.)
  static constexpr bool kShared = Codec::kTurned, kOneTable = Codec::kTurned;
  static __host__ __device__ constexpr uint32_t TableBytes(uint32_t copies) {
    return Codec::kWords * 8 * copies;
  }
  // From the table's beginning: what codes beyond the codebook, in a damaged cache, read.
  static __host__ __device__ constexpr uint32_t ReachBytes(uint32_t copies) {
    return 8 * copies << Codec::kIndexBits;
  }
  static constexpr int kLeastCopies = Codec::kTurned ? 2 : 1;
  static constexpr int kMostCopies = kCodeBits == 16 ? 8 : 16;

  template <int D>
  static constexpr int kStageTiles = 1;

  // What a lane keeps of one role: address of its copy of word 0, bytes from word to word, and what
  // the codec keeps of levels.
  struct Lane {
    uint32_t table, stride;
    typename Codec::Lane own;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView& view, uint32_t table,
                                                uint32_t levels, int lane) {
    return {table, 0, Codec::LaneOf(view, table, levels, lane)};
  }
  // copies: of the table at address `table`; of them the role has `has`. The other address is that
  // of the levels of the table's role.
  static __device__ __forceinline__ void UseCopies(uint32_t table, uint32_t, int copies, Copies has,
                                                   int lane, Lane* out) {
    const int mine = has == Copies::kAll ? copies : copies / 2;
    const int first = has == Copies::kSecondHalf ? mine : 0;
    out->table = table + 8 * (first + (lane & (mine - 1)));
    out->stride = 8 * copies;
  }
  static __device__ __forceinline__ typename Codec::Levels LoadLevels(const Lane& lane) {
    return Codec::LoadLevels(lane.own);
  }

  // This thread's part of row `row` into a table: kParts threads share the copies.
  static __device__ __forceinline__ void Store(uint32_t table, int copies, Copies which, int row,
                                               const uint2 (&words)[4]) {
    using F = Filling<Codec>;
    const int count = which == Copies::kAll ? copies : copies / 2;
    const int first = which == Copies::kSecondHalf ? count : 0;
    const uint32_t stride = 8 * copies;
    for (int copy = threadIdx.x % F::kParts; copy < count; copy += F::kParts) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        ptx::StoreShared64(table + (4 * row + i) * stride + 8 * (first + copy), words[i]);
    }
  }

  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels, int) {
    Codec::FillLevels(view, levels);
  }

  // Bits 9 and 8 of the indices of four chunks of 14-bit codes, as bytes; bit 1 of the levels of
  // 10-bit codes, whose tables have the words times levels.
  template <class Slice>
  static __device__ __forceinline__ uint32_t UpperIndices(const Slice& slice, int group) {
    if constexpr (kCodeBits == 14) {
      const uint32_t two = ptx::Permute(Codec::Nibbles(slice, group), 0, 0x1100);
      return (two & 0x00030003u) | (two >> 4 & 0x03000300u);
    } else if constexpr (kCodeBits == 10) {
      return Codec::UpperIndices(slice, group);
    }
    return 0;
  }
  // upper: of UpperIndices.
  template <class Slice>
  static __device__ __forceinline__ uint32_t Index(const Slice& slice, uint32_t upper, int group,
                                                   int i) {
    if constexpr (kCodeBits == 12) {
      return ptx::Permute(slice.index[group], 0, 0x4440u | i);
    } else if constexpr (kCodeBits == 14 || kCodeBits == 10) {
      // Bytes 2 and 3: copies of bit 7 of the upper bits, which is 0.
      const uint32_t byte = i, of_upper = 4 + (kCodeBits == 14 ? i : (i & 1) << 1 | i >> 1);
      const uint32_t zero = 8 | of_upper;
      return ptx::Permute(slice.index[group], upper, zero << 12 | zero << 8 | of_upper << 4 | byte);
    } else {
      constexpr uint32_t kMask = (1u << Codec::kIndexBits) - 1;
      const uint32_t x = slice.codes[2 * group + i / 2];
      return (i & 1 ? x >> 16 : x) & kMask;
    }
  }

  // As in the codec.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(
      const Lane& lane, const typename Codec::Levels& levels,
      const typename Codec::template Slice<kChunks>& slice, int group, uint2 (&out)[kCount]) {
    uint32_t radius[2];
    Codec::template Radii<kCount>(lane.own, levels, slice, group, radius);
    const uint32_t upper = UpperIndices(slice, group);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint2 word = ptx::LoadTable64(Index(slice, upper, group, i) * lane.stride + lane.table);
      out[i] = Codec::Times(word, radius, i);
    }
  }
};

}  // namespace cuda
}  // namespace hqmq
