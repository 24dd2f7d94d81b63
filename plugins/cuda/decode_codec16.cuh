// Codes of 16 bits (11 index, 4 level, 1 sign: hq4) of a tile in shared memory to pairs of fp16.
//
// Each role has a table of all 2048 words, 8 bytes each, in kCopies copies side by side, at a
// multiple of its size, so that a shift and a LOP3 make an address. Radii come from registers: PRMT
// looks up the high and low bytes of four fp16 levels at a time, once for levels 0-7 and once for
// 8-15; the tables of bytes are loaded anew for each tile (two broadcasts), as registers are short.
//
// Per 32 chunks: 9 instructions besides the MMA's (shift, LOP3, load, two products, 4 for the
// radius). Wavefronts of shared memory: with 1, 2, 4, 8 copies 6.1, 5.9, 5.3, 4.0 (simulated with
// random indices; 2 without conflicts), so that at head_dim 128 a tile takes about 32 * 5.3 for
// words and 55 for codes, scales and their arrival: 225, where its 2176 bytes take 167 cycles of an
// H100's memory. Shared memory binds, at 3/4 of the speed of memory.
#pragma once

#include "decode_words.cuh"

namespace hqmq {
namespace cuda {

template <int kCopies>
struct Codec16 {
  static constexpr int kCodeBits = 16, kIndexBits = 11;
  static constexpr int kWordShift = kCopies == 1 ? 3 : kCopies == 2 ? 4 : 5;  // of a row's bytes
  static_assert(8 * kCopies == 1 << kWordShift, "1, 2 or 4 copies");
  static constexpr uint32_t kTableBytes = 2048u << kWordShift, kTableAlignment = kTableBytes;
  static constexpr bool kRolesShareTable = false;

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
    const uint32_t at = tile + where.code;
    Slice<kChunks> out;
    if constexpr (kChunks == 2) {
      out.codes[0] = ptx::LoadShared32(at);
    } else if constexpr (kChunks == 4) {
      const uint2 x = ptx::LoadShared64(at);
      out.codes[0] = x.x;
      out.codes[1] = x.y;
    } else {
      static_assert(kChunks % 8 == 0, "chunks of a lane");
#pragma unroll
      for (int i = 0; i < kChunks / 8; ++i) {
        const uint4 x = ptx::LoadShared128(at + 16 * i);
        out.codes[4 * i] = x.x;
        out.codes[4 * i + 1] = x.y;
        out.codes[4 * i + 2] = x.z;
        out.codes[4 * i + 3] = x.w;
      }
    }
    return out;
  }

  // What a lane keeps of one role: addresses of its copy of word 0 and of the levels' bytes.
  struct Lane {
    uint32_t table, levels;
  };
  static __device__ __forceinline__ Lane LaneOf(const RoleView&, uint32_t table, uint32_t levels,
                                                int lane) {
    return {table + (lane & (kCopies - 1)) * 8, levels};
  }
  // Low and high bytes of the 16 levels, for one tile.
  struct Levels {
    uint4 low, high;
  };
  static __device__ __forceinline__ Levels LoadLevels(const Lane& lane) {
    return {ptx::LoadShared128(lane.levels), ptx::LoadShared128(lane.levels + 16)};
  }

  // Chunks 4*group… of a slice, as pairs (0, 1) and (2, 3) of elements without the token's scale.
  template <int kRole, int kChunks, int kCount>
  static __device__ __forceinline__ void Decode(const Lane& lane, const Levels& levels,
                                                const Slice<kChunks>& slice, int group,
                                                uint2 (&out)[kCount]) {
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
    const uint32_t radius[2] = {ptx::AndXor(code[0], 0x80008000u, ptx::Permute(low, high, 0x5140)),
                                ptx::AndXor(code[1], 0x80008000u, ptx::Permute(low, high, 0x7362))};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t x = code[i / 2];
      const uint32_t at = ptx::AndOr(i & 1 ? x >> (16 - kWordShift) : x << kWordShift,
                                     2047u << kWordShift, lane.table);
      const uint2 word = ptx::LoadTable64(at);
      out[i] = TimesRadius(word, radius[i / 2], i & 1);
    }
  }

  // One role's words and levels of head h, by all threads. Codes beyond the codebook get its last
  // word.
  static __device__ __forceinline__ void FillTable(const RoleView& view, int role, int h,
                                                   uint32_t table, uint32_t levels) {
    FillWords<2048>(view, h, [&](int i, uint2 entry) {
#pragma unroll
      for (int copy = 0; copy < kCopies; ++copy)
        ptx::StoreShared64(table + (i << kWordShift) + copy * 8, entry);
    });
    if (threadIdx.x < 8) {  // words of four low bytes, then of four high bytes
      uint32_t bytes = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t level = HalfFromFloat(view.levels[4 * (threadIdx.x & 3) + i]);
        bytes |= (threadIdx.x < 4 ? level & 255 : level >> 8) << (8 * i);
      }
      ptx::StoreShared32(levels + 4 * threadIdx.x, bytes);
    }
  }
};

}  // namespace cuda
}  // namespace hqmq
