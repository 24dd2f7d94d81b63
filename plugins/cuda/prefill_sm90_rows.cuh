// A warpgroup's query rows in prefill attention on sm_90a: products (wgmma), softmax of a round.
#pragma once

#include "prefill_output.cuh"
#include "wgmma.cuh"

namespace hqmq {
namespace cuda {

// A row's maximum follows its scores when one is greater by more than 2^kPrefillSlack, as most
// rounds then need neither the lanes' exchange nor new outputs: it is set so far above, so that
// weights never pass 2^kPrefillShift.
constexpr float kPrefillSlack = 6.0f;

// A round is kTiles tiles of the block's list: what a stage of shared memory holds, as parts
// [D / 64, kRoundKeys, 64]. The last round of a block may have fewer.
template <int D>
struct Sm90Shape {
  static constexpr int kDim = D;
  static constexpr int kWarps = 8;  // that multiply
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kWarps * kWarp + kProducers;
  static constexpr int kRowTiles = 1, kWarpRows = 16, kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kPrefillTile, kTiles = 2, kRoundKeys = kTiles * kKeys;
  static constexpr int kUnits = kKeys * D / 8;           // of 16 bytes of a tile
  static constexpr int kTilePart = kKeys * 64;           // elements
  static constexpr int kRoundPart = kTiles * kTilePart;  // elements
  static constexpr int kTileHalves = kKeys * D;
  static constexpr int kRoundHalves = kTiles * kTileHalves;
  static constexpr int kStages = 3;
  static_assert(kRows == PrefillShape<D>::kRows && kKeys == PrefillShape<D>::kKeys,
                "one cut of rows and keys");
};

template <int D>
struct Sm90Rows {
  using Shape = Sm90Shape<D>;
  static constexpr uint32_t kPartBytes = 2 * Shape::kRoundPart;
  static constexpr int kTileSteps = Shape::kKeys / 16, kColumns = Shape::kRoundKeys / 8;
  PrefillRows<Shape> rows;
  uint32_t query[D / 16][4], weight[Shape::kRoundKeys / 16][4];
  uint32_t times;  // address of the row's time; that of row + 8 follows 8 further on

  // From LoadQueries.
  __device__ __forceinline__ void LoadQuery(const uint16_t* from, int warp, int lane) {
    const int row = warp * Shape::kWarpRows + (lane & 15);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint4 x = ptx::LoadMatrices(
          ptx::SharedAddress(from + 8 * TileUnit<Shape::kRows>(row, 2 * step + (lane >> 4))));
      query[step][0] = x.x;
      query[step][1] = x.y;
      query[step][2] = x.z;
      query[step][3] = x.w;
    }
  }

  // Times of the lane's rows, to where they are read when needed: registers are few.
  __device__ __forceinline__ void StoreTimes(const PrefillJob& job, const PrefillBlock& block,
                                             int32_t* to, int warp, int lane) {
    const int row = warp * Shape::kWarpRows + (lane >> 2);
    times = ptx::SharedAddress(to + row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int time = rows.Time(job, block, 0, half);
      if ((lane & 3) == 0) to[row + 8 * half] = time;
    }
  }

  __device__ __forceinline__ KeyRange Seen(const PrefillBlock& block, const TileOf& tile,
                                           int half) const {
    const int time = static_cast<int>(ptx::LoadShared32(times + 4 * 8 * half));
    return PrefillRows<Shape>::SeenAt(time, block, tile);
  }

  // Starts scores = queries * keys.
  __device__ __forceinline__ void StartScores(const uint16_t* keys) {
    const uint64_t first = ptx::Operand(ptx::SharedAddress(keys), kPartBytes);
    ptx::Hold(rows.score[0]);
    ptx::ProductsBegin();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t b = ptx::OperandAfter(first, step / 4 * kPartBytes + step % 4 * 32);
      if (step == 0) {
        ptx::MultiplyAsync<false, false>(rows.score[0], query[step], b);
      } else {
        ptx::MultiplyAsync<true, false>(rows.score[0], query[step], b);
      }
    }
    ptx::ProductsCommit();
  }

  // Starts outputs += weights * values of a round's first kTiles tiles: what lies where a tile is
  // missing may be NaN.
  template <int kTiles>
  __device__ __forceinline__ void StartOutputs(const uint16_t* values) {
    const uint64_t first = ptx::Operand(ptx::SharedAddress(values), kPartBytes);
    ptx::Hold(rows.out[0]);
    ptx::ProductsBegin();
#pragma unroll
    for (int step = 0; step < kTiles * kTileSteps; ++step) {
      ptx::MultiplyAsync<true, true>(rows.out[0], weight[step],
                                     ptx::OperandAfter(first, step * (16 * 128)));
    }
    ptx::ProductsCommit();
  }

  // Products to scores in base 2; unless IsGeneral, divided by the row's factor.
  __device__ __forceinline__ void Cap(const PrefillJob& job) {
    if (!PrefillRows<Shape>::IsGeneral(job)) return;
    const float softcap = job.attention.softcap, cap = softcap * 1.44269504f;
    const bool capped = softcap > 0.0f;
    float multiplier[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiplier[half] = capped ? rows.factor[0][half] * (2.0f / softcap) : rows.factor[0][half];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) rows.score[0][n][k] *= multiplier[k / 2];
    if (!capped) return;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // e^(2 x / softcap)
        float& x = rows.score[0][n][k];
        x = cap - __fdividef(2.0f * cap, ptx::Exp2(x) + 1.0f);
      }
  }

  // Scores of keys that a row does not see to -infinity, of the n-th tile of a round; none are seen
  // of a tile that is missing.
  __device__ __forceinline__ void Mask(const PrefillBlock& block, const TileOf& tile, bool missing,
                                       int n, int lane) {
    const int first_column = tile.first + 2 * (lane & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KeyRange seen = Seen(block, tile, half);
      const int begin = seen.first - first_column, end = missing ? 0 : seen.end - first_column;
#pragma unroll
      for (int at = 0; at < Shape::kKeys / 8; ++at)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (8 * at + k < begin || 8 * at + k >= end)
            rows.score[0][n * (Shape::kKeys / 8) + at][2 * half + k] = MinusInfinity();
        }
    }
  }

  // Scores to weights; sums follow their row's maximum. Returns whether outputs must be multiplied
  // by `old`, which is set then only. Rows of one warp do not change each other's bits.
  __device__ __forceinline__ bool Weigh(const PrefillJob& job, float (&old)[1][2]) {
    float (&score)[kColumns][4] = rows.score[0];
    const bool general = PrefillRows<Shape>::IsGeneral(job);
    float most[2], multiplier[2];
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = fmaxf(score[0][2 * half], score[0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < kColumns; ++n)
        most[half] = fmaxf(most[half], fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      multiplier[half] = general ? 1.0f : rows.factor[0][half];
      most[half] *= multiplier[half];
      grows = grows || most[half] > rows.maximum[0][half];
    }
    grows = __any_sync(kAllLanes, grows);
    if (grows) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& maximum = rows.maximum[0][half];
        most[half] = fmaxf(most[half], __shfl_xor_sync(kAllLanes, most[half], 1));
        most[half] = fmaxf(most[half], __shfl_xor_sync(kAllLanes, most[half], 2));
        const float next = most[half] > maximum ? most[half] + kPrefillSlack : maximum;
        old[0][half] = ptx::Exp2(maximum - next);
        maximum = next;
        rows.sum[0][half] *= old[0][half];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = kPrefillShift - rows.maximum[0][half];
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int k = 2 * half; k < 2 * half + 2; ++k) {
          score[n][k] = ptx::Exp2(__fmaf_rn(score[n][k], multiplier[half], base));
          rows.sum[0][half] += score[n][k];
        }
    }
    return grows;
  }

  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int step = 0; step < Shape::kRoundKeys / 16; ++step) {
      uint32_t p[1][4];
      rows.Pack(step, p);
#pragma unroll
      for (int k = 0; k < 4; ++k) weight[step][k] = p[0][k];
    }
  }
};

}  // namespace cuda
}  // namespace hqmq
