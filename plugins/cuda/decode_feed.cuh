// Tiles of codes on their way into shared memory. Each warp has a ring of its own and fills it
// ahead of its use, across items, so that nothing but the warp itself has to be waited for.
#pragma once

#include "decode_work.cuh"

namespace hqmq {
namespace cuda {

// One or two tiles of a page in shared memory, as they lie in the cache: codes of K, of V, scales
// of K, of V, the page's mean of K, if there are means; and the barrier that their copies end.
template <class Key, class Value, int D>
struct Stage {
  static constexpr int kTiles = Key::template kStageTiles<D> < Value::template kStageTiles<D>
                                    ? Key::template kStageTiles<D>
                                    : Value::template kStageTiles<D>;
  // Four query rows: whether weights of both tiles of a stage are made together.
  static constexpr bool kPairs = kTiles == 2 && !Key::kOutliers;
  static constexpr int kKeyToken = D / 4 * Key::kCodeBits / 8;  // bytes
  static constexpr int kValueToken = D / 4 * Value::kCodeBits / 8;
  static constexpr int kKeyTile = kDecodeTile * kKeyToken;
  static constexpr int kValueTile = kDecodeTile * kValueToken;
  static_assert(Key::kGain == Value::kGain, "scales of both roles have the same width");
  static constexpr int kScaleBytes = ScaleBits(Key::kGain) / 8;
  static constexpr int kScalesTile = kScaleBytes * kDecodeTile;
  static_assert(kScalesTile % 16 == 0, "what copies are multiples of");
  static constexpr int kValue = kTiles * kKeyTile;
  static constexpr int kKeyScales = kValue + kTiles * kValueTile;
  static constexpr int kValueScales = kKeyScales + kTiles * kScalesTile;
  static constexpr int kMean = kValueScales + kTiles * kScalesTile;
  // Compact instances of head_dim 256 read means where they lie, as they would take 8 KB.
  static constexpr bool kMeans = Key::kPageMeans && !(Key::kCompact && D > 128);
  static constexpr int kBarrier = kMean + (kMeans ? 2 * D : 0);
  static constexpr int kBytes = kBarrier + 16;

  // Bits of fp16 of the scale at that address.
  static __device__ __forceinline__ uint32_t LoadScale(uint32_t at) {
    if constexpr (kScaleBytes == 1) return ptx::LoadShared8(at) << 7;
    return ptx::LoadShared16(at);
  }

  // Tiles of the stage that begins with `tile`; `end`: of the item. They lie in one page.
  static __device__ __forceinline__ int Count(const DecodeJob& job, int tile, int end) {
    if constexpr (kTiles == 1) return 1;
    return tile + 1 == end ? 1 : 1 + (job.pair_mask & ~tile);
  }
};

// Which stages bring their page's mean: the first of an item and those that begin a page.
struct MeanStages {
  int next;  // first tile of the next one

  __device__ __forceinline__ void Start(const DecodeJob& job, int first) {
    next = first | job.no_mean;
  }
  // Of the stages of an item in order.
  __device__ __forceinline__ bool Has(const DecodeJob& job, int tile) {
    const bool has = tile == next;
    if (has) next = (tile | job.page_mask) + 1;
    return has;
  }
};

// Goes through the tiles of a warp, item by item. kRings: warps that take tiles.
template <int kRings, bool kByWork>
struct Cursor {
  using P = ProblemType<kByWork>;
  int item, end_item;
  int tile, end;  // next tile; both 0 after the last item
  MeanStages means;

  // Moves on to the next item in which the warp has tiles. held: a problem that is known, and its
  // number.
  __device__ __forceinline__ bool NextItem(const DecodeJob& job, int warp, const P& held,
                                           int held_index, P* problem) {
    while (++item < end_item) {
      const Item of = ItemAt<kByWork>(job, item);
      const int index = of.problem, split = of.split;
      *problem = index == held_index ? held : ProblemOf<kByWork>(job, index, held.piece);
      const Tiles tiles = TilesOf<kRings>(*problem, split, warp);
      // What comes next is the next problem's.
      if (kByWork && split + 1 >= problem->splits) item |= (1 << kItemBits) - 1;
      if (tiles.begin == tiles.end) continue;
      // The shuffles tell the compiler that these are one number for the warp.
      tile = __shfl_sync(kAllLanes, tiles.begin, 0);
      end = __shfl_sync(kAllLanes, tiles.end, 0);
      means.Start(job, tile);
      return true;
    }
    tile = end = 0;
    return false;
  }
};

// Bytes of global into shared memory by a warp, 16 at a time.
__device__ __forceinline__ void CopyByLanes(uint32_t to, const void* from, int bytes, int lane) {
  for (int byte = lane * 16; byte < bytes; byte += 16 * kWarp)
    ptx::CopyAsync16(to + byte, static_cast<const char*>(from) + byte);
}

// What a stage without a page gets: scales that are NaN, so that rows that see its tokens become
// NaN, and codes that are valid, so that no others do. The mean of K may be anything.
template <class S>
struct NoPage {
  static __device__ __forceinline__ const void* Scales() {
    constexpr uint32_t kNan = 0xFFFFFFFFu;  // as fp16 and as short scales
    alignas(16) static __device__ const uint32_t scales[kDecodeTile] = {
        kNan, kNan, kNan, kNan, kNan, kNan, kNan, kNan,
        kNan, kNan, kNan, kNan, kNan, kNan, kNan, kNan};
    static_assert(sizeof(scales) >= S::kTiles * S::kScalesTile, "two tiles");
    return scales;
  }
  static __device__ __forceinline__ const void* Codes() {
    constexpr int kMost = S::kKeyTile > S::kValueTile ? S::kKeyTile : S::kValueTile;
    alignas(16) static __device__ const uint8_t codes[S::kTiles * kMost] = {};
    return codes;
  }
};

template <class Key, class Value, int D, int kRings, bool kByWork>
struct Feed {
  using S = Stage<Key, Value, D>;
  using P = ProblemType<kByWork>;
  Cursor<kRings, kByWork> cursor;
  // Of the item: number of the first tile of the sequence and head; with a page table, PagesOf.
  uint32_t sequence;
  uint32_t ring;
  uint32_t next;  // stage to fill

  // first: problem number `index`, that of the block's first item.
  __device__ __forceinline__ void Start(const DecodeJob& job, const P& first, int index,
                                        Items items, uint32_t at, int warp, int lane) {
    next = ring = at;
    if constexpr (ptx::kBulkCopies) {
      if (lane == 0 && warp < kRings) {
        for (int i = 0; i < job.stages; ++i)
          ptx::BarrierInit(ring + i * S::kBytes + S::kBarrier, 1);
        ptx::BarrierFence();
      }
      __syncwarp();
    }
    cursor.item = items.begin - 1;
    cursor.end_item = items.end;
    NextItem(job, warp, first, index);
    if constexpr (Key::kCompact) Fill(job, first, index, warp, lane);
    for (int i = 0; i + 1 < job.stages; ++i) Fill(job, first, index, warp, lane);
  }

  __device__ __forceinline__ void NextItem(const DecodeJob& job, int warp, const P& held,
                                           int held_index) {
    P p;
    if (!cursor.NextItem(job, warp, held, held_index, &p)) return;
    const Call& call = job.attention.call;
    const int pages = PagesOf(job, p.b, p.h);
    uint32_t own = static_cast<uint32_t>(pages) << job.page_shift;
    if (call.pages.pool_pages > 0) {
      own = pages;
      ptx::Prefetch(call.pages.entries + p.b * call.num_pages + (cursor.tile >> job.page_shift));
    }
    sequence = __shfl_sync(kAllLanes, own, 0);
  }

  // Whether there is a page for the next tiles, and the number of the first in the page tensors.
  __device__ __forceinline__ bool FindTile(const DecodeJob& job, uint32_t* tile) const {
    if (job.attention.call.pages.pool_pages == 0) {
      *tile = sequence + cursor.tile;
      return true;
    }
    const int page = PageOf(job, sequence, cursor.tile >> job.page_shift);
    *tile = static_cast<uint32_t>(page) << job.page_shift | (cursor.tile & job.page_mask);
    return page != kNoPage;
  }

  // Enqueues the next stage, if there is one. Nobody in the warp reads it any more. held: as in
  // Cursor.
  __device__ __forceinline__ void Fill(const DecodeJob& job, const P& held, int held_index,
                                       int warp, int lane) {
    if (cursor.tile < cursor.end) {
      const int count = S::Count(job, cursor.tile, cursor.end);
      const bool has_mean = S::kMeans && cursor.means.Has(job, cursor.tile);
      const RoleCache& k = job.attention.key.cache;
      const RoleCache& v = job.attention.value.cache;
      const auto place = [](const void* tensor, uint32_t at, uint32_t size) {
        return static_cast<const char*>(tensor) + static_cast<uint64_t>(at) * size;
      };
      uint32_t tile;
      if constexpr (ptx::kBulkCopies) {
        if (ptx::Elect()) {
          const uint32_t barrier = next + S::kBarrier, scales = count * S::kScalesTile;
          const auto copy = [&](uint32_t tile) {
            const uint32_t page = tile >> job.page_shift;
            ptx::BarrierExpect(barrier, count * (S::kMean / S::kTiles) + (has_mean ? 2 * D : 0));
            ptx::BulkCopy(next, place(k.codes, tile, S::kKeyTile), count * S::kKeyTile, barrier);
            ptx::BulkCopy(next + S::kValue, place(v.codes, tile, S::kValueTile),
                          count * S::kValueTile, barrier);
            ptx::BulkCopy(next + S::kKeyScales, place(k.scales, tile, S::kScalesTile), scales,
                          barrier);
            ptx::BulkCopy(next + S::kValueScales, place(v.scales, tile, S::kScalesTile), scales,
                          barrier);
            if (has_mean)
              ptx::BulkCopy(next + S::kMean, place(k.mean, page, 2 * D), 2 * D, barrier);
          };
          if (job.attention.call.pages.pool_pages == 0) {
            copy(sequence + cursor.tile);
          } else if (FindTile(job, &tile)) {
            copy(tile);
          } else {
            ptx::BarrierExpect(barrier, count * (S::kMean / S::kTiles));
            ptx::BulkCopy(next, NoPage<S>::Codes(), count * S::kKeyTile, barrier);
            ptx::BulkCopy(next + S::kValue, NoPage<S>::Codes(), count * S::kValueTile, barrier);
            ptx::BulkCopy(next + S::kKeyScales, NoPage<S>::Scales(), scales, barrier);
            ptx::BulkCopy(next + S::kValueScales, NoPage<S>::Scales(), scales, barrier);
          }
        }
        __syncwarp();
      } else if (FindTile(job, &tile)) {
        const uint32_t page = tile >> job.page_shift;
        CopyByLanes(next, place(k.codes, tile, S::kKeyTile), count * S::kKeyTile, lane);
        CopyByLanes(next + S::kValue, place(v.codes, tile, S::kValueTile), count * S::kValueTile,
                    lane);
        CopyByLanes(next + S::kKeyScales, place(k.scales, tile, S::kScalesTile),
                    count * S::kScalesTile, lane);
        CopyByLanes(next + S::kValueScales, place(v.scales, tile, S::kScalesTile),
                    count * S::kScalesTile, lane);
        if (has_mean) CopyByLanes(next + S::kMean, place(k.mean, page, 2 * D), 2 * D, lane);
      } else {
        CopyByLanes(next, NoPage<S>::Codes(), count * S::kKeyTile, lane);
        CopyByLanes(next + S::kValue, NoPage<S>::Codes(), count * S::kValueTile, lane);
        CopyByLanes(next + S::kKeyScales, NoPage<S>::Scales(), count * S::kScalesTile, lane);
        CopyByLanes(next + S::kValueScales, NoPage<S>::Scales(), count * S::kScalesTile, lane);
      }
      next = next + S::kBytes == ring + job.stages * S::kBytes ? ring : next + S::kBytes;
      cursor.tile += count;
      if (cursor.tile == cursor.end) NextItem(job, warp, held, held_index);
    }
    if constexpr (!ptx::kBulkCopies) ptx::CopyCommit();
  }

  // Waits for the oldest stage. parity: of the times it was used. All lanes have done with the one
  // before it, which the next call of Fill overwrites (compact instances: they fill it themselves).
  __device__ __forceinline__ void Wait(const DecodeJob& job, uint32_t stage, uint32_t parity) {
    if constexpr (ptx::kBulkCopies) {
      ptx::BarrierWait(stage + S::kBarrier, parity);
    } else if (Key::kCompact) {  // all but the groups of the stages after this one
      if (job.stages == 1)
        ptx::CopyWait<0>();
      else if (job.stages == 2)
        ptx::CopyWait<1>();
      else if (job.stages == 3)
        ptx::CopyWait<2>();
      else
        ptx::CopyWait<3>();
    } else if (job.stages == 2) {
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
