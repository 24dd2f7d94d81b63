// Codes of 20 bits (13 index, 6 level, 1 sign: hq5) of a tile in shared memory to pairs of fp16.
//
// Each role has one table of all 8192 words, 8 bytes each, at a multiple of 64 KiB, so that a shift
// and a LOP3 make an address. The 64 levels are fp16 in 128 bytes of shared memory, two to a bank,
// so that any 32 of them take one wavefront; PRMT makes the address of one (at a multiple of 256).
//
// Per 32 chunks: 10.5 instructions besides the MMA's and 7.1 wavefronts of shared memory (6.1 for
// words, simulated with random indices). At head_dim 128 a tile takes about 32 * 7.1 + 60 = 290
// wavefronts, where its 2816 bytes take 217 cycles of an H100's memory.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

struct Codec20 {
  static constexpr int kCodeBits = 20, kIndexBits = 13;
  static constexpr Gain kGain = Gain::kRms;
  static constexpr uint32_t kTableBytes = 8192 * 8, kTableAlignment = kTableBytes;
  static constexpr int kWords = 8192, kCopies = 1;
  static constexpr int kTableLevels = 1;
  static constexpr bool kShared = false, kTurned = false;
  static constexpr bool kPageMeans = true, kOutliers = false, kCompact = false;
  static constexpr uint32_t kRoleBytes = 0;
  static __device__ __forceinline__ uint32_t WordAt(int i) { return i * 8; }

  template <int D>
  static constexpr int kStageTiles = 1;

  // Where a lane finds its chunks, from `first` on, of token t of half a tile (8 tokens): 16 bits
  // of index and lower level, 4 of upper level and sign.
  struct Where {
    uint32_t code, nibble;
  };
  template <int D>
  static __device__ __forceinline__ Where WhereOf(int t, int first) {
    const int token = t * (D / 8 * 5);
    return {static_cast<uint32_t>(token + 2 * first),
            static_cast<uint32_t>(token + D / 2 + first / 2)};
  }

  // Token of half a tile whose scores are row `row`.
  template <int D>
  static __device__ __forceinline__ int TokenOf(int row) {
    return row;
  }

  template <int kChunks>
  struct Slice {
    uint32_t codes[kChunks / 2], nibble[(kChunks + 7) / 8];
  };
  // Codes of a lane's chunks of one token, from half a tile at address `tile`.
  template <int kChunks>
  static __device__ __forceinline__ Slice<kChunks> Load(uint32_t tile, Where where) {
    Slice<kChunks> out;
    LoadCodes<2 * kChunks>(tile + where.code, out.codes);
    LoadCodes<kChunks / 2>(tile + where.nibble, out.nibble);
    return out;
  }

  // What a lane keeps of one role: addresses of word 0 and of level 0.
  struct Lane {
    uint32_t table, levels;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int) {
    return {table, levels};
  }
  struct Levels {};
  static __device__ __forceinline__ Levels LoadLevels(const Lane&) { return {}; }

  // Radii of chunks 4*group… of a slice, for Times: of the even ones, of the odd ones.
  template <int kCount, int kChunks>
  static __device__ __forceinline__ void Radii(const Lane& lane, const Levels&,
                                               const Slice<kChunks>& slice, int group,
                                               uint32_t (&of)[2]) {
    const uint32_t code[2] = {slice.codes[2 * group],
                              slice.codes[kCount == 4 ? 2 * group + 1 : 2 * group]};
    // Bytes 0, 1: nibbles of chunks 0 and 1, bytes 2, 3: of chunks 2 and 3. Chunks 0, 2 have theirs
    // in the lower half of a byte, 1, 3 in the upper half.
    const uint32_t nibbles = ptx::Permute(slice.nibble[group / 2], 0, group & 1 ? 0x3322 : 0x1100);
    const uint32_t upper = ptx::Permute(code[0], code[1], 0x7531);  // lower level, index 12-8
    // Bytes: twice the levels.
    const uint32_t level =
        (upper >> 4 & 0x0E0E0E0Eu) | (nibbles << 4 & 0x00700070u) | (nibbles & 0x70007000u);
    uint32_t radius[4];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      radius[i] = ptx::LoadTable16(ptx::Permute(level, lane.levels, 0x7650u | i));
    if constexpr (kCount == 2) radius[2] = radius[3] = 0;
    of[0] = ptx::AndXor(nibbles << 12, 0x80008000u, ptx::Permute(radius[0], radius[2], 0x5410));
    of[1] = ptx::AndXor(nibbles, 0x80008000u, ptx::Permute(radius[1], radius[3], 0x5410));
  }
  static __device__ __forceinline__ uint2 Times(uint2 word, const uint32_t (&radius)[2], int i) {
    return TimesRadius(word, radius[i & 1], i & 2);
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
      const uint2 word =
          ptx::LoadTable64(ptx::AndOr(i & 1 ? x >> 13 : x << 3, 8191u << 3, lane.table));
      out[i] = Times(word, radius, i);
    }
  }

  static __device__ __forceinline__ void FillLevels(const RoleView& view, uint32_t levels) {
    if (threadIdx.x >= 32) return;
    const float* two = view.levels + 2 * threadIdx.x;
    ptx::StoreShared32(levels + 4 * threadIdx.x, ptx::PackHalf(two[0], two[1]));
  }
};

}  // namespace cuda
}  // namespace hqmq
