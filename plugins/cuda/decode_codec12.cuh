// Codes of 12 bits (8 index, 3 level, 1 sign: hq3) of a tile in shared memory to pairs of fp16.
//
// Per chunk: one PRMT makes the address of its word (rows of 256 bytes at a multiple of 64 KiB, so
// that the index is byte 1 of the address), one load, two products, and its share of the radii. The
// word table has 16 copies of K's and of V's words in each row, one for each pair of banks, so that
// the loads of a half warp never collide. Radii come from registers: PRMT looks up the high and low
// bytes of four fp16 levels at a time.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

struct Codec12 {
  static constexpr int kCodeBits = 12, kIndexBits = 8;
  static constexpr uint32_t kTableBytes = 1 << 16, kTableAlignment = 1 << 16;
  static constexpr bool kRolesShareTable = true;
  static constexpr int kCopies = 16;

  template <int D>
  static constexpr int kStageTiles = D <= 128 ? 2 : 1;

  // Index bytes of a token, then nibbles of level and sign.
  template <int D>
  static constexpr int kIndexRow = D / 4;
  template <int D>
  static constexpr int kNibbleRow = D / 8;
  // Where a lane finds its chunks, from `first` on, of token t of half a tile (8 tokens).
  struct Where {
    uint32_t index, nibble;
  };
  template <int D>
  static __device__ __forceinline__ Where WhereOf(int t, int first) {
    const int token = t * (kIndexRow<D> + kNibbleRow<D>);
    return {static_cast<uint32_t>(token + first),
            static_cast<uint32_t>(token + kIndexRow<D> + first / 2)};
  }

  // Token of half a tile whose scores are row `row`.
  template <int D>
  static __device__ __forceinline__ int TokenOf(int row) {
    return row;
  }

  template <int kChunks>
  struct Slice {
    uint32_t index[(kChunks + 3) / 4], nibble[(kChunks + 7) / 8];
  };
  // Codes of a lane's chunks of one token, from half a tile at address `tile`.
  template <int kChunks>
  static __device__ __forceinline__ Slice<kChunks> Load(uint32_t tile, Where where) {
    const uint32_t index = tile + where.index, nibble = tile + where.nibble;
    Slice<kChunks> out;
    if constexpr (kChunks == 2) {
      out.index[0] = ptx::LoadShared16(index);
      out.nibble[0] = ptx::LoadShared8(nibble);
    } else if constexpr (kChunks == 4) {
      out.index[0] = ptx::LoadShared32(index);
      out.nibble[0] = ptx::LoadShared16(nibble);
    } else if constexpr (kChunks == 8) {
      const uint2 x = ptx::LoadShared64(index);
      out.index[0] = x.x;
      out.index[1] = x.y;
      out.nibble[0] = ptx::LoadShared32(nibble);
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
    }
    return out;
  }

  // Bytes of the 8 levels.
  struct Levels {
    uint32_t high[2], low[2];
  };
  // What a lane keeps of one role.
  struct Lane {
    uint32_t table;  // address of the lane's copy of K's word 0
    Levels levels;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView& view, uint32_t table, uint32_t,
                                                int lane) {
    Lane out = {table + (lane & (kCopies - 1)) * 8, {{0, 0}, {0, 0}}};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t level = HalfFromFloat(view.levels[i]);
      out.levels.high[i / 4] |= (level >> 8) << (8 * (i & 3));
      out.levels.low[i / 4] |= (level & 255) << (8 * (i & 3));
    }
    return out;
  }
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) { return lane.levels; }

  // Chunks 4*group… of a slice, as pairs (0, 1) and (2, 3) of elements without the token's scale.
  // kRole: 0 for K, 1 for V.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
    const uint32_t nibbles = group & 1 ? slice.nibble[group / 2] >> 16 : slice.nibble[group / 2];
    const uint32_t level = nibbles & 0x7777u;
    const uint32_t sign = ptx::Permute(0x80808080u, 0x80808080u, nibbles);  // 0x80, minus: 0xFF
    const uint32_t low = ptx::Permute(levels.low[0], levels.low[1], level);
    const uint32_t high =
        ptx::AndXor(sign << 7, 0x80808080u, ptx::Permute(levels.high[0], levels.high[1], level));
    const uint32_t radius[2] = {ptx::Permute(low, high, 0x5140), ptx::Permute(low, high, 0x7362)};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = ptx::Permute(slice.index[group], lane.table, 0x7604u | i << 4);
      const uint2 word = ptx::LoadTable64(at + kRole * 128);
      out[i] = TimesRadius(word, radius[i / 2], i & 1);
    }
  }

  // One role's words of head h, by all threads. Codes beyond the codebook get its last word.
  static __device__ __forceinline__ void FillTable(const RoleView& view, int role, int h,
                                                   uint32_t table, uint32_t) {
    FillWords<256>(view, h, [&](int i, uint2 entry) {
    // Lanes begin with different copies: rows lie in the same banks.
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy) {
        const int at = (copy + i) & (kCopies - 1);
        ptx::StoreShared64(table + i * 256 + role * 128 + at * 8, entry);
      }
    });
  }
};

}  // namespace cuda
}  // namespace hqmq
