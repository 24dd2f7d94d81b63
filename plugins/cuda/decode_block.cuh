// A warp's tiles in the decode kernel: scores from K's codes, weights, sums of V's.
#pragma once

#include "decode_arena.cuh"
#include "decode_outliers.cuh"
#include "softmax_state.cuh"

namespace hqmq {
namespace cuda {

// The stage of the instances whose bits these give.
template <class Codec, bool kCompact>
struct LargeCodec {
  using Type = Codec;
};
template <class Codec>
struct LargeCodec<Codec, true> {
  using Type = typename Codec::Large;
};
template <class Codec>
using LargeOf = typename LargeCodec<Codec, Codec::kCompact>::Type;
template <class Key, class Value, int D>
using LargeStage = Stage<LargeOf<Key>, LargeOf<Value>, D>;

template <class Key, class Value, int D, int kColumns>
struct DecodeBlock {
  using S = Stage<Key, Value, D>;
  // Whether AddTwo is for these, and whether the sums of weights are as it makes them: compact
  // instances give the bits of others.
  static constexpr bool kPairs = kColumns == 4 && S::kPairs;
  static constexpr bool kSumsPairs = kColumns == 4 && LargeStage<Key, Value, D>::kPairs;
  using Rows = LaneRows<D, kColumns, kSumsPairs>;
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
  // First tile whose keys are all seen by all rows as codes, and how many there are (kPairs: with
  // one more behind each).
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
    seen_count = max((p.first_time & ~(a.key.role.page_size - 1)) / kDecodeTile - seen - kPairs, 0);
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

  using KeyLevels = typename Key::Levels;
  using KeySlice = typename Key::template Slice<kKeyChunks>;
  using ValueLevels = typename Value::Levels;
  using ValueSlice = typename Value::template Slice<kValueChunks>;

  // Codes of K of the upper and the lower eight tokens of the tile at an address.
  __device__ __forceinline__ void LoadKeys(uint32_t at, KeySlice (&k)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      k[i] = Key::template Load<kKeyChunks>(at + i * 8 * S::kKeyToken, key_codes);
  }

  // Bits of K's and V's scales of the lane's two tokens of the tile whose scales of K lie at an
  // address.
  static __device__ __forceinline__ void LoadScales(uint32_t scales_at, int lane,
                                                    uint32_t (&scales)[2][2]) {
    const int first_token = Value::template TokenOf<D>(lane >> 2);  // and 8 more
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = scales_at + S::kScaleBytes * (first_token + 8 * i);
      scales[0][i] = S::LoadScale(at);
      scales[1][i] = S::LoadScale(at + S::kValueScales - S::kKeyScales);
    }
  }

  // For a tile of V, from those of K where V's words are K's.
  __device__ __forceinline__ ValueLevels LoadValueLevels(const KeyLevels& key_levels) const {
    if constexpr (Tables<Key, Value>::kTurned) {
      if (turned) return key_levels;
    }
    return Value::LoadLevels(value);
  }

  // Whether all rows see all keys of a tile (kPairs: and of the next one).
  __device__ __forceinline__ bool SeenByAll(int tile) const {
    return static_cast<uint32_t>(tile - seen) < static_cast<uint32_t>(seen_count);
  }

  // Adds K's products of a tile to two sums. k: codes of the upper and the lower eight tokens.
  __device__ __forceinline__ void AddKeys(const KeyLevels& key_levels, const KeySlice (&k)[2],
                                          float (&sum)[2][4]) {
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
  }

  // Scores and the largest scale of V. tile: the lane's own; seen_by_all: by every lane; scales:
  // bits of K's and V's; missing: products with outliers; score: sums of products before; scale:
  // of V by score.
  __device__ __forceinline__ float Scores(const DecodeJob& job, const Problem& p, int tile,
                                          bool seen_by_all, int lane,
                                          const uint32_t (&scales)[2][2], const float (&missing)[4],
                                          float (&score)[4], float (&scale)[4]) {
    const AttentionJob& a = job.attention;
    const int first_token = Value::template TokenOf<D>(lane >> 2);  // and 8 more
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float of_key = FloatFromHalf(scales[0][i]);
      scale[2 * i] = scale[2 * i + 1] = FloatFromHalf(scales[1][i]);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        score[2 * i + c] = Fma(score[2 * i + c], of_key * factor[c],
                               kOutliers ? missing[2 * i + c] * factor[c] : mean_score[c]);
      }
    }
    if (job.cap > 0.0f) {
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = Capped(score[c], job.cap, job.per_cap);
    }
    float largest = fmaxf(scale[0], scale[2]);
    if (!seen_by_all) {
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
    return largest;
  }

  // Adds V's products of half a tile.
  __device__ __forceinline__ void AddValues(const ValueLevels& value_levels, int half,
                                            const ValueSlice (&v)[2],
                                            const uint32_t (&weight)[kColumns / 2][2], Rows* rows) {
#pragma unroll
    for (int group = 0; group < kValueChunks / kValueGroup; ++group) {
      uint2 x[kValueGroup], y[kValueGroup];
      Value::template Decode<1>(value, value_levels, v[0], group, x);
      Value::template Decode<1>(value, value_levels, v[1], group, y);
#pragma unroll
      for (int i = 0; i < kValueGroup; ++i)
        rows->Add(kValueGroup * group + i, x[i], y[i], half, weight);
    }
  }

  // Tile number `tile`, `part` of the stage at `at`, and the next one, if there are `left` > 1: up
  // to four rows take half of the columns of a product, so that lanes with j < 2 make weights of
  // the first tile while the others make those of the second one. Returns how many it has added:
  // both, or the first only.
  __device__ __forceinline__ int AddTwo(const DecodeJob& job, const Problem& p, int tile, int left,
                                        uint32_t at, int part, int lane, Rows* rows) {
    bool two = left > 1;
    const bool own = two && (lane & 2) != 0;
    const uint32_t key_at = at + part * S::kKeyTile;
    const uint32_t value_at = at + S::kValue + part * S::kValueTile;
    const uint32_t scales_at = at + S::kKeyScales + part * S::kScalesTile + own * S::kScalesTile;
    const KeyLevels key_levels = Key::LoadLevels(key);
    float score[4], scale[4];
    const auto score_keys = [&](uint32_t from) {
      KeySlice k[2];
      LoadKeys(from, k);
      float sum[2][4] = {};
      AddKeys(key_levels, k, sum);
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = sum[0][c] + sum[1][c];
    };
    score_keys(key_at);
    if (two) {
      const float first[4] = {score[0], score[1], score[2], score[3]};
      score_keys(key_at + S::kKeyTile);
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c] = own ? score[c] : first[c];
    }
    uint32_t scales[2][2];
    LoadScales(scales_at, lane, scales);
    // The first tile's codes arrive while weights are made.
    ValueSlice v[2][2];
    const auto load_values = [&](uint32_t from) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          v[half][i] =
              Value::template Load<kValueChunks>(from + half * 8 * S::kValueToken, value_codes[i]);
      }
    };
    load_values(value_at);
    const float missing[4] = {};
    const float largest =
        Scores(job, p, tile + own, SeenByAll(tile), lane, scales, missing, score, scale);
    uint32_t packed[2][2], weight[kColumns / 2][2];
    rows->WeighTwo(score, scale, largest, (lane & 2) == 2 * (tile & job.pair_mask), &two, packed);
    const ValueLevels value_levels = LoadValueLevels(key_levels);
    const auto add_values = [&](const uint32_t (&of)[2]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) Rows::Spread(of[half], half, weight);
#pragma unroll
      for (int half = 0; half < 2; ++half) AddValues(value_levels, half, v[half], weight, rows);
    };
    add_values(packed[0]);
    if (two) {
      load_values(value_at + S::kValueTile);
      add_values(packed[1]);
    }
    return 1 + two;
  }

  // Tile number `tile` of a run that ends before `end`: `part` of the stage at `at`. second: of a
  // pair, for kSumsPairs. fill: fills this stage, if kFillsWithin.
  template <class Fill>
  __device__ __forceinline__ void AddTile(const DecodeJob& job, const Problem& p, int tile, int end,
                                          uint32_t at, int part, int lane, Rows* rows,
                                          const Fill& fill) {
    const int first_token = Value::template TokenOf<D>(lane >> 2);  // and 8 more
    const uint32_t key_at = at + part * S::kKeyTile;
    const uint32_t value_at = at + S::kValue + part * S::kValueTile;
    const uint32_t scales_at = at + S::kKeyScales + part * S::kScalesTile;
    float sum[2][4] = {};
    const KeyLevels key_levels = Key::LoadLevels(key);
    KeySlice k[2];
    ValueSlice v[2][2];
    uint32_t scales[2][2];
    LoadKeys(key_at, k);
    LoadScales(scales_at, lane, scales);
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
    AddKeys(key_levels, k, sum);
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
    for (int c = 0; c < 4; ++c) score[c] = sum[0][c] + sum[1][c];
    const float largest =
        Scores(job, p, tile, SeenByAll(tile), lane, scales, missing, score, scale);
    uint32_t weight[kColumns / 2][2];
    float p_of[4];
    rows->Weigh(score, scale, largest, weight, p_of, kSumsPairs && (tile & job.pair_mask) != 0);
    if constexpr (kOutliers) {
      __syncwarp();  // K's records are read
      outliers.StoreWeights(p_of, key_at, first_token, lane);
    }
    const ValueLevels value_levels = LoadValueLevels(key_levels);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (D > 128) load_values(half);
      if constexpr (kFillsWithin && D > 128) {
        if (half == 1) {
          ReadsAreDone();
          fill();
        }
      }
      AddValues(value_levels, half, v[half], weight, rows);
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

}  // namespace cuda
}  // namespace hqmq
