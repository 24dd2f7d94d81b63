// A lane's softmax and outputs in the decode kernel, and the two products of a tile.
//
// Scores S [tokens, rows] = K Q', outputs O' [elements, rows] = V' P. K and V are the first (m16)
// operand, query rows the second (n8). The order of k inside an MMA is free as long as both
// operands share it, so that lanes own whole chunks: lane (r = lane/4, j = lane%4) has chunks
// j*D/16… of tokens r and r+8 of K, and chunks r*D/32… of tokens 2j, 2j+1, 2j+8, 2j+9 of V.
//
// In O' a chunk's pairs (0, 1) and (2, 3) are the k pairs of one token: with (p, 0) as the other
// operand the MMA sums elements 0 and 2, with (0, p) elements 1 and 3. Up to four rows use columns
// 0-3 for one and 4-7 for the other; more rows take two MMAs. No register has to be rearranged.
#pragma once

#include "decode_work.cuh"

namespace hqmq {
namespace cuda {

// A warp's maximum follows its scores when one is greater by more than 2^kSlack: rescaling outputs
// costs more than the bits. Weights are exp2(score - base). They are multiplied by V's scales, and
// the products become fp16: so base is the maximum plus log2 of `unit`, a power of two above the
// scales, less kWeightShift, so that the largest product is the largest power that fp16 holds and
// small ones stay normal numbers.
constexpr float kSlack = 6.0f;
constexpr float kMostWeight = 15.0f;  // log2 of it
constexpr float kWeightShift = kMostWeight - kSlack;
// A maximum of no scores.
constexpr float kNoScore = -1e30f;

// Rows: 4 or 8. Scores of the lane: columns 2j and 2j+1; columns 4-7 repeat 0-3 of four rows.
// kPairs: lanes with j < 2 sum weights of tiles that may be the first of a pair (WeighTwo), and of
// exact tokens; the others those of tiles that may be the second.
template <int D, int kColumns, bool kPairs = false>
struct LaneRows {
  static_assert(!kPairs || kColumns == 4, "columns 4-7 repeat others");
  static constexpr int kTiles = D / 32 * (kColumns / 4);  // accumulators [16, 8]
  float out[kTiles][4];
  float base[2], sum[2];
  float unit, limit;  // limit: of score - base, kMostWeight - log2 unit

  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) out[i][k] = 0.0f;
    base[0] = base[1] = kNoScore;
    sum[0] = sum[1] = 0.0f;
    unit = 0x1p-24f;  // the least fp16
    limit = kMostWeight + 24.0f;
  }

  static __device__ __forceinline__ bool OfSecond() { return (threadIdx.x & 2) != 0; }

  // When a maximum or the unit grows. score: in base 2; largest: of V's scales. kPairs: those of
  // lanes with j < 2 count.
  __device__ __forceinline__ void Rescale(const float (&score)[4], float largest) {
    float next[2] = {fmaxf(score[0], score[2]), fmaxf(score[1], score[3])};
    if constexpr (kPairs) {
      largest = OfSecond() ? 0.0f : largest;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float other = __shfl_xor_sync(kAllLanes, next[i], 2);
        next[i] = OfSecond() ? other : next[i];
      }
    }
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      next[0] = fmaxf(next[0], __shfl_xor_sync(kAllLanes, next[0], offset));
      next[1] = fmaxf(next[1], __shfl_xor_sync(kAllLanes, next[1], offset));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    // An infinite one must not spoil rows that hide it. (NaN stays: it is no number above any
    // unit.)
    largest = largest > 65504.0f ? 65504.0f : largest;
    // Rows that hide a token see 0 as its scale: lanes of other columns may know more.
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    float raised = 0.0f;   // by how much log2 unit grows
    if (largest > unit) {  // to the power of two above
      unit = __uint_as_float((__float_as_uint(largest) & 0x7F800000u) + 0x800000u);
      const float exponent =
          static_cast<float>(static_cast<int>(__float_as_uint(unit) >> 23) - 127);
      raised = exponent - (kMostWeight - limit);
      limit = kMostWeight - exponent;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float above = fmaxf(base[i] + raised, next[i] + (kSlack - limit));
      const float factor = ptx::Exp2(base[i] - above);
      base[i] = above;
      sum[i] *= factor;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        out[tile][i] *= factor;
        out[tile][i + 2] *= factor;
      }
    }
  }

  // Weights of a tile from its scores, times the scales of V, as second operands: weight[i][h] of
  // token 2j + i of the upper (0) and lower (1) eight tokens; kColumns 8: [i + 2] for elements
  // 1, 3. scale: of V by score; those of one token are alike, or 0 where the score is -infinity;
  // largest: of them; p: exp2(score - base); odd: may be the second of a pair, for kPairs.
  __device__ __forceinline__ void Weigh(const float (&score)[4], const float (&scale)[4],
                                        float largest, uint32_t (&weight)[kColumns / 2][2],
                                        float (&p)[4], [[maybe_unused]] bool odd = false) {
    float above[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) above[k] = score[k] - base[k & 1];
    const float most = fmaxf(fmaxf(above[0], above[2]), fmaxf(above[1], above[3]));
    if (__any_sync(kAllLanes, (most > limit) | (largest > unit))) {
      Rescale(score, largest);
#pragma unroll
      for (int k = 0; k < 4; ++k) above[k] = score[k] - base[k & 1];
    }
    float product[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      p[k] = ptx::Exp2(above[k]);
      product[k] = p[k] * scale[k];
    }
    const bool counts = !kPairs || OfSecond() == odd;
    sum[0] += counts ? p[0] + p[2] : 0.0f;
    sum[1] += counts ? p[1] + p[3] : 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane (r, j) gets row r of tokens 2j (lower 16 bits) and 2j+1.
      const uint32_t x = ptx::Transpose(ptx::PackHalf(product[2 * half], product[2 * half + 1]));
      if constexpr (kColumns == 4) {
        Spread(x, half, weight);
      } else {
        weight[0][half] = x & 0xFFFFu;
        weight[1][half] = x >> 16;
        weight[2][half] = x << 16;
        weight[3][half] = x & 0xFFFF0000u;
      }
    }
  }

  // weight[i][half] of four rows.
  static __device__ __forceinline__ void Spread(uint32_t x, int half,
                                                uint32_t (&weight)[kColumns / 2][2]) {
    const bool odd = (threadIdx.x & 16) != 0;  // columns 4-7
    weight[0][half] = ptx::Permute(x, 0, odd ? 0x1044u : 0x4410u);
    weight[1][half] = ptx::Permute(x, 0, odd ? 0x3244u : 0x4432u);
  }

  // As Weigh, of two tiles at once: lanes with j < 2 have the scores and scales of the first one,
  // the others those of the second one; if there is one tile, all have its. two: becomes false
  // where the second must wait, as the first one's weights are for another maximum or unit. alone:
  // the lane sums weights of the first tile if it is the only one. packed: of each tile, for
  // Spread.
  __device__ __forceinline__ void WeighTwo(const float (&score)[4], const float (&scale)[4],
                                           float largest, bool alone, bool* two,
                                           uint32_t (&packed)[2][2]) {
    float above[4];
    const auto over = [&] {
#pragma unroll
      for (int k = 0; k < 4; ++k) above[k] = score[k] - base[k & 1];
      const float most = fmaxf(fmaxf(above[0], above[2]), fmaxf(above[1], above[3]));
      return (most > limit) | (largest > unit);
    };
    bool any = over();
    if (__any_sync(kAllLanes, any)) {
      if (__any_sync(kAllLanes, any && !OfSecond())) {
        Rescale(score, largest);
        any = over();
      }
      *two = *two && !__any_sync(kAllLanes, any && OfSecond());
    }
    float p[4], product[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      p[k] = ptx::Exp2(above[k]);
      product[k] = p[k] * scale[k];
    }
    if (*two || alone) {
      sum[0] += p[0] + p[2];
      sum[1] += p[1] + p[3];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Lane (r, j) gets row r % 4 of the first tile (r < 4) or the second one.
      const uint32_t x = ptx::Transpose(ptx::PackHalf(product[2 * half], product[2 * half + 1]));
      const uint32_t other = __shfl_xor_sync(kAllLanes, x, 16);
      const bool lower = (threadIdx.x & 16) == 0;
      packed[0][half] = lower ? x : other;
      packed[1][half] = lower ? other : x;
    }
  }

  // Adds chunk `chunk` (of D/32) of tokens 2j (even) and 2j+1 (odd) of one half of a tile.
  __device__ __forceinline__ void Add(int chunk, uint2 even, uint2 odd, int half,
                                      const uint32_t (&weight)[kColumns / 2][2]) {
    if constexpr (kColumns == 4) {
      ptx::Mma(out[chunk], even.x, even.y, odd.x, odd.y, weight[0][half], weight[1][half]);
    } else {
      ptx::Mma(out[2 * chunk], even.x, even.y, odd.x, odd.y, weight[0][half], weight[1][half]);
      ptx::Mma(out[2 * chunk + 1], even.x, even.y, odd.x, odd.y, weight[2][half], weight[3][half]);
    }
  }
};

// Query row and element of entry k of lane `lane` of accumulator `tile`.
struct Output {
  int row, element;
};
template <int D, int kColumns>
__device__ __forceinline__ Output OutputOf(int tile, int lane, int k) {
  const int r = lane >> 2, column = 2 * (lane & 3) + (k & 1);
  const int chunk = r * (D / 32) + (kColumns == 4 ? tile : tile / 2);
  const int odd = kColumns == 4 ? column >> 2 : tile & 1;
  return {kColumns == 4 ? column & 3 : column, 4 * chunk + 2 * (k >> 1) + odd};
}

// Scores in base 2 from sums: soft-capped if `cap` (softcap * log2 e) is not 0.
__device__ __forceinline__ float Capped(float score, float cap, float per_cap) {
  const float power = ptx::Exp2(score * per_cap);  // e^(2 score / softcap)
  return cap - __fdividef(2.0f * cap, power + 1.0f);
}

}  // namespace cuda
}  // namespace hqmq
