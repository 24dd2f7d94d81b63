// What the decode kernel holds in shared memory, and the queries and new tokens in it as fp16.
#pragma once

#include <type_traits>

#include "decode_feed.cuh"
#include "decode_share.cuh"

namespace hqmq {
namespace cuda {

// Bytes of one role's levels, and what they are aligned to.
constexpr uint32_t kLevelBytes = 256;

template <int D>
struct DecodeShared {
  uint4 levels[2][kLevelBytes / 16];  // of K, V, as their codecs want them
  uint16_t query[2][kDecodeRows][D];  // as they are; rotated, at PlaceOf
  union {
    uint4 lanes[D > 128 ? D / 32 : 1][kWarp];  // of SharedQuery
    ShareScratch share;                        // before the first problem is loaded
  };
  uint16_t fresh[2][kMostDecodeTokens][D];  // new tokens of K, V
  float factor[2][kDecodeRows];             // what query was divided by, powers of two
  float maximum[kDecodeWarps][kDecodeRows], sum[kDecodeWarps][kDecodeRows];  // of StoreState
  float weight[kDecodeRows][kMostParts];
  union {
    WorkProblem problem;
    Problem count_problem;  // of instances that cut by count only
  };
  uint64_t stored, joined;  // barriers of StoreState and JoinStates
  float4 turn;              // of V's words from K's, if `turned`
  int32_t flag, bad_values, turned;
  int32_t piece;  // as in WorkProblem

  template <bool kByWork>
  __device__ __forceinline__ const ProblemType<kByWork>& Held() const {
    if constexpr (kByWork) {
      return problem;
    } else {
      return count_problem;
    }
  }
};

// The codecs' tables: V's may be K's.
template <class Key, class Value>
struct Tables {
  static constexpr bool kOne = std::is_same<Key, Value>::value && Key::kShared;
  static constexpr bool kTurned = kOne && Key::kTurned;  // K's words may be V's, too
  // K's table comes first, unless V's would not be aligned behind it.
  static constexpr bool kKeyFirst = Key::kTableBytes % Value::kTableAlignment == 0;
  static constexpr uint32_t kKey = kOne || kKeyFirst ? 0 : Value::kTableBytes;
  static constexpr uint32_t kValue = kOne || !kKeyFirst ? 0 : Key::kTableBytes;
  static constexpr uint32_t kBytes =
      kOne ? Key::kTableBytes : Key::kTableBytes + Value::kTableBytes;
  static constexpr uint32_t kAlignment =
      Key::kTableAlignment > Value::kTableAlignment ? Key::kTableAlignment : Value::kTableAlignment;
  static_assert(kKey % Key::kTableAlignment == 0, "the table of K is aligned");
};

// Fills the tables of both roles with the words and levels of head h and sets lanes up for them.
// Returns whether V's outputs will be sums of K's words. All threads; synchronise before and after.
template <class Key, class Value, int D>
__device__ __forceinline__ bool FillTables(const DecodeJob& job, int h, const uint32_t (&tables)[2],
                                           const uint32_t (&levels)[2], DecodeShared<D>* shared,
                                           int lane, typename Key::Lane* key,
                                           typename Value::Lane* value) {
  const AttentionJob& a = job.attention;
  if constexpr (Key::kCompact) {
    Key::FillLevels(a.key, levels[0], job.copies[0]);
    Value::FillLevels(a.value, levels[1], job.copies[1]);
  } else {
    Key::FillLevels(a.key, levels[0]);
    Value::FillLevels(a.value, levels[1]);
  }
  float4 turn = make_float4(1.0f, 0.0f, 0.0f, 0.0f);
  bool turned = false;
  if constexpr (Tables<Key, Value>::kTurned) {
    turned =
        FillBoth<Key>(a.key, a.value, h, &turn, [&](Copies which, int row, const uint2(&words)[4]) {
          if constexpr (Key::kCompact) {
            const int at = which == Copies::kSecondHalf;
            Key::Store(tables[at], job.copies[at], which, row, words);
          } else {
            constexpr int kBytes = 8 * Key::kCopies;
            if (which == Copies::kAll)
              Filling<Key>::template Store<kBytes>(tables[0], row, words);
            else if (which == Copies::kFirstHalf)
              Filling<Key>::template Store<kBytes / 2>(tables[0], row, words);
            else
              Filling<Key>::template Store<kBytes / 2>(tables[0] + kBytes / 2, row, words);
          }
        });
    if constexpr (Key::kCompact) {
      Key::UseCopies(tables[0], levels[0], job.copies[0],
                     turned ? Copies::kAll : Copies::kFirstHalf, lane, key);
      const int at = turned ? 0 : 1;
      Value::UseCopies(tables[at], levels[at], job.copies[at],
                       turned ? Copies::kAll : Copies::kSecondHalf, lane, value);
    } else {
      Key::UseCopies(0, turned, lane, key);
      Value::UseCopies(1, turned, lane, value);
    }
  } else {
    LoadedRows<Key> of_key;
    LoadedRows<Value> of_value;
    LoadRole(a.key, h, &of_key);
    LoadRole(a.value, h, &of_value);
    StoreRole(a.key, of_key, [&](int row, const uint2(&words)[4]) {
      if constexpr (Key::kCompact)
        Key::Store(tables[0], job.copies[0], Copies::kAll, row, words);
      else
        Filling<Key>::template Store<8 * Key::kCopies>(tables[0], row, words);
    });
    StoreRole(a.value, of_value, [&](int row, const uint2(&words)[4]) {
      if constexpr (Value::kCompact)
        Value::Store(tables[1], job.copies[1], Copies::kAll, row, words);
      else
        Filling<Value>::template Store<8 * Value::kCopies>(tables[1] + Value::kRoleBytes, row,
                                                           words);
    });
    if constexpr (Key::kCompact) {
      Key::UseCopies(tables[0], levels[0], job.copies[0], Copies::kAll, lane, key);
      Value::UseCopies(tables[1], levels[1], job.copies[1], Copies::kAll, lane, value);
    }
  }
  if (threadIdx.x == 0) {
    shared->turn = turn;
    shared->turned = turned;
  }
  return turned;
}

// A chunk of sums of V's outputs, which may have been made with K's words, in V's.
template <int D>
__device__ __forceinline__ float4 TurnedOutput(const DecodeShared<D>& shared, const float4& chunk) {
  return shared.turned ? Product(chunk, shared.turn) : chunk;
}

// Bytes of the rotated queries chunk by chunk, which outliers take (decode_outliers.cuh).
__host__ __device__ constexpr uint32_t QueryChunkBytes(int head_dim, int columns) {
  return static_cast<uint32_t>(head_dim / 4 * columns * 8);
}

// Where element i of a rotated query lies: of eight, the second and the third pair change places,
// so that the first pairs of two chunks are neighbours.
__device__ __forceinline__ int PlaceOf(int i) { return (i & ~6) | (i & 2) << 1 | (i & 4) >> 1; }

// x / 2^e with the largest of a row in [1, 2) as fp16; returns 2^e. A warp; this lane's elements
// lie at lane + 32 i.
template <int D>
__device__ __forceinline__ float StoreQuery(const float (&x)[D / kWarp], uint16_t* to, int lane) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) largest = fmaxf(largest, fabsf(x[i]));
  const uint32_t exponent = __float_as_uint(WarpMax(largest)) & 0x7F800000u;
  const bool usual = exponent >= 0x01000000u && exponent <= 0x7E000000u;
  const float unit = usual ? __uint_as_float(exponent) : 1.0f;
  const float per_unit = usual ? __uint_as_float(0x7F000000u - exponent) : 1.0f;
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) to[lane + i * kWarp] = HalfFromFloat(x[i] * per_unit);
  return unit;
}

// Hadamard (codec/hadamard.h) of a row by a warp; lane i has elements i + 32 n.
template <int D>
__device__ __forceinline__ void HadamardByLanes(float (&x)[D / kWarp], float scale, int lane) {
#pragma unroll
  for (int stride = 1; stride < kWarp; stride *= 2) {
#pragma unroll
    for (int i = 0; i < D / kWarp; ++i) {
      const float other = __shfl_xor_sync(kAllLanes, x[i], stride);
      x[i] = lane & stride ? Sub(other, x[i]) : Add(x[i], other);
    }
  }
#pragma unroll
  for (int stride = 1; stride < D / kWarp; stride *= 2) {
#pragma unroll
    for (int i = 0; i < D / kWarp; ++i) {
      if (i & stride) continue;
      const float low = x[i], high = x[i + stride];
      x[i] = Add(low, high);
      x[i + stride] = Sub(low, high);
    }
  }
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) x[i] = Mul(x[i], scale);
}

// Rows of a problem and its new tokens on their way into shared memory, a row of queries for each
// of the first warps. Loading and storing are apart so that other work hides the loads.
template <int D>
struct NewRows {
  static constexpr int kThreads = kDecodeThreads - kDecodeRows * kWarp;
  uint16_t query[D / kWarp];  // as they are: to convert them is to wait for them
  uint16_t fresh;             // element threadIdx.x - kDecodeRows * kWarp of the tokens

  static __device__ __forceinline__ uint16_t Bits(const Rows& x, int64_t element) {
    return static_cast<const uint16_t*>(x.data)[element];
  }
  static __device__ __forceinline__ float Value(const Rows& x, uint16_t bits) {
    return x.dtype == HQMQ_FLOAT16 ? FloatFromHalf(bits) : FloatFromBf16(bits);
  }
  static __device__ __forceinline__ uint16_t Fresh(const DecodeJob& job, const Problem& p, int i,
                                                   int tokens) {
    const AttentionJob& a = job.attention;
    const int role = i >= tokens * D, t = i / D - role * tokens;
    const Rows& x = role ? a.value.x : a.key.x;
    return Bits(x, RowStart(x, p.b, p.h, t) + i % D);
  }

  __device__ __forceinline__ void Load(const DecodeJob& job, const Problem& p, int warp, int lane) {
    const AttentionJob& a = job.attention;
    const int tokens = p.span.end - p.span.past, row = p.row + warp;
    const int first = static_cast<int>(threadIdx.x) - kDecodeRows * kWarp;
    fresh = 0;
#pragma unroll
    for (int i = 0; i < D / kWarp; ++i) query[i] = 0;
    if (warp < p.rows) {
      const int token = job.by_group(row);
      const int64_t from = RowStart(a.q, p.b, p.h * a.group + row - token * a.group, token);
#pragma unroll
      for (int i = 0; i < D / kWarp; ++i) query[i] = Bits(a.q, from + lane + i * kWarp);
    } else if (first >= 0 && first < 2 * tokens * D) {
      fresh = Fresh(job, p, first, tokens);
    }
  }

  // All threads; synchronise before and after.
  __device__ __forceinline__ void Store(const DecodeJob& job, const Problem& p,
                                        DecodeShared<D>* shared, int warp, int lane) {
    const AttentionJob& a = job.attention;
    if (warp < kDecodeRows) {
      float x[D / kWarp];
#pragma unroll
      for (int i = 0; i < D / kWarp; ++i) x[i] = Value(a.q, query[i]);
      const float plain = StoreQuery<D>(x, shared->query[0][warp], lane);
      if (a.key.role.hadamard) HadamardByLanes<D>(x, a.key.hadamard_scale, lane);
      const float rotated = StoreQuery<D>(x, shared->query[1][warp], PlaceOf(lane));
      if (lane == 0) {
        shared->factor[0][warp] = plain;
        shared->factor[1][warp] = rotated;
      }
      return;
    }
    const int tokens = p.span.end - p.span.past;
    int i = static_cast<int>(threadIdx.x) - kDecodeRows * kWarp;
    for (uint16_t x = fresh; i < 2 * tokens * D;) {
      const int role = i >= tokens * D;
      const Rows& from = role ? a.value.x : a.key.x;
      shared->fresh[role][i / D - role * tokens][i % D] =
          from.dtype == HQMQ_FLOAT16 ? x : HalfFromFloat(FloatFromBf16(x));
      i += kThreads;
      if (i < 2 * tokens * D) x = Fresh(job, p, i, tokens);
    }
  }
};

// A lane's part of the queries as second operands: chunks j*D/16…, column r (of four rows: r % 4).
template <int D, int kColumns>
struct QueryLane {
  uint2 chunk[D / 16];

  __device__ void Load(const DecodeShared<D>& shared, int rotated, int lane) {
    const int row = (lane >> 2) & (kColumns - 1);
    const uint4* from =
        reinterpret_cast<const uint4*>(shared.query[rotated][row] + (lane & 3) * (D / 4));
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const uint4 x = from[i];
      chunk[2 * i] = make_uint2(x.x, x.y);
      chunk[2 * i + 1] = make_uint2(x.z, x.w);
    }
  }
  // Chunks 2i and 2i+1; of rotated ones: the first pairs of both, then the second ones.
  __device__ __forceinline__ uint4 Two(int i) const {
    return make_uint4(chunk[2 * i].x, chunk[2 * i].y, chunk[2 * i + 1].x, chunk[2 * i + 1].y);
  }
};

// The rotated queries in the same way, where lanes have no registers for them.
template <int D, int kColumns>
struct SharedQuery {
  uint32_t at;

  // All threads; synchronise before and after.
  __device__ void Load(DecodeShared<D>* shared, int warp, int lane) {
    at = ptx::SharedAddress(&shared->lanes[0][lane]);
    if (warp != 0) return;
    QueryLane<D, kColumns> query;
    query.Load(*shared, 1, lane);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) shared->lanes[i][lane] = query.Two(i);
  }
  __device__ __forceinline__ uint4 Two(int i) const {
    return ptx::LoadShared128(at + i * (16 * kWarp));
  }
};

}  // namespace cuda
}  // namespace hqmq
