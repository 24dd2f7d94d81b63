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
  static constexpr int kTileBits = D / 2;  // bytes of a tile's mask
  static constexpr int kHalfWarp = kWarp / 2;
  // Records of one role: values (8 bytes each), then where they belong (4): the row of the first
  // operand in the upper half (K: token; V: c / kClasses), the place of the second operand in bytes
  // in the lower one (K: of the query's chunk; V: of the token's weights).
  static constexpr int kRecords = D > 64 ? 80 : 40;
  static constexpr uint32_t kListBytes = kRecords * 12, kWhere = kRecords * 8;
  static constexpr uint32_t kNobody = 0xFFFF0000u;           // a record that fills up four
  static constexpr int kRoundTokens = kRecords / (D / 4);    // whose outliers always fit
  static constexpr uint32_t kWeightBytes = kDecodeRows * 4;  // of a token
  static_assert(kDecodeTile == kHalfWarp, "a lane for each token of K and of V");
  static_assert(kRoundTokens >= 1 && kRecords < 256, "rounds fit; counters of 8 bits");
  static_assert(QueryChunkBytes(D, kColumns) <= 1 << 16, "16 bits for a place");

  struct Bits {
    uint32_t word[kWords];
  };
  // Numbers of outliers by class, a byte each.
  struct Counts {
    uint32_t word[kCounters];

    __device__ __forceinline__ int Of(int c) const {
      return static_cast<int>(word[c / 4] >> c % 4 * 8 & 255);
    }
    __device__ __forceinline__ int Sum() const {
      uint32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kCounters; ++i) sum = __dp4a(word[i], 0x01010101u, sum);
      return static_cast<int>(sum);
    }
    // V's classes begin at multiples of four records.
    __device__ __forceinline__ Counts Padded() const {
      Counts out;
#pragma unroll
      for (int i = 0; i < kCounters; ++i) out.word[i] = (word[i] + 0x03030303u) & 0xFCFCFCFCu;
      return out;
    }
    // Sums of the classes before each, which are less than 256.
    __device__ __forceinline__ Counts Before() const {
      Counts out;
      uint32_t lower = 0;
#pragma unroll
      for (int i = 0; i < kCounters; ++i) {
        out.word[i] = word[i] * 0x01010100u + lower * 0x01010101u;
        lower = __dp4a(word[i], 0x01010101u, lower);
      }
      return out;
    }
    __device__ __forceinline__ Counts operator+(const Counts& other) const {
      Counts out;
#pragma unroll
      for (int i = 0; i < kCounters; ++i) out.word[i] = word[i] + other.word[i];
      return out;
    }
  };

  // Of this lane's role and token.
  Bits next;           // of the tile to come
  const char* mask;    // where they lie; null: there is no page, nor outliers
  const char* values;  // of the page of that tile
  int before;          // outliers of the role in the tiles of the page before that tile
  // Of the tile.
  Counts total[2];  // of the records of K, V
  bool few;         // all outliers have records
  uint32_t query;   // address of the queries' chunks

  // Copies the rotated queries (PlaceOf) chunk by chunk to address `at`, QueryChunkBytes of them.
  // All threads; synchronise before and after.
  __device__ __forceinline__ void StoreQueries(const DecodeShared<D>& shared, uint32_t at) {
    query = at;
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
  static __device__ __forceinline__ const RoleView& View(const DecodeJob& job, int lane) {
    return IsKey(lane) ? job.attention.key : job.attention.value;
  }

  static __device__ __forceinline__ Bits LoadBits(const char* from) {
    Bits out;
    if constexpr (D == 64) {
      out.word[0] = ptx::LoadGlobalBits16(from);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.word[i] = ptx::LoadGlobalBits32(from + 4 * i);
    }
    return out;
  }

  // Where the mask of this lane's role and token begins in a page (PageIndex), and the page's
  // values.
  static __device__ __forceinline__ const char* MaskOf(const RoleView& view, int64_t page,
                                                       int lane) {
    return reinterpret_cast<const char*>(view.cache.outlier_mask + page * view.mask_words) +
           TokenOf(lane) * (D / 32);
  }
  static __device__ __forceinline__ const char* ValuesOf(const RoleView& view, int64_t page) {
    return reinterpret_cast<const char*>(view.cache.outlier_value) +
           page * view.role.outlier_capacity * 8;
  }

  // Before the first tile of a run. pages: PagesOf the sequence and head.
  __device__ __forceinline__ void Start(const DecodeJob& job, int pages, int tile, int lane) {
    const RoleView& view = View(job, lane);
    const int in_page = tile & job.page_mask;
    const int page = PageOf(job, pages, tile >> job.page_shift);
    const bool found = page != kNoPage;
    mask = found ? MaskOf(view, page, lane) + in_page * kTileBits : nullptr;
    values = ValuesOf(view, page);
    next = found ? LoadBits(mask) : Bits{};
    before = 0;
#pragma unroll 1
    for (int i = found ? in_page : 0; i > 0; i -= 4) {
      Bits earlier[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        earlier[k] = Bits{};
        if (i > k) earlier[k] = LoadBits(mask - (i - k) * kTileBits);
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

  static __device__ __forceinline__ Counts CountsOf(const Bits& bits) {
    constexpr uint32_t kOfClass = kClasses == 2   ? 0x55555555u
                                  : kClasses == 4 ? 0x11111111u
                                                  : 0x01010101u;
    Counts own = {};
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
#pragma unroll
      for (int w = 0; w < kWords; ++w)
        own.word[c / 4] += static_cast<uint32_t>(__popc(bits.word[w] & kOfClass << c)) << c % 4 * 8;
    return own;
  }

  // Sums of the role's tokens up to the lane's.
  static __device__ __forceinline__ Counts Through(const Counts& own) {
    Counts through = own;
#pragma unroll
    for (int i = 0; i < kCounters; ++i)
#pragma unroll
      for (int offset = 1; offset < kHalfWarp; offset *= 2)
        through.word[i] = ptx::AddLower16(through.word[i], offset);
    return through;
  }
  static __device__ __forceinline__ Counts Total(const Counts& through, int role) {
    Counts out;
#pragma unroll
    for (int i = 0; i < kCounters; ++i)
      out.word[i] = __shfl_sync(kAllLanes, through.word[i], role * kHalfWarp + kHalfWarp - 1);
    return out;
  }

  // Makes a record of each outlier that `bits` mark, sorted by class. through: counts up to this
  // token's; all: of the role; slot: of the last one; last_slot: of a page; lists: addresses of
  // records of K, V.
  static __device__ __forceinline__ void List(const Bits& bits, const Counts& own,
                                              const Counts& through, const Counts& all, int slot,
                                              const char* values, int last_slot,
                                              const uint32_t (&lists)[2], int lane) {
    const bool key = IsKey(lane);
    const uint32_t token = TokenOf(lane), list = key ? lists[0] : lists[1];
    const uint32_t shift = key ? 0 : kClasses == 2 ? 1 : kClasses == 4 ? 2 : 3;
    const uint32_t scale = key ? kColumns * 8 : 1 << 16;
    const uint32_t base = key ? token << 16 : token * kWeightBytes;
    const Counts padded = all.Padded();
    Counts place;  // of the next record of each class
#pragma unroll
    for (int i = 0; i < kCounters; ++i) place.word[i] = key ? all.word[i] : padded.word[i];
    place = place.Before();
    const Counts ends = place + all;
#pragma unroll
    for (int i = 0; i < kCounters; ++i) {
      const uint32_t c = lane >> 2 & 3, end = ptx::Permute(ends.word[i], 0, 0x4440u | c);
      const bool fills = key ? 4 * i + c == kClasses - 1 : 4 * i + c < kClasses;
      if (fills && (lane & 3) < static_cast<int>(-end & 3))
        ptx::StoreShared32(list + kWhere + 4 * (end + (lane & 3)), kNobody);
      place.word[i] += through.word[i] - own.word[i];
    }
#pragma unroll
    for (int w = kWords - 1; w >= 0; --w) {
      for (uint32_t rest = bits.word[w]; rest;) {
        const uint32_t in_word = 31 - __clz(static_cast<int>(rest)), c = 32 * w + in_word;
        rest &= ~(1u << in_word);
        uint32_t& places = place.word[kCounters == 2 && (c & 4) ? kCounters - 1 : 0];
        const uint32_t in_counter = kClasses == 2 ? c & 1 : c & 3;
        const uint32_t i = ptx::Permute(places, 0, 0x4440u | in_counter);
        // The shift wraps at 32.
        places += __funnelshift_l(0u, 1u, 8 * (kClasses == 2 ? in_counter : c));
        // A page of a damaged cache may mark more outliers than it has slots.
        ptx::CopyAsync8(list + 8 * i,
                        values + uint64_t{8} * static_cast<uint32_t>(min(slot, last_slot)));
        ptx::StoreShared32(list + kWhere + 4 * i, (c >> shift) * scale + base);
        --slot;
      }
    }
  }

  // Begins tile `tile` of a run that ends before `end`. All lanes have loaded its codes.
  __device__ __forceinline__ void Begin(const DecodeJob& job, int pages, int tile, int end,
                                        const uint32_t (&lists)[2], int lane) {
    const Bits bits = next;
    const bool ends_page = ((tile + 1) & job.page_mask) == 0;
    if (job.attention.call.pages.pool_pages == 0) {
      mask += ends_page ? kTileBits + 4 : kTileBits;  // beyond the number of those without a slot
      if (tile + 1 < end) next = LoadBits(mask);
    } else if (tile + 1 < end) {
      if (ends_page) {
        const int page = PageOf(job, pages, (tile + 1) >> job.page_shift);
        mask = page != kNoPage ? MaskOf(View(job, lane), page, lane) : nullptr;
      } else if (mask) {
        mask += kTileBits;
      }
      next = mask ? LoadBits(mask) : Bits{};
    }
    const Counts own = CountsOf(bits), through = Through(own);
    total[0] = Total(through, 0);
    total[1] = Total(through, 1);
    few = max(total[0].Sum(), total[1].Padded().Sum()) <= kRecords;
    const int capacity = View(job, lane).role.outlier_capacity;
    Counts all;
#pragma unroll
    for (int i = 0; i < kCounters; ++i)
      all.word[i] = IsKey(lane) ? total[0].word[i] : total[1].word[i];
    if (few) {
      List(bits, own, through, all, before + through.Sum() - 1, values, capacity - 1, lists, lane);
    }
    before += all.Sum();
    if (ends_page) {
      before = 0;
      if (job.attention.call.pages.pool_pages == 0) {
        values += static_cast<int64_t>(capacity) * 8;
      } else if (tile + 1 < end) {
        values = ValuesOf(View(job, lane), PageOf(job, pages, (tile + 1) >> job.page_shift));
      }
    }
  }

  __device__ __forceinline__ int Rounds() const { return few ? 1 : kDecodeTile / kRoundTokens; }

  // Makes records of round `round` of one role of a tile; returns their numbers. Rare: it starts
  // from the mask again, so that tiles with few outliers keep nothing for it.
  static __device__ __noinline__ Counts MakeRound(const DecodeJob& job, int pages, int tile,
                                                  int role, int round, uint32_t key_list,
                                                  uint32_t value_list, int lane) {
    TileOutliers self;
    self.Start(job, pages, tile, lane);
    const uint32_t lists[2] = {key_list, value_list};
    Bits bits = self.next;
    const int slot = self.before + Through(CountsOf(bits)).Sum() - 1;
    const bool chosen = IsKey(lane) == (role == 0) && TokenOf(lane) / kRoundTokens == round;
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits.word[i] = chosen ? bits.word[i] : 0;
    const Counts own = CountsOf(bits), through = Through(own), all = Total(through, role);
    if (IsKey(lane) == (role == 0)) {
      List(bits, own, through, all, slot, self.values, View(job, lane).role.outlier_capacity - 1,
           lists, lane);
    }
    return all;
  }

  // Waits for the records of round `round` of a role; makes them where not all are made at once.
  __device__ __forceinline__ void Round(const DecodeJob& job, int pages, int tile, int role,
                                        int round, const uint32_t (&lists)[2], int lane) {
    if (!few) {
      __syncwarp();  // the round before is read
      total[role] = MakeRound(job, pages, tile, role, round, lists[0], lists[1], lane);
    }
    ptx::CopyCommit();  // copies of no group are not waited for
    ptx::CopyWait<0>();
    __syncwarp();
  }

  // Adds products of K's records and the queries to sums (of tokens first_token and 8 more).
  __device__ __forceinline__ void AddScores(uint32_t list, int first_token, int lane,
                                            float (&sum)[4]) const {
    const uint32_t row = 8 * ((lane >> 2) & (kColumns - 1));
    const uint32_t token = static_cast<uint32_t>(first_token) << 16;
    const uint32_t end = list + 8 * total[0].Sum();
    uint32_t where_at = list + kWhere + 4 * (lane & 3), lane_at = 8 * (lane & 3);
#pragma unroll 1
    for (uint32_t at = list; at < end; at += 32, where_at += 16) {
      const uint32_t where = ptx::LoadShared32(where_at);
      const uint2 x = ptx::LoadShared64(at + lane_at);
      const uint2 q = ptx::LoadShared64(query + ptx::AndOr(where, 0xFFFFu, row));
      const uint32_t of = where & 0xFFFF0000u;
      const bool upper = of == token, lower = of == token + (8u << 16);
      ptx::Mma(sum, upper ? x.x : 0, lower ? x.x : 0, upper ? x.y : 0, lower ? x.y : 0, q.x, q.y);
    }
  }

  // Weights of a tile as tf32 to address `at`, for AddValues: [token, column].
  __device__ __forceinline__ void StoreWeights(const float (&weight)[4], uint32_t at,
                                               int first_token, int lane) const {
    const auto rounded = [](float x) { return __float_as_uint(x) + 0x1000u; };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::StoreShared64(at + (first_token + 8 * half) * kWeightBytes + (lane & 3) * 8,
                         make_uint2(rounded(weight[2 * half]), rounded(weight[2 * half + 1])));
    }
  }

  // Adds V's records to outputs. weights: where StoreWeights has stored.
  __device__ __forceinline__ void AddValues(uint32_t list, uint32_t weights, int lane,
                                            LaneRows<D, kColumns>* rows) const {
    const uint32_t r = lane >> 2;
    uint32_t first = list, where_at = list + kWhere + 4 * (lane & 3);
    const uint32_t lane_at = 8 * (lane & 3);
#pragma unroll
    for (int c = 0; c < kClasses; ++c) {
#pragma unroll 1
      for (const uint32_t end = first + 8 * total[1].Of(c); first < end;
           first += 32, where_at += 16) {
        const uint32_t where = ptx::LoadShared32(where_at);
        const uint2 value = ptx::LoadShared64(first + lane_at);
        const uint32_t p = ptx::LoadShared32(weights + ptx::AndOr(where, 0xFFFFu, 4 * r));
        const bool mine = (where & 0xFFFF0000u) == r << 16;
        const float2 x = ptx::FloatsFromHalves(mine ? value.x : 0);
        const float2 y = ptx::FloatsFromHalves(mine ? value.y : 0);
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
