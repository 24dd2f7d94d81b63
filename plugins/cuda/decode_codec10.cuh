// Codes of 10 bits (7 index, 2 level, 1 sign: hq2.5) of a tile in shared memory to pairs of fp16.
//
// A token has bytes of the index and bit 0 of the level, then pairs of bit 1 of the level and sign.
// The table has all 120 words times each of the 4 levels, in 16 copies, one for each pair of banks,
// so that the loads of a half warp never collide. Rows of 256 bytes at a multiple of 64 KiB make
// the code's byte that of an address; bit 1 of the level is bit 7 of the address. What is left of a
// radius is the sign, a product with 1 or -1, which is exact: so words have the bits that a product
// with the radius would give.
//
// Per 32 chunks: 6 instructions besides the MMA's (2 for the address, 1 for signs, load, two
// products) and 2.0 wavefronts of shared memory.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

struct Codec10 {
  static constexpr int kCodeBits = 10, kIndexBits = 7;
  static constexpr Gain kGain = Gain::kRms;
  static constexpr int kTableLevels = 4;
  static constexpr int kWords = 128 * kTableLevels, kCopies = 16;
  static constexpr uint32_t kTableBytes = kWords * 8 * kCopies, kTableAlignment = 1 << 16;
  static constexpr bool kShared = false, kTurned = false;
  static constexpr bool kPageMeans = true, kOutliers = false, kCompact = false;
  static constexpr uint32_t kRoleBytes = 0;
  // i: index and level.
  static __device__ __forceinline__ uint32_t WordAt(int i) {
    return (i & 255) << 8 | (i & 256) >> 1;
  }

  template <int D>
  static constexpr int kStageTiles = D <= 64 ? 2 : 1;

  // Bits 14, 15, 30 and 31 of this times a byte are its bits 0 to 3; of kUpperPairs: bits 4 to 7.
  static constexpr uint32_t kLowerPairs = (1u << 14) + (1u << 28), kUpperPairs = kLowerPairs >> 4;

  // Where a lane finds its chunks, from `first` on, of token t of half a tile (8 tokens), and which
  // half of a byte of pairs has two chunks.
  struct Where {
    uint32_t index, pair, pairs;
  };
  template <int D>
  static __device__ __forceinline__ Where WhereOf(int t, int first) {
    const int token = t * (D / 16 * 5);
    return {static_cast<uint32_t>(token + first), static_cast<uint32_t>(token + D / 4 + first / 4),
            first & 2 ? kUpperPairs : kLowerPairs};
  }

  // Token of half a tile whose scores are row `row`. At head_dim 64 eight tokens are 40 words:
  // those that lanes load at once (rows 0, 2, 4, 6 and then 1, 3, 5, 7) should be neighbours, in
  // different banks.
  template <int D>
  static __device__ __forceinline__ int TokenOf(int row) {
    return D == 64 ? row >> 1 | (row & 1) << 2 : row;
  }

  // pair: pairs of bits; of two chunks: PairsOf.
  template <int kChunks>
  struct Slice {
    uint32_t index[(kChunks + 3) / 4], pair;
  };
  // Codes of a lane's chunks of one token, from half a tile at address `tile`.
  template <int kChunks>
  static __device__ __forceinline__ Slice<kChunks> Load(uint32_t tile, Where where) {
    Slice<kChunks> out;
    uint32_t pair[1];
    LoadCodes<kChunks>(tile + where.index, out.index);
    LoadCodes<(kChunks + 3) / 4>(tile + where.pair, pair);
    out.pair = kChunks == 2 ? pair[0] * where.pairs : pair[0];
    return out;
  }

  // Levels are in the table.
  struct Levels {};
  // What a lane keeps of one role: its copy in bytes 1 and 3, bytes 2 and 3 of the table's address
  // in bytes 0 and 2. (Byte 3 is 0 unless the block is in a cluster, whose number of it it is.)
  struct Lane {
    uint32_t row;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t,
                                                int lane) {
    return {ptx::Permute(table, CopyOf<Codec10>(0, true, lane), 0x4342)};
  }
  static __device__ __forceinline__ Levels LoadLevels(const Lane&) { return {}; }

  // Of chunks 2*two and 2*two + 1 of a group: bit 1 of the level in bits 14 and 30, sign in bits 15
  // and 31. Other bits may be anything.
  template <int kChunks>
  static __device__ __forceinline__ uint32_t PairsOf(const Slice<kChunks>& slice, int group,
                                                     int two) {
    if constexpr (kChunks == 2) return slice.pair;
    const uint32_t byte = kChunks == 4 ? slice.pair : ptx::Permute(slice.pair, 0, 0x4440u | group);
    return byte * (two ? kUpperPairs : kLowerPairs);
  }

  // Signs of chunks 4*group… of a slice, 1 or -1, for Times.
  template <int kCount, int kChunks>
  static __device__ __forceinline__ void Radii(const Lane&, const Levels&,
                                               const Slice<kChunks>& slice, int group,
                                               uint32_t (&radius)[2]) {
#pragma unroll
    for (int two = 0; two < 2; ++two) {
      radius[two] =
          two < kCount / 2 ? ptx::AndXor(PairsOf(slice, group, two), 0x80008000u, 0x3C003C00u) : 0;
    }
  }
  static __device__ __forceinline__ uint2 Times(uint2 word, const uint32_t (&radius)[2], int i) {
    return TimesRadius(word, radius[i / 2], i & 1);
  }

  // Bits 8 of what WordAt takes of chunks 4*group…, as bytes: of chunks 0, 2, 1, 3.
  template <int kChunks>
  static __device__ __forceinline__ uint32_t UpperIndices(const Slice<kChunks>& slice, int group) {
    const uint32_t upper = PairsOf(slice, group, 0) >> 14 & 0x00010001u;
    if constexpr (kChunks == 2) return upper;
    return ptx::AndOr(PairsOf(slice, group, 1) >> 6, 0x01000100u, upper);
  }

  // Chunks 4*group… of a slice, as pairs (0, 1) and (2, 3) of elements without the token's scale.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
    uint32_t radius[2];
    Radii<kCount>(lane, levels, slice, group, radius);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Bytes 1 and 3: bytes 0 of the addresses of both chunks.
      const uint32_t rows = ptx::AndOr(PairsOf(slice, group, i / 2) << 1, 0x80008000u, lane.row);
      const uint32_t own = i & 1 ? 7 : 5;
      const uint2 word =
          ptx::LoadTable64(ptx::Permute(slice.index[group], rows, 0x6400u | i << 4 | own));
      out[i] = Times(word, radius, i);
    }
  }

  static __device__ __forceinline__ void FillLevels(const RoleView&, uint32_t) {}
};

}  // namespace cuda
}  // namespace hqmq
