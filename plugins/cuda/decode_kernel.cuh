// The fused decode kernel: attention of a few query rows straight from the codes (decode_job.h says
// how the work is cut, decode_rows.cuh how a tile is computed).
#pragma once

#include "decode_block.cuh"
#include "decode_reduce.cuh"

namespace hqmq {
namespace cuda {

// All of a block's items.
template <class Key, class Value, int D, int kColumns, bool kByWork>
__device__ __forceinline__ void DecodeItems(const DecodeJob& job, float4* memory) {
  const uint32_t start = ptx::SharedAddress(memory);
  using Memory = typename MemoryLayout<Key, Value, D, kColumns>::Type;
  constexpr int kRings = Memory::kRings;
  const Memory arena = Memory::Of(job, start);
  char* const base = reinterpret_cast<char*>(memory) - start;
  auto* const shared = reinterpret_cast<DecodeShared<D>*>(base + arena.shared);
  float4* const states = Memory::kSharedStates ? reinterpret_cast<float4*>(base + arena.states)
                                               : reinterpret_cast<float4*>(job.states) +
                                                     blockIdx.x * (StateFloats(kColumns, D) / 4);
  const AttentionJob& a = job.attention;
  const int lane = threadIdx.x % kWarp;
  // The shuffle tells the compiler that it is one number for the warp.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int block = static_cast<int>(blockIdx.x);
  using P = ProblemType<kByWork>;
  const auto problem_of = [&](int item) { return ItemAt<kByWork>(job, item).problem; };
  Share share = {ItemsByCount<kByWork>(job, block), 0};
  // By work it may be another head's: they come while lengths are read.
  int first = problem_of(share.items.begin);
  if constexpr (kByWork) first = min(first, job.problems - 1);
  PrefetchWords(a.key, a.value, job.by_row_blocks(job.by_batch(first)));
  if constexpr (kByWork) {
    if (job.pieces > 0)
      share = ShareOf<kDecodeWarps>(job, share.items, &shared->share, block, warp, lane);
  }
  const Items items = share.items;
  // Pages that fill in this call are seen by later tokens of the call only.
  if (a.call.tokens > 1) ptx::GridWait();
  // There are fewer items than blocks, or pieces than lengths make. By count every block has some.
  if (kByWork && items.begin >= items.end) {
    if (threadIdx.x == 0) ptx::GridWait();  // as at the end
    return;
  }

  const uint32_t ring = arena.Ring(warp);
  uint32_t stage = ring, parity = 0;
  Feed<Key, Value, D, kRings, kByWork> feed;
  NewRows<D> fresh;
  P next = ProblemOf<kByWork>(job, problem_of(items.begin), share.piece);
  fresh.Load(job, next, warp, lane);
  if (threadIdx.x == 0) {
    ptx::BarrierInit(ptx::SharedAddress(&shared->stored), kDecodeThreads);
    ptx::BarrierInit(ptx::SharedAddress(&shared->joined), kDecodeThreads);
    if constexpr (kByWork) shared->piece = share.piece;
  }
  feed.Start(job, next, problem_of(items.begin), items, ring, warp, lane);

  DecodeBlock<Key, Value, D, kColumns> self;
  const uint32_t tables[2] = {arena.Table(0), arena.Table(1)};
  const uint32_t levels[2] = {ptx::SharedAddress(shared->levels[0]),
                              ptx::SharedAddress(shared->levels[1])};
  self.key = Key::LaneOf(a.key, tables[0], levels[0], lane);
  self.value = Value::LaneOf(a.value, tables[1], levels[1], lane);
  self.key_codes =
      Key::template WhereOf<D>(Value::template TokenOf<D>(lane >> 2), (lane & 3) * (D / 16));
  for (int i = 0; i < 2; ++i) {
    self.value_codes[i] = Value::template WhereOf<D>(Value::template TokenOf<D>(2 * (lane & 3) + i),
                                                     (lane >> 2) * (D / 32));
  }

  int head = -1;
  Pending pending;
  // Problems. (What stands after each tells the compiler that it is not needed any more.)
  for (int item = items.begin; item < items.end; next = P{}, fresh = NewRows<D>{}) {
    const Item of = ItemAt<kByWork>(job, item);
    const int index = of.problem, first_split = of.split;
    if (item != items.begin) {
      __syncthreads();
      next = ProblemOf<kByWork>(job, index, kByWork ? shared->piece : 0);
      fresh.Load(job, next, warp, lane);
    }
    int end_split = first_split + items.end - item;
    if constexpr (kByWork) {
      item = ItemOf(index + 1, 0);
    } else {
      end_split = min(job.splits, end_split);
      item += end_split - first_split;
    }
    if (next.rows == 0) {
      if (first_split == 0) StoreEmptyRows<D, kColumns>(job, next, 0, warp, lane);
      continue;
    }
    if (threadIdx.x == 0) {
      if constexpr (kByWork) {
        shared->problem = next;
      } else {
        shared->count_problem = next;
      }
      shared->bad_values = 0;
    }
    if (head != next.h) {
      FillTables<Key, Value>(job, next.h, tables, levels, shared, lane, &self.key, &self.value);
      head = next.h;
    }
    fresh.Store(job, next, shared, warp, lane);
    __syncthreads();
    const P& p = shared->template Held<kByWork>();
    self.LoadProblem(job, p, shared, arena.QueryChunks(), warp, lane);
    const int splits = min(end_split, p.splits) - first_split;
    if (splits <= 0) continue;
    // The exact tokens may be a part of their own, which goes with the last split.
    const int parts = splits + (first_split + splits == p.splits ? p.own - (p.splits - 1) : 0);
    for (int i = 0;; ++i) {  // once more than there are parts, to join the last one
      const int split = first_split + i;
      typename DecodeBlock<Key, Value, D, kColumns>::Rows rows;
      rows.Clear();
      const Tiles tiles = i < splits ? TilesOf<kRings>(p, split, warp) : Tiles{0, 0};
      using S = Stage<Key, Value, D>;
      MeanStages means;
      means.Start(job, tiles.begin);
      if constexpr (Key::kOutliers) {
        if (tiles.begin < tiles.end) self.outliers.Start(job, self.pages, tiles.begin, lane);
      }
      for (int tile = tiles.begin;;) {
        if (pending.split >= 0 && 2 * tile >= tiles.begin + tiles.end)
          JoinStates<D, kColumns>(job, p, index, &pending, states, shared, warp, lane);
        if (tile == tiles.end) break;
        feed.Wait(job, stage, parity);
        const auto fill = [&] { feed.Fill(job, p, index, warp, lane); };
        if constexpr (!Key::kCompact) fill();
        if (Key::kPageMeans && means.Has(job, tile)) {
          if constexpr (S::kMeans) {
            const uint32_t mean = stage + S::kMean;
            self.ScoreMean(
                [&](uint32_t at, uint32_t more) { return ptx::LoadShared128(mean + at + more); },
                lane);
          } else if (const int page = PageOf(job, self.pages, tile >> job.page_shift);
                     page != kNoPage) {
            const char* mean = reinterpret_cast<const char*>(a.key.cache.mean) +
                               static_cast<int64_t>(page) * 2 * D;
            self.ScoreMean(
                [&](uint32_t at, uint32_t more) {
                  return *reinterpret_cast<const uint4*>(mean + at + more);
                },
                lane);
          }
        }
        const int count = S::Count(job, tile, tiles.end);
        if constexpr (self.kPairs) {
#pragma unroll 1
          for (int left = count; left > 0;)
            left -=
                self.AddTwo(job, p, tile + count - left, left, stage, count - left, lane, &rows);
        } else {
          int part = 0;
#pragma unroll 1
          do {
            self.AddTile(job, p, tile + part, tiles.end, stage, part, lane, &rows, fill);
          } while (++part < count);
        }
        if constexpr (Key::kCompact && !self.kFillsWithin) {
          __syncwarp();
          fill();
        }
        tile += count;
        stage += S::kBytes;
        if (stage == ring + job.stages * S::kBytes) {
          stage = ring;
          parity ^= 1;
        }
      }
      const int own_warp = warp - (kDecodeWarps - kOwnWarps);
      if (i < parts && split == p.own && own_warp >= 0)
        AttendOwn(job, p, shared, own_warp, lane, &rows);
      if (i > 0) WaitJoined<D>(&pending, shared);
      if (i == parts) break;
      StoreState(&rows, states, shared, warp, lane);
      pending.split = split;
    }
    if (AreLastParts<D>(job, p, index, splits, shared))
      JoinParts<D, kColumns>(job, p, index, shared, warp, lane);
  }
  // Whoever waits for this kernel must find the one before it complete, too.
  if (threadIdx.x == 0) ptx::GridWait();
}

template <class Key, class Value, int D, int kColumns, bool kByWork>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    DecodeKernel(const __grid_constant__ DecodeJob job) {
  HQMQ_DYNAMIC_SHARED(shared);
  // Where it is never launched, it need not be compiled.
  using Memory = typename MemoryLayout<Key, Value, D, kColumns>::Type;
  if constexpr (Key::kCompact) {
    if constexpr ((kCompactEverywhere || ptx::kMostShared < kMostShared) &&
                  Memory::LeastBytes() <= ptx::kMostShared)
      DecodeItems<Key, Value, D, kColumns, kByWork>(job, shared);
  } else {
    if constexpr (!Key::kPageMeans) {
      static_assert(Tables<Key, Value>::kAlignment + Tables<Key, Value>::kValue + Value::kReach <=
                        Memory::Bytes(2),
                    "codes beyond the codebook read the block's memory");
    }
    if constexpr (Memory::Bytes(2) <= ptx::kMostShared)
      DecodeItems<Key, Value, D, kColumns, kByWork>(job, shared);
  }
}

// One instance of the kernel. Defined in decode_*.cu, one file an instance. kByWork: it takes calls
// cut either way; else those that the host cuts by count (Cut::pieces 0), with the same bits
// and without the code for the other cut.
template <class Key, class Value, int D, int kColumns, bool kByWork = true>
struct DecodeInstance {
  using Memory = typename MemoryLayout<Key, Value, D, kColumns>::Type;
  static constexpr bool kSharedStates = Memory::kSharedStates;
  static Status Run(const DecodeJob& job, int blocks, const Gpu& gpu, cudaStream_t stream);
};

}  // namespace cuda
}  // namespace hqmq
