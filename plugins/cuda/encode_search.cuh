// The best secondary of a chunk, bit for bit that of codec/search.h: by all of them in float32, or
// by the tensor cores first. One chunk a lane.
#pragma once

#include "encode_job.h"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {

// Score of secondary q: the larger of UnitScores. For finite x, fmaxf is the codec's Max: nothing
// compared is -0 or NaN.
__device__ __forceinline__ float SecondaryScore(const float x[4], const float4& q) {
  float v[4];
  RotateByConjugate(x, q.x, q.y, q.z, q.w, v);
  const float axis = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
  return fmaxf(axis, Mul(0.5f, Add(Add(fabsf(v[0]), fabsf(v[1])), Add(fabsf(v[2]), fabsf(v[3])))));
}

struct Best {
  float score;
  int which;
};

__device__ __forceinline__ void Offer(Best* best, float score, int which) {
  best->which = best->score < score ? which : best->which;
  best->score = fmaxf(best->score, score);
}

// The first best of all secondaries, for kSlots chunks of a lane.
template <int kSlots>
__device__ __forceinline__ void SearchAll(const float (&x)[kSlots][4], const float4* secondaries,
                                          int count, Best (&best)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) best[i] = {-1.0f, 0};
#pragma unroll 3
  for (int s = 0; s < count; ++s) {
    const float4 q = secondaries[s];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) Offer(&best[i], SecondaryScore(x[i], q), s);
  }
}

// SearchAll of one chunk, x in every lane, by a warp.
__device__ __forceinline__ Best SearchByWarp(const float x[4], const float4* secondaries, int count,
                                             int lane) {
  Best best = {-1.0f, 0x7FFFFFFF};
  for (int s = lane; s < count; s += kWarp) Offer(&best, SecondaryScore(x, secondaries[s]), s);
  const uint32_t own = BitCast<uint32_t>(fmaxf(best.score, 0.0f));  // ordered as the scores are
  const uint32_t top = __reduce_max_sync(kAllLanes, own);
  const int which = own == top ? best.which : 0x7FFFFFFF;
  return {BitCast<float>(top), __reduce_min_sync(kAllLanes, which)};
}

// Tensor cores. They find v (1 + i) = x conj((1 - i) q): the units turned by 1 + i are the sums of
// two of ±1, ±i, ±j, ±k, so that twice the score is the sum of the two longest components.
//
// Secondaries go by steps of 4 and groups of 4 steps; lane (r, j) of an MMA sees secondary j of
// each step, all four components, for chunks r and r + 8 of 16. Numbers are sums of two fp16 ones:
// the k of an MMA are (x high, x low, x low, x high) and (q high, q high, q low, q low), four each.
//
// Chunks are scaled to a largest component in [1, 2), so |x| < 4, and |(1 - i) q| < 1.43. Then a
// component is off by less than 2^-18.8 for what the low halves leave out, and 2^-17.8 for sums of
// 17 terms below 2.9 that are cut off at 24 bits: 2^-17.2, the score by less than 2^-16.2, of which
// 2^-15 leaves more than twice as much; and the codec's own float32 score by less than 2^-17.5.
constexpr float kFilterError = 3.6e-5f;  // 2^-15 + 2^-17.5
constexpr int kFilterSteps = 4;
constexpr int kGroupSecondaries = 4 * kFilterSteps;
// |q|^2 that the bound holds for; beyond it nothing is filtered.
constexpr float kFilterNorm = 1.01f;

__host__ __device__ inline int FilterGroups(int secondaries) {
  return (secondaries + kGroupSecondaries - 1) / kGroupSecondaries;
}

__device__ __forceinline__ uint2 HighAndLow(float a, float b) {
  const uint32_t high = ptx::PackHalf(a, b);
  const float low_a = Sub(a, FloatFromHalf(static_cast<uint16_t>(high)));
  const float low_b = Sub(b, FloatFromHalf(static_cast<uint16_t>(high >> 16)));
  return make_uint2(high, ptx::PackHalf(low_a, low_b));
}

// Secondary s of the filter's table: for each of two halves of k, b0 and b1 of columns 0, 1 and
// then of columns 2, 3 of v; 64 bytes, in the order in which lanes load them.
__device__ __forceinline__ void FillFilter(uint4* table, int s, const float4& secondary) {
  const float4 q = make_float4(secondary.x + secondary.y, secondary.y - secondary.x,
                               secondary.z + secondary.w, secondary.w - secondary.z);
  const float rows[4][4] = {
      {q.x, q.y, q.z, q.w}, {-q.y, q.x, -q.w, q.z}, {-q.z, q.w, q.x, -q.y}, {-q.w, -q.z, q.y, q.x}};
  uint4* step = table + s / 4 * 16;
  const int r = s % 4 * 2;  // columns r, r + 1 are components 0, 1 in one MMA, 2, 3 in the other
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 first = HighAndLow(rows[i][2 * half], rows[i][2 * half + 1]);
      const uint2 second = HighAndLow(rows[i + 2][2 * half], rows[i + 2][2 * half + 1]);
      step[(r + i) * 2 + half] = make_uint4(first.x, first.y, second.x, second.y);
    }
  }
}

// The best and the second best group of the lane's secondaries so far, for one chunk: scores whose
// lowest bits are the number of the group.
struct TopTwo {
  uint32_t best, second;
};

__device__ __forceinline__ void Offer(TopTwo* top, uint32_t score) {
  top->second = max(top->second, min(top->best, score));
  top->best = max(top->best, score);
}

__device__ __forceinline__ int Max3(int a, int b, int c) { return __vimax3_s32(a, b, c); }

struct FilterTables {
  const float4* secondaries;
  uint32_t filter;  // shared address
  uint32_t stage;   // shared address of the warp's 512 bytes
  int count;
  bool usable;  // every secondary is within kFilterNorm
};

// SearchAll of a lane's chunk by a warp. Lanes that are not `wanted` may get anything.
__device__ __forceinline__ Best SearchFiltered(const float (&x)[4], bool wanted,
                                               const FilterTables& tables, int lane) {
  const float largest = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
  const uint32_t exponent = BitCast<uint32_t>(largest) >> 23;
  const bool scaled = exponent >= 27 && exponent <= 187;  // 2^-100 … 2^61
  const float factor = scaled ? BitCast<float>((254 - exponent) << 23) : 0.0f;
  const uint2 first = HighAndLow(Mul(x[0], factor), Mul(x[1], factor));
  const uint2 last = HighAndLow(Mul(x[2], factor), Mul(x[3], factor));
  ptx::StoreShared128(tables.stage + 16 * lane, make_uint4(first.x, last.x, first.y, last.y));
  __syncwarp();
  uint32_t a[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i / 2][i % 2] = ptx::LoadShared32(tables.stage + 128 * i + 4 * lane);
    a[i / 2][i % 2 + 2] = ptx::LoadShared32(tables.stage + 128 * i + 4 * (lane ^ 2));
  }
  __syncwarp();

  const int groups = FilterGroups(tables.count), index_bits = 32 - __clz(groups - 1) + 2;
  const uint32_t kept = ~0u << index_bits;
  uint32_t from = tables.filter + (lane / 4 * 2 + lane % 2) * 16;
  TopTwo top[4] = {};
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    int scores[4] = {};  // of chunk 8 * i + lane / 4, twice, as bits of floats
#pragma unroll
    for (int step = 0; step < kFilterSteps; step += 2) {
      int pairs[4][6];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 q = ptx::LoadShared128(from + 256 * (step + i));
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          float u[4] = {}, w[4] = {};
          ptx::Mma(u, a[tile][0], a[tile][1], a[tile][2], a[tile][3], q.x, q.y);
          ptx::Mma(w, a[tile][0], a[tile][1], a[tile][2], a[tile][3], q.z, q.w);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const float v0 = fabsf(u[2 * row]), v1 = fabsf(u[2 * row + 1]);
            const float v2 = fabsf(w[2 * row]), v3 = fabsf(w[2 * row + 1]);
            int* own = pairs[2 * tile + row] + 3 * i;
            own[0] = BitCast<int>(v0 + v1);
            own[1] = BitCast<int>(v2 + v3);
            own[2] = BitCast<int>(fmaxf(v0, v1) + fmaxf(v2, v3));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int k = 0; k < 6; k += 2) scores[i] = Max3(scores[i], pairs[i][k], pairs[i][k + 1]);
      }
    }
    from += 256 * kFilterSteps;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      Offer(&top[i], (static_cast<uint32_t>(scores[i]) & kept) | static_cast<uint32_t>(group << 2));
  }
  // Chunk 8 * i + lane / 4 in top[i], among secondaries lane % 4 of each step: join the four.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    top[i].best |= lane & 3;
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      const uint32_t second = __shfl_xor_sync(kAllLanes, top[i].second, offset);
      Offer(&top[i], __shfl_xor_sync(kAllLanes, top[i].best, offset));
      top[i].second = max(top[i].second, second);
    }
  }
  TopTwo own = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t best = __shfl_sync(kAllLanes, top[i].best, lane % 8 * 4);
    const uint32_t second = __shfl_sync(kAllLanes, top[i].second, lane % 8 * 4);
    if (lane / 8 == i) own = {best, second};
  }

  // Both are within kFilterError, and cut off by less than 2^index_bits units of their last place.
  const float best_score = BitCast<float>(own.best & kept);
  const float gap = best_score - BitCast<float>(own.second & kept);
  const float cut = BitCast<float>(static_cast<uint32_t>(127 - 23 + index_bits) << 23);
  const bool sure = tables.usable && scaled && gap > 2 * kFilterError + best_score * cut;
  Best best = {-1.0f, 0};
  const int low = static_cast<int>(own.best & ~kept);
  const int start = low / 4 * kGroupSecondaries + low % 4;
#pragma unroll
  for (int step = 0; step < kFilterSteps; ++step) {
    const int s = start + 4 * step;  // beyond the last one lie zeros
    Offer(&best, SecondaryScore(x, tables.secondaries[s]), s);
  }
  for (uint32_t open = __ballot_sync(kAllLanes, wanted && !sure); open; open &= open - 1) {
    const int source = __ffs(static_cast<int>(open)) - 1;
    float from_lane[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) from_lane[k] = __shfl_sync(kAllLanes, x[k], source);
    const Best found = SearchByWarp(from_lane, tables.secondaries, tables.count, lane);
    if (lane == source) best = found;
  }
  return best;
}

}  // namespace cuda
}  // namespace hqmq
