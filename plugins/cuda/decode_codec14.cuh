// Codes of 14 bits (10 index, 3 level, 1 sign: hq3.5) of a tile in shared memory to pairs of fp16.
//
// The table has all 1024 words, 8 bytes each, in kCopies copies for both roles (decode_words.cuh).
// The lower 8 bits of the index are byte 1 of an address. With 16 copies the upper two are its bits
// 7 and 16, so that a LOP3, an IMAD and a PRMT make an address; with 8 they are bits 6 and 7. Radii
// come from registers: PRMT looks up the high and low bytes of four fp16 levels at a time.
//
// Per 32 chunks: 10.5 instructions besides the MMA's and, with 16 copies, 2.0 wavefronts of shared
// memory (4.0 if each role has half of them, or with 8 copies; 6.8 with half of 8). At head_dim 128
// a tile takes about 32 * 2.0 + 37 = 101 wavefronts, where its 1920 bytes take 148 cycles of an
// H100's memory.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

template <int kWordCopies>
struct Codec14 {
  static constexpr int kCodeBits = 14, kIndexBits = 10;
  static constexpr Gain kGain = Gain::kRms;
  static constexpr int kWords = 1024, kCopies = kWordCopies;
  static constexpr int kTableLevels = 1;
  static_assert(kCopies == 8 || kCopies == 16, "two or four words in 256 bytes");
  static constexpr uint32_t kTableBytes = kWords * 8 * kCopies, kTableAlignment = 1 << 16;
  static constexpr bool kShared = true, kTurned = true;
  static constexpr bool kPageMeans = true, kOutliers = false, kCompact = false;
  static constexpr uint32_t kRoleBytes = 0;
  static __device__ __forceinline__ uint32_t WordAt(int i) {
    if constexpr (kCopies == 8) return (i & 255) << 8 | i >> 8 << 6;
    return (i & 255) << 8 | (i & 256) >> 1 | (i & 512) << 7;
  }

  template <int D>
  static constexpr int kStageTiles = D <= 64 ? 2 : 1;

  // Where a lane finds its chunks, from `first` on, of token t of half a tile (8 tokens): bytes of
  // the index, nibbles of index and level, pairs of bits of level and sign.
  struct Where {
    uint32_t index, nibble, pair, pair_shift;
  };
  template <int D>
  static __device__ __forceinline__ Where WhereOf(int t, int first) {
    const int token = t * (D / 16 * 7);
    return {static_cast<uint32_t>(token + first), static_cast<uint32_t>(token + D / 4 + first / 2),
            static_cast<uint32_t>(token + D / 8 * 3 + first / 4),
            static_cast<uint32_t>(2 * (first & 3))};
  }

  // Token of half a tile whose scores are row `row`.
  template <int D>
  static __device__ __forceinline__ int TokenOf(int row) {
    return row;
  }

  template <int kChunks>
  struct Slice {
    uint32_t index[(kChunks + 3) / 4], nibble[(kChunks + 7) / 8], pair;
  };
  // Codes of a lane's chunks of one token, from half a tile at address `tile`.
  template <int kChunks>
  static __device__ __forceinline__ Slice<kChunks> Load(uint32_t tile, Where where) {
    Slice<kChunks> out;
    uint32_t pair[1];
    LoadCodes<kChunks>(tile + where.index, out.index);
    LoadCodes<kChunks / 2>(tile + where.nibble, out.nibble);
    LoadCodes<(kChunks + 3) / 4>(tile + where.pair, pair);
    out.pair = kChunks == 2 ? pair[0] >> where.pair_shift & 15 : pair[0];
    return out;
  }

  // Bytes of the 8 levels.
  struct Levels {
    uint32_t high[2], low[2];
  };
  // What a lane keeps of one role: addresses, and its copy in each byte.
  struct Lane {
    uint32_t table, levels, copies;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int lane) {
    return {table, levels, CopyOf<Codec14>(0, true, lane) * 0x01010101u};
  }
  static __device__ __forceinline__ void UseCopies(int role, bool all, int lane, Lane* out) {
    out->copies = CopyOf<Codec14>(role, all, lane) * 0x01010101u;
  }
  // For one tile.
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) {
    const uint4 x = ptx::LoadShared128(lane.levels);
    return {{x.z, x.w}, {x.x, x.y}};
  }

  // Nibbles of chunks 4*group… of a slice: bits 9 and 8 of the index below bits 1 and 0 of the
  // level.
  template <int kChunks>
  static __device__ __forceinline__ uint32_t Nibbles(const Slice<kChunks>& slice, int group) {
    return group & 1 ? slice.nibble[group / 2] >> 16 : slice.nibble[group / 2];
  }
  // Radii of these chunks, for Times.
  template <int kCount, int kChunks>
  static __device__ __forceinline__ void Radii(const Lane&, const Levels& levels,
                                               const Slice<kChunks>& slice, int group,
                                               uint32_t (&radius)[2]) {
    const uint32_t nibble = Nibbles(slice, group);
    // Nibbles of level and sign: bits 0, 1 from `nibble`, bits 2, 3 from `pair`.
    uint32_t upper = kChunks == 16                 ? ptx::Permute(slice.pair, 0, 0x4440u | group)
                     : kChunks == 8 && (group & 1) ? slice.pair >> 8
                     : kChunks == 8                ? slice.pair & 0xFFu
                                                   : slice.pair;
    upper = (upper | upper << 4) & 0x0F0Fu;
    upper = (upper | upper << 2) & 0x3333u;
    const uint32_t nibbles = (nibble >> 2 & 0x3333u) | upper << 2;
    const uint32_t level = nibbles & 0x7777u;
    const uint32_t sign = ptx::Permute(0x80808080u, 0x80808080u, nibbles);  // 0x80, minus: 0xFF
    const uint32_t low = ptx::Permute(levels.low[0], levels.low[1], level);
    const uint32_t high =
        ptx::AndXor(sign << 7, 0x80808080u, ptx::Permute(levels.high[0], levels.high[1], level));
    radius[0] = ptx::Permute(low, high, 0x5140);
    radius[1] = ptx::Permute(low, high, 0x7362);
  }
  static __device__ __forceinline__ uint2 Times(uint2 word, const uint32_t (&radius)[2], int i) {
    return TimesRadius(word, radius[i / 2], i & 1);
  }

  // Chunks 4*group… of a slice, as pairs (0, 1) and (2, 3) of elements without the token's scale.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
    const uint32_t nibble = Nibbles(slice, group);
    uint32_t radius[2];
    Radii<kCount>(lane, levels, slice, group, radius);
    if constexpr (kCopies == 16) {
      const uint32_t copy = lane.table | (lane.copies & 0xFFu);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // Bits 0 and 1 of the nibble as 7 and 16 of the address; byte 1 has remains of them.
        const uint32_t of_two = (i & 2 ? nibble >> 8 : nibble) & (3u << 4 * (i & 1));
        const uint32_t at =
            of_two * (i & 1 ? (1u << 3) + (1u << 11) : (1u << 7) + (1u << 15)) + copy;
        const uint2 word = ptx::LoadTable64(ptx::Permute(at, slice.index[group], 0x3240u | i << 4));
        out[i] = Times(word, radius, i);
      }
    } else {
      // Bytes 0 of the addresses.
      const uint32_t two = ptx::Permute(nibble, 0, 0x1100);
      const uint32_t row = (two << 6 & 0x00C000C0u) | (two << 2 & 0xC000C000u) | lane.copies;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const uint32_t low_bytes = ptx::Permute(slice.index[group], row, (i << 4) | (4 + i));
        const uint2 word = ptx::LoadTable64(ptx::Permute(low_bytes, lane.table, 0x7610));
        out[i] = Times(word, radius, i);
      }
    }
  }

  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels) {
    StoreEightLevels(view, levels);
  }
};

}  // namespace cuda
}  // namespace hqmq
