// Codes of 14 bits (10 index, 3 level, 1 sign: hq3.5) of a tile in shared memory to pairs of fp16.
//
// Each role has a table of all 1024 words, 8 bytes each, in 8 copies, or both share one with 4
// copies each: the lower 8 bits of the index are byte 1 of an address, and byte 0 has its upper 2
// bits and the copy, so that two PRMTs make an address. Radii come from registers: PRMT looks up
// the high and low bytes of four fp16 levels at a time.
//
// Per 32 chunks: 10.5 instructions besides the MMA's and 4.0 wavefronts of shared memory (simulated
// with random indices; 5.3 with 4 copies). At head_dim 128 a tile takes about 32 * 4.0 + 55 = 183
// wavefronts, where its 1920 bytes take 148 cycles of an H100's memory.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

template <int kCopies>
struct Codec14 {
  static constexpr int kCodeBits = 14, kIndexBits = 10;
  static_assert(kCopies == 4 || kCopies == 8, "copies that fill rows of 64 bytes");
  static constexpr uint32_t kTableBytes = 1 << 16, kTableAlignment = 1 << 16;
  static constexpr bool kRolesShareTable = kCopies == 4;

  static constexpr uint32_t kRoleBytes = kRolesShareTable ? 8 * kCopies : 0;

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
    const uint32_t index = tile + where.index, nibble = tile + where.nibble;
    const uint32_t pair = tile + where.pair;
    Slice<kChunks> out;
    if constexpr (kChunks == 2) {
      out.index[0] = ptx::LoadShared16(index);
      out.nibble[0] = ptx::LoadShared8(nibble);
      out.pair = ptx::LoadShared8(pair) >> where.pair_shift & 15;
    } else if constexpr (kChunks == 4) {
      out.index[0] = ptx::LoadShared32(index);
      out.nibble[0] = ptx::LoadShared16(nibble);
      out.pair = ptx::LoadShared8(pair);
    } else if constexpr (kChunks == 8) {
      const uint2 x = ptx::LoadShared64(index);
      out.index[0] = x.x;
      out.index[1] = x.y;
      out.nibble[0] = ptx::LoadShared32(nibble);
      out.pair = ptx::LoadShared16(pair);
    } else {
      static_assert(kChunks == 16, "chunks of a lane");
      const uint4 x = ptx::LoadShared128(index);
      out.index[0] = x.x;
      out.index[1] = x.y;
      out.index[2] = x.z;
      out.index[3] = x.w;
      const uint2 y = ptx::LoadShared64(nibble);
      out.nibble[0] = y.x;
      out.nibble[1] = y.y;
      out.pair = ptx::LoadShared32(pair);
    }
    return out;
  }

  // Bytes of the 8 levels.
  struct Levels {
    uint32_t high[2], low[2];
  };
  // What a lane keeps of one role.
  struct Lane {
    uint32_t table, levels;  // addresses
    uint32_t copies;         // of the lane's copy in a row, in each byte
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int lane) {
    return {table, levels, (lane & (kCopies - 1)) * 0x08080808u};
  }
  // For one tile.
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) {
    const uint4 x = ptx::LoadShared128(lane.levels);
    return {{x.z, x.w}, {x.x, x.y}};
  }

  // Chunks 4*group… of a slice, as pairs (0, 1) and (2, 3) of elements without the token's scale.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
    const uint32_t nibble = group & 1 ? slice.nibble[group / 2] >> 16 : slice.nibble[group / 2];
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
    const uint32_t radius[2] = {ptx::Permute(low, high, 0x5140), ptx::Permute(low, high, 0x7362)};
    // Bytes 0 of the addresses.
    const uint32_t two = ptx::Permute(nibble, 0, 0x1100);
    const uint32_t row = (two << 6 & 0x00C000C0u) | (two << 2 & 0xC000C000u) | lane.copies;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t low_bytes = ptx::Permute(slice.index[group], row, (i << 4) | (4 + i));
      const uint2 word =
          ptx::LoadTable64(ptx::Permute(low_bytes, lane.table, 0x7610) + kRole * kRoleBytes);
      out[i] = TimesRadius(word, radius[i / 2], i & 1);
    }
  }

  // One role's words and levels of head h, by all threads. Codes beyond the codebook get its last
  // word.
  static __device__ __forceinline__ void FillTable(const RoleView& view, int role, int h,
                                                   uint32_t table, uint32_t levels) {
    FillWords<1024>(view, h, [&](int i, uint2 entry) {
      const uint32_t row = table + (i & 255) * 256 + (i >> 8) * 64 + role * kRoleBytes;
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)  // lanes begin with different ones
        ptx::StoreShared64(row + ((copy + i) & (kCopies - 1)) * 8, entry);
    });
    if (threadIdx.x < 4) {  // words of four low bytes, then of four high bytes
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t level = HalfFromFloat(view.levels[4 * (threadIdx.x & 1) + i]);
        bytes |= (threadIdx.x < 2 ? level & 255 : level >> 8) << (8 * i);
      }
      ptx::StoreShared32(levels + 4 * threadIdx.x, bytes);
    }
  }
};

}  // namespace cuda
}  // namespace hqmq
