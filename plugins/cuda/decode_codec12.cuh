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
  static constexpr Gain kGain = Gain::kRms;
  static constexpr int kWords = 256, kCopies = 16;
  static constexpr int kTableLevels = 1;
  static constexpr uint32_t kTableBytes = 1 << 16, kTableAlignment = 1 << 16;
  // Both roles' words lie in one table, in halves of its rows.
  static constexpr bool kShared = true, kTurned = false;
  static constexpr bool kPageMeans = true, kOutliers = false, kCompact = false;
  static constexpr uint32_t kRoleBytes = 128;
  static __device__ __forceinline__ uint32_t WordAt(int i) { return i * 256; }

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
    Slice<kChunks> out;
    LoadCodes<kChunks>(tile + where.index, out.index);
    LoadCodes<kChunks / 2>(tile + where.nibble, out.nibble);
    return out;
  }

  // Bytes of the 8 levels.
  struct Levels {
    uint32_t high[2], low[2];
    uint32_t minus;  // four times 0x80
  };
  // What a lane keeps of one role: addresses of its copy of K's word 0 and of the levels.
  struct Lane {
    uint32_t table, levels, minus;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int lane) {
    return {table + CopyOf<Codec12>(0, true, lane), levels, ByLane(0x80808080u, lane)};
  }
  // For one tile. Kept from tile to tile, levels would become uniform registers.
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) {
    const uint4 x = ptx::LoadShared128(lane.levels);
    return {{x.z, x.w}, {x.x, x.y}, lane.minus};
  }

  // Radii of chunks 4*group… of a slice, for Times.
  template <int kCount, int kChunks>
  static __device__ __forceinline__ void Radii(const Lane&, const Levels& levels,
                                               const Slice<kChunks>& slice, int group,
                                               uint32_t (&radius)[2]) {
    const uint32_t nibbles = group & 1 ? slice.nibble[group / 2] >> 16 : slice.nibble[group / 2];
    const uint32_t level = nibbles & 0x7777u;
    const uint32_t sign = ptx::Permute(levels.minus, levels.minus, nibbles);  // 0x80, minus: 0xFF
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
  // kRole: 0 for K, 1 for V.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
    uint32_t radius[2];
    Radii<kCount>(lane, levels, slice, group, radius);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t at = ptx::Permute(slice.index[group], lane.table, 0x7604u | i << 4);
      const uint2 word = ptx::LoadTable64(at + kRole * 128);
      out[i] = Times(word, radius, i);
    }
  }

  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels) {
    StoreEightLevels(view, levels);
  }
};

}  // namespace cuda
}  // namespace hqmq
