// The fused decode kernel: attention of a few query rows straight from the codes (decode_job.h says
// how the work is cut, decode_rows.cuh how a tile is computed).
#pragma once

#include "decode_arena.cuh"
#include "decode_outliers.cuh"
#include "decode_reduce.cuh"

namespace hqmq {
namespace cuda {

template <class Key, class Value, int D, int kColumns>
struct DecodeBlock {
  using S = Stage<Key, Value, D>;
  using Rows = LaneRows<D, kColumns>;
  static constexpr int kKeyChunks = D / 16, kValueChunks = D / 32;  // of a lane and token
  static constexpr int kValueGroup = kValueChunks < 4 ? kValueChunks : 4;

  // What a lane keeps of the kernel.
  typename Key::Lane key;
  typename Value::Lane value;
  typename Key::Where key_codes;
  typename Value::Where value_codes[2];  // of rows 2j, 2j+1
  bool turned = false;                   // V's outputs are sums of K's words
  // Of the problem.
  static constexpr bool kSharedQuery = D * kColumns > 1024;
  std::conditional_t<kSharedQuery, SharedQuery<D, kColumns>, QueryLane<D, kColumns>> query;
  float factor[2];      // from sums of products to scores in base 2, by column
  float mean_score[2];  // scores of the page's mean
  struct None {};
  static constexpr bool kOutliers = Key::kOutliers;
  static_assert(kOutliers == Value::kOutliers, "both roles have outliers or none");
  using Outliers = TileOutliers<D, kColumns>;
  std::conditional_t<kOutliers, Outliers, None> outliers;
  int pages;  // of the sequence and head: PagesOf
  // First tile whose keys are all seen by all rows as codes, and how many there are.
  int seen, seen_count;

  // query_chunks: address of the queries' chunks, if there are outliers.
  __device__ __forceinline__ void LoadProblem(const DecodeJob& job, const Problem& p,
                                              DecodeShared<D>* shared, uint32_t query_chunks,
                                              int warp, int lane) {
    const AttentionJob& a = job.attention;
    if constexpr (kOutliers || !S::kMeans) pages = PagesOf(job, p.b, p.h);
    if constexpr (kOutliers) {
      outliers.StoreQueries(*shared, query_chunks);
      if constexpr (!kSharedQuery) __syncthreads();
    }
    if constexpr (kSharedQuery) {
      query.Load(shared, warp, lane);
      __syncthreads();
    } else {
      query.Load(*shared, 1, lane);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (2 * (lane & 3) + i) & (kColumns - 1);
      factor[i] = a.scale * 1.44269504f * shared->factor[1][row];
      mean_score[i] = 0.0f;
    }
    const int oldest = max(OldestKey(p.last_time, a.window), a.key.role.sink_tokens);
    seen = (oldest + kDecodeTile - 1) / kDecodeTile;
    seen_count = max((p.first_time & ~(a.key.role.page_size - 1)) / kDecodeTile - seen, 0);
  }

  // Every row of the operand is the mean, so that each lane gets the scores of its columns: rows
  // r from the first and third word of a lane's four, rows r + 8 from the second and fourth. load:
  // 16 bytes of the mean at the sum of two places in bytes.
  template <class Load>
  __device__ __forceinline__ void ScoreMean(const Load& load, int lane) {
    float sum[4][4] = {};  // four chains, as each waits for its own sums
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const uint4 x = load((lane & 3) * (D / 2), 16 * i);
      const uint4 q = query.Two(i);
      ptx::Mma(sum[2 * i % 4], x.x, x.y, x.z, x.w, q.x, q.y);
      ptx::Mma(sum[(2 * i + 1) % 4], x.x, x.y, x.z, x.w, q.z, q.w);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      mean_score[i] = ((sum[0][i] + sum[1][2 + i]) + (sum[2][i] + sum[3][2 + i])) * factor[i];
  }

  // Compact instances fill a stage anew once a tile's codes are in registers. With outliers, whose
  // records take the place of the codes, they do so after the tile.
  static constexpr bool kFillsWithin = Key::kCompact && !kOutliers;

  // Before a stage is filled anew. Loads of V's codes may be issued just before the bulk copies,
  // which write without asking whether they have read: only a fence keeps them apart.
  static __device__ __forceinline__ void ReadsAreDone() {
    ptx::ProxyFence();
    __syncwarp();
  }

  // Tile number `tile` of a run that ends before `end`: `part` of the stage at `at`. fill: fills
  // this stage, if kFillsWithin.
  template <class Fill>
  __device__ __forceinline__ void AddTile(const DecodeJob& job, const Problem& p, int tile, int end,
                                          uint32_t at, int part, int lane, Rows* rows,
                                          const Fill& fill) {
    const AttentionJob& a = job.attention;
    const int first_token = Value::template TokenOf<D>(lane >> 2);  // and 8 more
    const uint32_t key_at = at + part * S::kKeyTile;
    const uint32_t value_at = at + S::kValue + part * S::kValueTile;
    const uint32_t scales_at = at + S::kKeyScales + part * S::kScalesTile;
    float sum[2][4] = {};
    const typename Key::Levels key_levels = Key::LoadLevels(key);
    typename Key::template Slice<kKeyChunks> k[2];
    typename Value::template Slice<kValueChunks> v[2][2];
    uint32_t scales[2][2];  // of K, V
#pragma unroll
    for (int i = 0; i < 2; ++i)
      k[i] = Key::template Load<kKeyChunks>(key_at + i * 8 * S::kKeyToken, key_codes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = scales_at + S::kScaleBytes * (first_token + 8 * i);
      scales[0][i] = S::LoadScale(at);
      scales[1][i] = S::LoadScale(at + S::kValueScales - S::kKeyScales);
    }
    // V's codes arrive while K's products are made, where registers allow.
    const auto load_values = [&](int half) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        v[half][i] = Value::template Load<kValueChunks>(value_at + half * 8 * S::kValueToken,
                                                        value_codes[i]);
    };
    if constexpr (D <= 128) load_values(0), load_values(1);
    // Outliers' records, and then weights for them, take the place of codes that are loaded.
    [[maybe_unused]] const uint32_t lists[2] = {key_at,
                                                D <= 128 ? value_at : key_at + S::kKeyTile / 2};
    if constexpr (kOutliers) {
      static_assert(S::kKeyTile >= (D <= 128 ? 1 : 2) * Outliers::kListBytes &&
                        (D > 128 || S::kValueTile >= Outliers::kListBytes) &&
                        S::kKeyTile / (D <= 128 ? 1 : 2) >= kDecodeTile * Outliers::kWeightBytes,
                    "records and weights fit");
      __syncwarp();
      outliers.Begin(job, pages, tile, end, lists, lane);
    }
#pragma unroll
    for (int group = 0; group < kKeyChunks / 4; ++group) {
      uint2 x[4], y[4];
      Key::template Decode<0>(key, key_levels, k[0], group, x);
      Key::template Decode<0>(key, key_levels, k[1], group, y);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 q = query.Two(2 * group + i);
        ptx::Mma(sum[0], x[2 * i].x, y[2 * i].x, x[2 * i + 1].x, y[2 * i + 1].x, q.x, q.y);
        ptx::Mma(sum[1], x[2 * i].y, y[2 * i].y, x[2 * i + 1].y, y[2 * i + 1].y, q.z, q.w);
      }
    }
    // Not before K's products, whose codes would lie in registers meanwhile.
    if constexpr (kFillsWithin && D <= 128) {
      ReadsAreDone();
      fill();
    }
    float score[4], scale[4];
    [[maybe_unused]] float missing[4] = {};
    if constexpr (kOutliers) {
#pragma unroll 1
      for (int round = 0; round < outliers.Rounds(); ++round) {
        outliers.Round(job, pages, tile, 0, round, lists, lane);
        outliers.AddScores(lists[0], first_token, lane, missing);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float of_key = FloatFromHalf(scales[0][i]);
      scale[2 * i] = scale[2 * i + 1] = FloatFromHalf(scales[1][i]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        score[2 * i + c] = Fma((sum[0][2 * i + c] + sum[1][2 * i + c]), of_key * factor[c],
                               kOutliers ? missing[2 * i + c] * factor[c] : mean_score[c]);
      }
    }
    if (job.cap > 0.0f) {
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = Capped(score[c], job.cap, job.per_cap);
    }
    float largest = fmaxf(scale[0], scale[2]);
    if (static_cast<uint32_t>(tile - seen) >= static_cast<uint32_t>(seen_count)) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int row = (2 * (lane & 3) + (c & 1)) & (kColumns - 1);
        const int time = RowTime(job, p, p.row + row), page = time & ~(a.key.role.page_size - 1);
        const int t = tile * kDecodeTile + first_token + 8 * (c / 2);
        // The first tokens of the sequence are among the exact ones.
        if (t < OldestKey(time, a.window) || t < a.key.role.sink_tokens || t >= page) {
          score[c] = MinusInfinity();
          scale[c] = 0.0f;
        }
      }
      largest = fmaxf(fmaxf(scale[0], scale[1]), fmaxf(scale[2], scale[3]));
    }
    uint32_t weight[kColumns / 2][2];
    float p_of[4];
    rows->Weigh(score, scale, largest, weight, p_of);
    if constexpr (kOutliers) {
      __syncwarp();  // K's records are read
      outliers.StoreWeights(p_of, key_at, first_token, lane);
    }
    typename Value::Levels value_levels;
    if constexpr (Tables<Key, Value>::kTurned) value_levels = key_levels;
    if (!Tables<Key, Value>::kTurned || !turned) value_levels = Value::LoadLevels(value);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (D > 128) load_values(half);
      if constexpr (kFillsWithin && D > 128) {
        if (half == 1) {
          ReadsAreDone();
          fill();
        }
      }
#pragma unroll
      for (int group = 0; group < kValueChunks / kValueGroup; ++group) {
        uint2 x[kValueGroup], y[kValueGroup];
        Value::template Decode<1>(value, value_levels, v[half][0], group, x);
        Value::template Decode<1>(value, value_levels, v[half][1], group, y);
#pragma unroll
        for (int i = 0; i < kValueGroup; ++i)
          rows->Add(kValueGroup * group + i, x[i], y[i], half, weight);
      }
    }
    if constexpr (kOutliers) {
#pragma unroll 1
      for (int round = 0; round < outliers.Rounds(); ++round) {
        outliers.Round(job, pages, tile, 1, round, lists, lane);
        outliers.AddValues(lists[1], key_at, lane, rows);
      }
      ptx::ProxyFence();
    }
  }
};

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
      LaneRows<D, kColumns> rows;
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
        int part = 0;
#pragma unroll 1
        do {
          self.AddTile(job, p, tile + part, tiles.end, stage, part, lane, &rows, fill);
        } while (++part < count);
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
        AttendOwn<D, kColumns>(job, p, shared, own_warp, lane, &rows);
      if (i > 0) WaitJoined<D>(&pending, shared);
      if (i == parts) break;
      StoreState<D, kColumns>(&rows, states, shared, warp, lane);
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
