// Codes of 16 bits (11 index, 4 level, 1 sign: hq4) of a tile in shared memory to pairs of fp16.
//
// A table has all 2048 words, 8 bytes each, in kCopies copies side by side: of one role, or of both
// (decode_words.cuh). Radii come from registers: PRMT looks up the high and low bytes of four fp16
// levels at a time, once for levels 0-7 and once for 8-15; the tables of bytes are loaded anew for
// each tile (two broadcasts), as registers are short.
//
// Per 32 chunks: 9 instructions besides the MMA's (two for the address, load, two products, 4 for
// the radius). Wavefronts of shared memory: with 1, 2, 4, 8, 16 copies 6.1, 5.9, 5.3, 4.0, 2.0
// (simulated with random indices), so that with 8 copies at head_dim 128 a tile takes about
// 32 * 4.0 + 37 for codes, scales, levels and their arrival: 165, where its 2144 bytes take 165
// cycles of an H100's memory. With half of 8 copies for each role it is 6.8 instead of 4.0.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

template <int kWordCopies>
struct Codec16 {
  static constexpr int kCodeBits = 16, kIndexBits = 11;
  static constexpr Gain kGain = Gain::kRms;
  static constexpr int kWords = 2048, kCopies = kWordCopies;
  static constexpr int kTableLevels = 1;
  static constexpr int kWordShift = kCopies == 2 ? 4 : kCopies == 4 ? 5 : 6;  // of a word's copies
  static_assert(8 * kCopies == 1 << kWordShift, "2, 4 or 8 copies");
  static constexpr uint32_t kTableBytes = kWords << kWordShift, kTableAlignment = 128;
  static constexpr bool kShared = true, kTurned = true;
  static constexpr bool kPageMeans = true, kOutliers = false, kCompact = false;
  static constexpr uint32_t kRoleBytes = 0;
  static __device__ __forceinline__ uint32_t WordAt(int i) { return i << kWordShift; }

  template <int D>
  static constexpr int kStageTiles = D <= 64 ? 2 : 1;

  // Where a lane finds its chunks, from `first` on, of token t of half a tile (8 tokens).
  struct Where {
    uint32_t code;
  };
  template <int D>
  static __device__ __forceinline__ Where WhereOf(int t, int first) {
    return {static_cast<uint32_t>(t * (D / 2) + 2 * first)};
  }

  // Token of half a tile whose scores are row `row`. At head_dim 128 two tokens fill all banks, and
  // the lanes that load V (rows 0, 2, 4, 6 and then 1, 3, 5, 7) should have even and odd ones.
  template <int D>
  static __device__ __forceinline__ int TokenOf(int row) {
    return D == 128 ? row ^ (row >> 1 & 1) : row;
  }

  template <int kChunks>
  struct Slice {
    uint32_t codes[kChunks / 2];
  };
  // Codes of a lane's chunks of one token, from half a tile at address `tile`.
  template <int kChunks>
  static __device__ __forceinline__ Slice<kChunks> Load(uint32_t tile, Where where) {
    Slice<kChunks> out;
    LoadCodes<2 * kChunks>(tile + where.code, out.codes);
    return out;
  }

  // What a lane keeps of one role: addresses of the table and of the levels' bytes, its copy.
  struct Lane {
    uint32_t table, levels, copy;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int lane) {
    return {table, levels, CopyOf<Codec16>(0, true, lane)};
  }
  static __device__ __forceinline__ void UseCopies(int role, bool all, int lane, Lane* out) {
    out->copy = CopyOf<Codec16>(role, all, lane);
  }
  // Low and high bytes of the 16 levels, for one tile.
  struct Levels {
    uint4 low, high;
  };
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) {
    return {ptx::LoadShared128(lane.levels), ptx::LoadShared128(lane.levels + 16)};
  }

  // Radii of chunks 4*group… of a slice, for Times.
  template <int kCount, int kChunks>
  static __device__ __forceinline__ void Radii(const Lane&, const Levels& levels,
                                               const Slice<kChunks>& slice, int group,
                                               uint32_t (&radius)[2]) {
    const uint32_t code[2] = {slice.codes[2 * group],
                              slice.codes[kCount == 4 ? 2 * group + 1 : 2 * group]};
    const uint32_t upper = ptx::Permute(code[0], code[1], 0x7531);  // sign, level, index 10-8
    // The product brings levels 0, 1 side by side into byte 1, levels 2, 3 into byte 3.
    const uint32_t level = ptx::Permute((upper & 0x38383838u) * 34, 0, 0x4431);  // but for bit 3
    const uint32_t large = ptx::Permute(upper << 1, 0, 0xBA98);                  // 0xFF: bit 3 set
    const uint32_t low = (ptx::Permute(levels.low.z, levels.low.w, level) & large) |
                         (ptx::Permute(levels.low.x, levels.low.y, level) & ~large);
    const uint32_t high = (ptx::Permute(levels.high.z, levels.high.w, level) & large) |
                          (ptx::Permute(levels.high.x, levels.high.y, level) & ~large);
    radius[0] = ptx::AndXor(code[0], 0x80008000u, ptx::Permute(low, high, 0x5140));
    radius[1] = ptx::AndXor(code[1], 0x80008000u, ptx::Permute(low, high, 0x7362));
  }
  static __device__ __forceinline__ uint2 Times(uint2 word, const uint32_t (&radius)[2], int i) {
    return TimesRadius(word, radius[i / 2], i & 1);
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
      const uint32_t x = slice.codes[2 * group + i / 2];
      const uint32_t at = ptx::AndOr(i & 1 ? x >> (16 - kWordShift) : x << kWordShift,
                                     2047u << kWordShift, lane.copy);
      const uint2 word = ptx::LoadTable64(at + lane.table);
      out[i] = Times(word, radius, i);
    }
  }

  // Words of four low bytes, then of four high bytes.
  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels) {
    const int i = threadIdx.x;
    if (i < 8) ptx::StoreShared32(levels + 4 * i, LevelBytes(view, 4 * (i & 3), i < 4 ? 0 : 8));
  }
};

// The same codes of at most 96 secondaries (paper:s96_r4), without page means: tables of 1152
// words, one for each role as their secondaries have nothing in common, so that there are
// kWordCopies of both. kMed3x: with outliers (decode_outliers.cuh). A code beyond the codebook, in
// a damaged cache, reads other shared memory of the block, at most kReach from the table's
// beginning.
template <int kWordCopies, bool kMed3x>
struct SmallCodec16 : Codec16<kWordCopies> {
  static constexpr int kWords = 1152;
  static constexpr Gain kGain = Gain::kMax;
  static constexpr uint32_t kTableBytes = kWords << Codec16<kWordCopies>::kWordShift;
  static constexpr bool kShared = false, kTurned = false;
  static constexpr uint32_t kReach = 2048 << Codec16<kWordCopies>::kWordShift;
  static constexpr bool kPageMeans = false, kOutliers = kMed3x;
};

}  // namespace cuda
}  // namespace hqmq
