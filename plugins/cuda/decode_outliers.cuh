// Med3x outliers in the decode kernel: sparse corrections of a tile's scores and outputs.
//
// The code of an outlier is 0, and level 0 of gain MAX is 0.0: tiles decode its chunk to zeros, and
// what is missing is added here. A lane has one token of one role: K's tokens lanes 0-15, V's lanes
// 16-31. It walks the set bits of its mask and makes a record of each, in the place of codes that
// all lanes have loaded: the four values, which a copy of 8 bytes brings from the cache while K's
// products are made, and where they belong. Records then become operands of MMAs:
// - K: four outliers of any tokens are the k of an m16n8k16 (a lane's chunk is the values if the
//   token is its row's, else zeros), the query's chunks are the other operand.
// - V: accumulator i has the chunks c with c % (D/32) = i. Records are sorted by this class, four
// of
//   a class are the k of a tf32 MMA, with weights that do not carry V's scales. tf32 holds fp16
//   exactly and has the exponents of a float, so that no value over- or underflows.
//
// The order of records depends on the page's bytes only, and nothing is added atomically. Where a
// tile has more outliers of a role than there is room for, it takes them in rounds of a few tokens.
#pragma once

#include "decode_rows.cuh"
#include "decode_shared.cuh"

namespace hqmq {
namespace cuda {

template <int D, int kColumns>
struct TileOutliers {
  static constexpr int kWords = D > 128 ? 2 : 1;  // of a token's bits
  static constexpr int kClasses = D / 32;         // chunk c is of class c % kClasses
  static constexpr int kCounters = D > 128 ? 2 : 1;
  static constexpr int kRecordBytes = 16;
  static constexpr int kRecords = D > 64 ? 64 : 32;        // of a role, at once
  static constexpr int kRoundTokens = kRecords / (D / 4);  // whose outliers always fit
  static constexpr int kHalfWarp = kWarp / 2;
  static_assert(kDecodeTile == kHalfWarp, "a lane for each token of K and of V");
  static_assert(kRoundTokens >= 1 && kRecords <= 255, "counters of 8 bits");

  struct Bits {
    uint32_t word[kWords];
  };
  // Numbers of outliers by class, a byte each.
  struct Counts {
    uint32_t word[kCounters];
  };

  Bits next;        // of the tile to come; this lane's role and token
  int before;       // outliers of this lane's role in the tiles of the page before it
  Counts total[2];  // of the records of K, V
  bool few;         // all outliers of the tile have records
  uint32_t query;   // address of this lane's row of the queries' chunks

  // Copies the rotated queries (PlaceOf) chunk by chunk to address `at`, QueryChunkBytes of them.
  // All threads; synchronise before and after.
  __device__ __forceinline__ void StoreQueries(const DecodeShared<D>& shared, uint32_t at,
                                               int lane) {
    query = at + 8 * ((lane >> 2) & (kColumns - 1));
    const int i = static_cast<int>(threadIdx.x);
    static_assert(D / 4 * kColumns <= kDecodeThreads, "a chunk a thread");
    if (i >= D / 4 * kColumns) return;
    const int chunk = i / kColumns;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(shared.query[1][i % kColumns]) +
                           chunk / 2 * 4 + chunk % 2;
    ptx::StoreShared64(at + 8 * i, make_uint2(from[0], from[2]));
  }

  static __device__ __forceinline__ bool IsKey(int lane) { return lane < kHalfWarp; }
  static __device__ __forceinline__ int TokenOf(int lane) { return lane & (kHalfWarp - 1); }

  // page0: number of the sequence's first page over [B, H, M].
  static __device__ __forceinline__ Bits LoadBits(const DecodeJob& job, int page0, int tile,
                                                  int lane) {
    const AttentionJob& a = job.attention;
    const int32_t* mask = IsKey(lane) ? a.key.cache.outlier_mask : a.value.cache.outlier_mask;
    const int page = page0 + (tile >> job.page_shift), in_page = tile & job.page_mask;
    const char* from =
        reinterpret_cast<const char*>(mask + static_cast<int64_t>(page) * a.key.mask_words +
                                      in_page * (D / 8)) +
        TokenOf(lane) * (D / 32);
    Bits out;
    if constexpr (D == 64) {
      out.word[0] = ptx::LoadGlobalBits16(from);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.word[i] = ptx::LoadGlobalBits32(from + 4 * i);
    }
    return out;
  }

  // Before the first tile of a run. The outliers of the page's earlier tiles are counted.
  __device__ __forceinline__ void Start(const DecodeJob& job, int page0, int tile, int lane) {
    const int in_page = tile & job.page_mask;
    next = LoadBits(job, page0, tile, lane);
    before = 0;
#pragma unroll 1
    for (int i = 0; i < in_page; i += 4) {
      Bits earlier[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        earlier[k] = Bits{};
        if (i + k < in_page) earlier[k] = LoadBits(job, page0, tile - in_page + i + k, lane);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int w = 0; w < kWords; ++w) before += __popc(earlier[k].word[w]);
    }
#pragma unroll
    for (int offset = 1; offset < kHalfWarp; offset *= 2)
      before += __shfl_xor_sync(kAllLanes, before, offset);
  }

  static __device__ __forceinline__ int Sum(const Counts& counts) {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) sum = __dp4a(counts.word[i], 0x01010101u, sum);
    return static_cast<int>(sum);
  }
  __device__ __forceinline__ Counts OwnTotal(int lane) const {
    Counts out;
#pragma unroll
    for (int i = 0; i < kCounters; ++i)
      out.word[i] = IsKey(lane) ? total[0].word[i] : total[1].word[i];
    return out;
  }

  // Counts what `bits` mark: `total`, and what the role's tokens before the lane's have.
  __device__ __forceinline__ Counts Count(const Bits& bits, int lane) {
    constexpr uint32_t kOfClass = kClasses == 2   ? 0x55555555u
                                  : kClasses == 4 ? 0x11111111u
                                                  : 0x01010101u;
    Counts own, through;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) own.word[i] = 0;
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        own.word[c / 4] += static_cast<uint32_t>(__popc(bits.word[w] & kOfClass << c)) << c % 4 * 8;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      through.word[i] = own.word[i];
#pragma unroll
      for (int offset = 1; offset < kHalfWarp; offset *= 2) {
        const uint32_t left = __shfl_up_sync(kAllLanes, through.word[i], offset, kHalfWarp);
        if (TokenOf(lane) >= offset) through.word[i] += left;
      }
      total[0].word[i] = __shfl_sync(kAllLanes, through.word[i], kHalfWarp - 1);
      total[1].word[i] = __shfl_sync(kAllLanes, through.word[i], kWarp - 1);
      through.word[i] -= own.word[i];
    }
    return through;
  }

  // Makes a record of each outlier that `bits` mark, sorted by class. earlier: what Count returned
  // for them; slot: of the first; page: number over [B, H, M]; lists: addresses of records of K, V.
  __device__ __forceinline__ void List(const DecodeJob& job, const Bits& bits,
                                       const Counts& earlier, int slot, int page,
                                       const uint32_t (&lists)[2], int lane) {
    const AttentionJob& a = job.attention;
    const bool key = IsKey(lane);
    const int token = TokenOf(lane);
    const uint32_t list = key ? lists[0] : lists[1];
    const int capacity = key ? a.key.role.outlier_capacity : a.value.role.outlier_capacity;
    const uint16_t* values = (key ? a.key.cache.outlier_value : a.value.cache.outlier_value) +
                             static_cast<int64_t>(page) * capacity * 4;
    Counts place = OwnTotal(lane);  // of the next record of each class
    if constexpr (kCounters == 2) {
      const uint32_t lower = __dp4a(place.word[0], 0x01010101u, 0u);
      place.word[1] = place.word[1] * 0x01010100u + lower * 0x01010101u + earlier.word[1];
    }
    place.word[0] = place.word[0] * 0x01010100u + earlier.word[0];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      for (uint32_t rest = bits.word[w]; rest; rest &= rest - 1) {
        const int c = 32 * w + __ffs(static_cast<int>(rest)) - 1, of = c & (kClasses - 1);
        uint32_t& places = place.word[kCounters == 2 && of >= 4 ? kCounters - 1 : 0];
        const uint32_t at = list + kRecordBytes * ptx::Permute(places, 0, 0x4440u | (of & 3));
        places += 1u << (of & 3) * 8;
        // A page from a file may mark more outliers than it has slots.
        ptx::CopyAsync8(at, values + 4 * min(slot, capacity - 1));
        ptx::StoreShared64(at + 8, key ? make_uint2(c * (kColumns * 8), token)
                                       : make_uint2(token * (kDecodeRows * 4), c / kClasses));
        ++slot;
      }
    }
  }

  // Begins tile `tile` of a run that ends before `end`. All lanes have loaded its codes.
  __device__ __forceinline__ void Begin(const DecodeJob& job, int page0, int tile, int end,
                                        const uint32_t (&lists)[2], int lane) {
    if ((tile & job.page_mask) == 0) before = 0;
    const Bits bits = next;
    if (tile + 1 < end) next = LoadBits(job, page0, tile + 1, lane);
    const Counts earlier = Count(bits, lane);
    few = max(Sum(total[0]), Sum(total[1])) <= kRecords;
    if (few) {
      List(job, bits, earlier, before + Sum(earlier), page0 + (tile >> job.page_shift), lists,
           lane);
    }
    before += Sum(OwnTotal(lane));
  }

  __device__ __forceinline__ int Rounds() const { return few ? 1 : kDecodeTile / kRoundTokens; }

  // Waits for the records of round `round` of a role; makes them where not all are made at once.
  __device__ __forceinline__ void Round(const DecodeJob& job, int page0, int tile, int role,
                                        int round, const uint32_t (&lists)[2], int lane) {
    if (!few) {
      __syncwarp();  // the round before is read
      Bits bits = LoadBits(job, page0, tile, lane);
      Counts earlier = Count(bits, lane);
      const int slot = before - Sum(OwnTotal(lane)) + Sum(earlier);
      const bool chosen = IsKey(lane) == (role == 0) && TokenOf(lane) / kRoundTokens == round;
#pragma unroll
      for (int i = 0; i < kWords; ++i) bits.word[i] = chosen ? bits.word[i] : 0;
      earlier = Count(bits, lane);
      List(job, bits, earlier, slot, page0 + (tile >> job.page_shift), lists, lane);
    }
    ptx::CopyWait<0>();
    __syncwarp();
  }

  // Adds products of K's records and the queries to sums (of tokens first_token and 8 more).
  __device__ __forceinline__ void AddScores(uint32_t list, int first_token, int lane,
                                            float (&sum)[4]) const {
    const int count = Sum(total[0]);
#pragma unroll 1
    for (int first = 0; first < count; first += 4) {
      const int i = first + (lane & 3);
      const uint4 record = ptx::LoadShared128(list + kRecordBytes * min(i, count - 1));
      const uint2 q = ptx::LoadShared64(query + record.z);
      const int token = i < count ? static_cast<int>(record.w) - first_token : -1;
      const bool upper = token == 0, lower = token == 8;
      ptx::Mma(sum, upper ? record.x : 0, lower ? record.x : 0, upper ? record.y : 0,
               lower ? record.y : 0, q.x, q.y);
    }
  }

  // Weights of a tile as tf32 to address `at`, for AddValues: [token, column].
  __device__ __forceinline__ void StoreWeights(const float (&weight)[4], uint32_t at,
                                               int first_token, int lane) const {
    const auto rounded = [](float x) { return __float_as_uint(x) + 0x1000u; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::StoreShared64(at + (first_token + 8 * half) * (kDecodeRows * 4) + (lane & 3) * 8,
                         make_uint2(rounded(weight[2 * half]), rounded(weight[2 * half + 1])));
    }
  }

  // Adds V's records to outputs. weights: where StoreWeights has stored.
  __device__ __forceinline__ void AddValues(uint32_t list, uint32_t weights, int lane,
                                            LaneRows<D, kColumns>* rows) const {
    const int r = lane >> 2, j = lane & 3;
    const uint32_t column = weights + 4 * r;
    int end = 0;
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
      int first = end;
      end += static_cast<int>(total[1].word[c / 4] >> c % 4 * 8 & 255);
#pragma unroll 1
      for (; first < end; first += 4) {
        const int i = first + j;
        const uint4 record = ptx::LoadShared128(list + kRecordBytes * min(i, end - 1));
        const uint32_t p = ptx::LoadShared32(column + record.z);
        const bool mine = i < end && static_cast<int>(record.w) == r;
        const float2 x = ptx::FloatsFromHalves(mine ? record.x : 0);
        const float2 y = ptx::FloatsFromHalves(mine ? record.y : 0);
        if constexpr (kColumns == 4) {  // columns 4-7 are elements 1 and 3
          const bool even = lane < kHalfWarp;
          ptx::MmaTf32(rows->out[c], x.x, y.x, x.y, y.y, even ? p : 0, even ? 0 : p);
        } else {
          ptx::MmaTf32(rows->out[2 * c], x.x, y.x, p);
          ptx::MmaTf32(rows->out[2 * c + 1], x.y, y.y, p);
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace hqmq
