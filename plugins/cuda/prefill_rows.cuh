// A warp's query rows in prefill attention: scores, softmax, outputs (mma.sync, sm_80 and later).
//
// Lane (r = lane/4, j = lane%4) has rows r and r+8 of each 16 and columns 2j, 2j+1 of each 8 keys
// or elements; the scores' accumulators are the weights' first operand as they are.
#pragma once

#include "prefill_tile.cuh"
#include "softmax_state.cuh"

namespace hqmq {
namespace cuda {

// Weights exp2(score - maximum) are scaled by 2^15: small ones stay normal fp16 numbers.
constexpr float kPrefillShift = 15.0f;
// A maximum of no scores.
constexpr float kNoMaximum = -1e30f;

// Shape: PrefillShape, or that of another kernel.
template <class Shape>
struct PrefillRows {
  static constexpr int D = Shape::kDim;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeys = Shape::kKeys;
  static constexpr int kRoundKeys = Shape::kRoundKeys;
  float out[kRowTiles][D / 8][4];
  float score[kRowTiles][kRoundKeys / 8][4];
  float maximum[kRowTiles][2], sum[kRowTiles][2];  // of rows r, r+8; sums: of this lane's columns
  float factor[kRowTiles][2];                      // from products to scores in base 2

  // Times of the lane's rows; -1: no row.
  __device__ __forceinline__ int Time(const PrefillJob& job, const PrefillBlock& block, int m,
                                      int half) const {
    const int local =
        threadIdx.x / kWarp * Shape::kWarpRows + m * 16 + half * 8 + (threadIdx.x % kWarp) / 4;
    const PrefillRow row = RowOf(job, block, local);
    const int time = block.span.past + row.i;
    return row.i >= 0 && time <= block.last_time ? time : -1;
  }

  __device__ void Clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) out[m][n][k] = 0.0f;
      maximum[m][0] = maximum[m][1] = kNoMaximum;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // score = queries * keys. query, key: addresses of the warp's queries and of a tile.
  __device__ __forceinline__ void Score(uint32_t query, uint32_t key, int lane) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) score[m][n][k] = 0.0f;
    // Rows of the matrices a lane points at: queries (lane & 15), keys (lane & 7) + 8 (lane / 16).
    const uint32_t q_row = query + (lane & 15) * 128;
    const uint32_t k_row = key + ((lane & 7) + (lane >> 4) * 8) * 128;
    const uint32_t q_unit = ((lane >> 4) ^ (lane & 7)) * 16;
    const uint32_t k_unit = ((lane >> 3 & 1) ^ (lane & 7)) * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t turn = (step & 3) * 32;
      uint4 q[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        q[m] = ptx::LoadMatrices(q_row + (q_unit ^ turn) +
                                 ((step >> 2) * Shape::kRows + m * 16) * 128);
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        const uint4 k =
            ptx::LoadMatrices(k_row + (k_unit ^ turn) + ((step >> 2) * kKeys + n * 16) * 128);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::Mma(score[m][2 * n], q[m].x, q[m].y, q[m].z, q[m].w, k.x, k.y);
          ptx::Mma(score[m][2 * n + 1], q[m].x, q[m].y, q[m].z, q[m].w, k.z, k.w);
        }
      }
    }
  }

  // Whether scores are not simply products times a positive factor.
  static __device__ __forceinline__ bool IsGeneral(const PrefillJob& job) {
    return job.attention.softcap > 0.0f || !(job.attention.scale > 0.0f);
  }

  // Scores in base 2 divided by Multiplier(); those of keys that a row does not see are -infinity.
  __device__ __forceinline__ void Finish(const PrefillJob& job, const PrefillBlock& block,
                                         const TileOf& tile, bool masked, int lane) {
    if (IsGeneral(job)) {
      const float cap = job.attention.softcap * 1.44269504f, per_cap = 2.0f / job.attention.softcap;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            float& x = score[m][n][k];
            x *= factor[m][k / 2];
            if (cap > 0.0f) {  // e^(2 x / softcap)
              x = cap - __fdividef(2.0f * cap, ptx::Exp2(x * per_cap) + 1.0f);
            }
          }
    }
    if (!masked) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange seen = Seen(job, block, tile, m, half);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int key = tile.first + 8 * n + 2 * (lane & 3) + k;
            if (key < seen.first || key >= seen.end) score[m][n][2 * half + k] = MinusInfinity();
          }
      }
  }

  __device__ __forceinline__ KeyRange Seen(const PrefillJob& job, const PrefillBlock& block,
                                           const TileOf& tile, int m, int half) const {
    return SeenAt(Time(job, block, m, half), block, tile);
  }

  static __device__ __forceinline__ KeyRange SeenAt(int time, const PrefillBlock& block,
                                                    const TileOf& tile) {
    if (time < 0) return {0, 0};
    return SeenKeys(time, tile.exact, block.page_size, block.window);
  }

  // Scores to weights; sums follow their row's maximum. Returns whether outputs must be multiplied
  // by `old`, which are 1 otherwise.
  __device__ __forceinline__ bool Weigh(const PrefillJob& job, float (&old)[kRowTiles][2]) {
    const bool general = IsGeneral(job);
    bool grows = false;
    float next[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = MinusInfinity();
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          most = fmaxf(most, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        next[m][half] = fmaxf(maximum[m][half], general ? most : most * factor[m][half]);
        grows = grows || next[m][half] > maximum[m][half];
      }
    grows = __any_sync(kAllLanes, grows);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        old[m][half] = 1.0f;
        if (grows) old[m][half] = ptx::Exp2(maximum[m][half] - next[m][half]);
        maximum[m][half] = next[m][half];
        const float base = kPrefillShift - next[m][half];
        const float multiplier = general ? 1.0f : factor[m][half];
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int k = 2 * half; k < 2 * half + 2; ++k) {
            score[m][n][k] = ptx::Exp2(__fmaf_rn(score[m][n][k], multiplier, base));
            added += score[m][n][k];
          }
        sum[m][half] = __fmaf_rn(sum[m][half], old[m][half], added);
      }
    return grows;
  }

  __device__ __forceinline__ void Rescale(const float (&old)[kRowTiles][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) out[m][n][k] *= old[m][k / 2];
  }

  // Weights of 16 keys as first operands.
  __device__ __forceinline__ void Pack(int step, uint32_t (&p)[kRowTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&x)[4] = score[m][2 * step + k / 2];
        p[m][k] = ptx::PackHalf(x[2 * (k & 1)], x[2 * (k & 1) + 1]);
      }
  }

  // out += weights * values. value: address of a tile.
  __device__ __forceinline__ void Add(uint32_t value, int lane) {
    const uint32_t row = value + (lane & 15) * 128;
    const uint32_t unit = ((lane >> 4) ^ (lane & 7)) * 16;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t p[kRowTiles][4];
      Pack(step, p);
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        const uint4 v = ptx::LoadTransposed(row + (unit ^ ((n & 3) * 32)) +
                                            ((n >> 2) * kKeys + step * 16) * 128);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::Mma(out[m][2 * n], p[m][0], p[m][1], p[m][2], p[m][3], v.x, v.y);
          ptx::Mma(out[m][2 * n + 1], p[m][0], p[m][1], p[m][2], p[m][3], v.z, v.w);
        }
      }
    }
  }

  // Adds the values of a tile, one of a round's, that are not finite to the rows that see them.
  // seen_by(m, half): keys that the lane's rows see.
  template <class SeenBy>
  __device__ __forceinline__ void AddBadValues(const TileOf& tile, const uint16_t* value, int lane,
                                               const SeenBy& seen_by) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange seen = seen_by(m, half);
        const int begin = seen.first - tile.first, end = seen.end - tile.first;
        for (int t = begin > 0 ? begin : 0; t < (end < kKeys ? end : kKeys); ++t) {
#pragma unroll
          for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const uint16_t x = value[8 * TileUnit<kRoundKeys>(t, n) + 2 * (lane & 3) + k];
              if ((x & 0x7C00u) == 0x7C00u) out[m][n][2 * half + k] += FloatFromHalf(x);
            }
        }
      }
  }

  __device__ void Store(const PrefillJob& job, const PrefillBlock& block, int lane);
  __device__ void StorePart(const PrefillJob& job, const PrefillBlock& block, float* part,
                            int lane);

  // Sums over the lanes of a row.
  __device__ __forceinline__ void JoinSums() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 1);
        sum[m][half] += __shfl_xor_sync(kAllLanes, sum[m][half], 2);
      }
  }
};

}  // namespace cuda
}  // namespace hqmq
