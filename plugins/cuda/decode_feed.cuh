// Tiles of codes on their way into shared memory. Each warp has a ring of its own and fills it
// ahead of its use, across items, so that nothing but the warp itself has to be waited for.
#pragma once

#include "decode_work.cuh"

namespace hqmq {
namespace cuda {

// One or two tiles of a page in shared memory, as they lie in the cache: codes of K, of V, scales
// of K, of V, the page's mean of K; and the barrier that their copies end.
template <class Key, class Value, int D>
struct Stage {
  static constexpr int kTiles = Key::template kStageTiles<D> < Value::template kStageTiles<D>
                                    ? Key::template kStageTiles<D>
                                    : Value::template kStageTiles<D>;
  static constexpr int kKeyToken = D / 4 * Key::kCodeBits / 8;  // bytes
  static constexpr int kValueToken = D / 4 * Value::kCodeBits / 8;
  static constexpr int kKeyTile = kDecodeTile * kKeyToken;
  static constexpr int kValueTile = kDecodeTile * kValueToken;
  static constexpr int kScalesTile = 2 * kDecodeTile;
  static constexpr int kValue = kTiles * kKeyTile;
  static constexpr int kKeyScales = kValue + kTiles * kValueTile;
  static constexpr int kValueScales = kKeyScales + kTiles * kScalesTile;
  static constexpr int kMean = kValueScales + kTiles * kScalesTile;
  static constexpr int kBarrier = kMean + 2 * D;
  static constexpr int kBytes = kBarrier + 16;

  // Tiles of the stage that begins with `tile`; `end`: of the item. They lie in one page.
  static __device__ __forceinline__ int Count(const DecodeJob& job, int tile, int end) {
    if (kTiles == 1 || job.page_shift == 0 || (tile & 1)) return 1;
    return end - tile < 2 ? 1 : 2;
  }
  // Whether the stage that begins with `tile` brings the mean; `first`: of the item.
  static __device__ __forceinline__ bool HasMean(const DecodeJob& job, int tile, int first) {
    return job.attention.key.role.page_mean &&
           (tile == first || (tile & ((1 << job.page_shift) - 1)) == 0);
  }
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
      const Tiles tiles = TilesOf(job, *problem, item % job.splits, warp);
      if (tiles.begin == tiles.end) continue;
      // The shuffles tell the compiler that these are one number for the warp.
      first = tile = __shfl_sync(kAllLanes, tiles.begin, 0);
      end = __shfl_sync(kAllLanes, tiles.end, 0);
      return true;
    }
    tile = end = 0;
    return false;
  }
};

// Bytes of global into shared memory by a warp, 16 at a time.
__device__ __forceinline__ void CopyByLanes(uint32_t to, const char* from, int bytes, int lane) {
  for (int byte = lane * 16; byte < bytes; byte += 16 * kWarp)
    ptx::CopyAsync16(to + byte, from + byte);
}

template <class Key, class Value, int D>
struct Feed {
  using S = Stage<Key, Value, D>;
  Cursor cursor;
  uint32_t tile0;  // number of the sequence's first tile
  uint32_t next;   // stage to fill

  __device__ __forceinline__ void Start(const DecodeJob& job, int first_item, int end_item,
                                        uint32_t ring, int warp, int lane) {
    if constexpr (ptx::kBulkCopies) {
      if (lane == 0 && warp < job.rings) {
        for (int i = 0; i < job.stages; ++i) ptx::BarrierInit(ring + i * S::kBytes + S::kBarrier);
        ptx::BarrierFence();
      }
      __syncwarp();
    }
    next = ring;
    cursor.item = first_item - 1;
    cursor.end_item = end_item;
    NextItem(job, warp);
    for (int i = 0; i + 1 < job.stages; ++i) Fill(job, ring, warp, lane);
  }

  __device__ __forceinline__ void NextItem(const DecodeJob& job, int warp) {
    Problem p;
    if (!cursor.NextItem(job, warp, &p)) return;
    const int page0 = (p.b * job.attention.call.heads + p.h) * job.attention.call.num_pages;
    tile0 = static_cast<uint32_t>(page0) << job.page_shift;
  }

  // Enqueues the next stage, if there is one. Nobody in the warp reads it any more.
  __device__ __forceinline__ void Fill(const DecodeJob& job, uint32_t ring, int warp, int lane) {
    if (cursor.tile < cursor.end) {
      const int count = S::Count(job, cursor.tile, cursor.end);
      const bool has_mean = S::HasMean(job, cursor.tile, cursor.first);
      const uint32_t barrier = next + S::kBarrier;
      if (!ptx::kBulkCopies || lane == 0) {
        const RoleCache& k = job.attention.key.cache;
        const RoleCache& v = job.attention.value.cache;
        const uint32_t tile = tile0 + cursor.tile, page = tile >> job.page_shift;
        if constexpr (ptx::kBulkCopies) {
          ptx::BarrierExpect(barrier, count * (S::kMean / S::kTiles) + (has_mean ? 2 * D : 0));
        }
        const auto copy = [&](uint32_t to, const void* from, uint32_t at, int size, int bytes) {
          const char* place = static_cast<const char*>(from) + static_cast<uint64_t>(at) * size;
          if constexpr (ptx::kBulkCopies) {
            ptx::BulkCopy(next + to, place, bytes, barrier);
          } else {
            CopyByLanes(next + to, place, bytes, lane);
          }
        };
        copy(0, k.codes, tile, S::kKeyTile, count * S::kKeyTile);
        copy(S::kValue, v.codes, tile, S::kValueTile, count * S::kValueTile);
        copy(S::kKeyScales, k.scales, tile, S::kScalesTile, count * S::kScalesTile);
        copy(S::kValueScales, v.scales, tile, S::kScalesTile, count * S::kScalesTile);
        if (has_mean) copy(S::kMean, k.mean, page, 2 * D, 2 * D);
      }
      next = next + S::kBytes == ring + job.stages * S::kBytes ? ring : next + S::kBytes;
      cursor.tile += count;
      if (cursor.tile == cursor.end) NextItem(job, warp);
    }
    if constexpr (!ptx::kBulkCopies) ptx::CopyCommit();
  }

  // Waits for the oldest stage. parity: of the times it was used. All lanes have done with the one
  // before it.
  __device__ __forceinline__ void Wait(const DecodeJob& job, uint32_t stage, uint32_t parity) {
    if constexpr (ptx::kBulkCopies) {
      ptx::BarrierWait(stage + S::kBarrier, parity);
    } else if (job.stages == 2) {  // all but the groups of the stages after this one
      ptx::CopyWait<0>();
    } else if (job.stages == 3) {
      ptx::CopyWait<1>();
    } else {
      ptx::CopyWait<2>();
    }
    __syncwarp();
  }
};

}  // namespace cuda
}  // namespace hqmq
