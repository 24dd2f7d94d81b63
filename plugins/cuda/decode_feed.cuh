// Tiles of codes on their way into shared memory. Each warp has a ring of its own and fills it
// ahead of its use, across items, so that nothing but the warp itself has to be waited for.
#pragma once

#include "decode_work.cuh"

namespace hqmq {
namespace cuda {

// A tile in shared memory: codes of K, of V (each in halves of 8 tokens), scales of K, of V, and
// the page's mean of K.
template <class Key, class Value, int D>
struct Stage {
  static constexpr int kKeyToken = D / 4 * Key::kCodeBits / 8;  // bytes
  static constexpr int kValueToken = D / 4 * Value::kCodeBits / 8;
  static constexpr int kValue = kDecodeTile * kKeyToken;
  static constexpr int kKeyScales = kValue + kDecodeTile * kValueToken;
  static constexpr int kValueScales = kKeyScales + 2 * kDecodeTile;
  static constexpr int kMean = kValueScales + 2 * kDecodeTile;
  static constexpr int kBytes = kMean + 2 * D;
};

// Goes through the tiles of a warp, item by item.
struct Cursor {
  int item, end_item;
  int tile, end;  // next tile; both 0 after the last item
  int first;      // of the item

  // Moves on to the next item in which the warp has tiles.
  __device__ __forceinline__ bool NextItem(const DecodeJob& job, int warp, Problem* problem) {
    while (++item < end_item) {
      *problem = ProblemOf(job, item / job.splits);
      const Tiles tiles = TilesOf(*problem, item % job.splits, warp);
      if (tiles.begin == tiles.end) continue;
      first = tile = tiles.begin;
      end = tiles.end;
      return true;
    }
    tile = end = 0;
    return false;
  }
};

// One role's codes of the tiles: pieces of 16 bytes, those of half a tile in kRounds rounds of a
// warp.
template <class Codec, int D>
struct CodeFeed {
  static constexpr int kToken = D / 4 * Codec::kCodeBits / 8, kHalf = 8 * kToken;
  static constexpr int kPieces = kHalf / 16, kRounds = (kPieces + kWarp - 1) / kWarp;
  const char* from;  // the lane's first piece of the next tile
  uint32_t to[kRounds];

  __device__ __forceinline__ void Start(int lane) {
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      // Pieces of tiles that are not planar may lie across tokens; they keep their order.
      const int byte = (lane + k * kWarp) * 16;
      to[k] = Codec::template kPlanar<D> ? Codec::template Place<D>(byte / kToken, byte % kToken)
                                         : byte;
    }
  }
  __device__ __forceinline__ void Seek(const int32_t* codes, int64_t tile, int lane) {
    from = reinterpret_cast<const char*>(codes) + tile * (2 * kHalf) + lane * 16;
  }
  __device__ __forceinline__ void Copy(uint32_t at, int lane) {
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      if (kPieces % kWarp == 0 || lane + k * kWarp < kPieces) {
        ptx::CopyAsync16(at + to[k], from + k * kWarp * 16);
        ptx::CopyAsync16(at + to[k] + kHalf, from + k * kWarp * 16 + kHalf);
      }
    }
    from += 2 * kHalf;
  }
};

template <class Key, class Value, int D>
struct Feed {
  using S = Stage<Key, Value, D>;
  Cursor cursor;
  CodeFeed<Key, D> key;
  CodeFeed<Value, D> value;
  const char* scales;  // lanes 0, 1: K; 2, 3: V
  int page0;           // number of the sequence's first page
  uint32_t next;       // stage to fill

  __device__ __forceinline__ void Start(const DecodeJob& job, int first_item, int end_item,
                                        uint32_t ring, int warp, int lane) {
    next = ring;
    cursor.item = first_item - 1;
    cursor.end_item = end_item;
    key.Start(lane);
    value.Start(lane);
    NextItem(job, warp, lane);
    for (int i = 0; i + 1 < job.stages; ++i) Fill(job, ring, warp, lane);
  }

  __device__ __forceinline__ void NextItem(const DecodeJob& job, int warp, int lane) {
    Problem p;
    if (!cursor.NextItem(job, warp, &p)) return;
    const RoleView& k = job.attention.key;
    const RoleView& v = job.attention.value;
    page0 = (p.b * job.attention.call.heads + p.h) * job.attention.call.num_pages;
    const int64_t tile =
        static_cast<int64_t>(page0) * (k.role.page_size / kDecodeTile) + cursor.tile;
    key.Seek(k.cache.codes, tile, lane);
    value.Seek(v.cache.codes, tile, lane);
    scales = reinterpret_cast<const char*>(lane < 2 ? k.cache.scales : v.cache.scales) +
             tile * (2 * kDecodeTile) + (lane & 1) * 16;
  }

  // Enqueues the next tile, if there is one, and ends a group of copies in any case.
  __device__ __forceinline__ void Fill(const DecodeJob& job, uint32_t ring, int warp, int lane) {
    if (cursor.tile < cursor.end) {
      key.Copy(next, lane);
      value.Copy(next + S::kValue, lane);
      if (lane < 4) ptx::CopyAsync16(next + S::kKeyScales + lane * 16, scales);
      scales += 2 * kDecodeTile;
      const RoleView& k = job.attention.key;
      const int page_tiles = k.role.page_size / kDecodeTile;
      if (k.role.page_mean &&
          (cursor.tile == cursor.first || (cursor.tile & (page_tiles - 1)) == 0)) {
        const int64_t page = page0 + cursor.tile / page_tiles;
        if (lane < D / 8) {
          ptx::CopyAsync16(next + S::kMean + lane * 16,
                           reinterpret_cast<const char*>(k.cache.mean + page * D) + lane * 16);
        }
      }
      next = next + S::kBytes == ring + job.stages * S::kBytes ? ring : next + S::kBytes;
      if (++cursor.tile == cursor.end) NextItem(job, warp, lane);
    }
    ptx::CopyCommit();
  }
};

}  // namespace cuda
}  // namespace hqmq
