// Attention of a block of query rows over fp16 tiles. Four warps of 16 or 32 rows; K and V of a
// tile come while the tile before is worked on.
#pragma once

#include "prefill_rows.cuh"

namespace hqmq {
namespace cuda {

// What outputs are multiplied by: 1 / sum, with the sink that joins it.
__device__ __forceinline__ float PerSum(float maximum, float sum, const float* sink) {
  if (!sink) return __fdividef(1.0f, sum);
  const float logit = *sink * 1.44269504f, most = fmaxf(maximum, logit);
  const float factor = ptx::Exp2(maximum - most);
  return factor / (sum * factor + ptx::Exp2(logit - most + kPrefillShift));
}

__device__ __forceinline__ void StorePair(const Rows& y, int64_t to, float a, float b, bool wide) {
  if (wide) {
    const uint32_t bits = y.dtype == HQMQ_FLOAT16
                              ? ptx::PackHalf(a, b)
                              : Bf16FromFloat(a) | static_cast<uint32_t>(Bf16FromFloat(b)) << 16;
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(y.data) + to) = bits;
  } else {
    StoreFloat(y, to, a);
    StoreFloat(y, to + 1, b);
  }
}

template <int D>
__device__ void PrefillRows<D>::Store(const PrefillJob& job, const PrefillBlock& block, int lane) {
  const AttentionJob& a = job.attention;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = threadIdx.x / kWarp * Shape::kWarpRows + m * 16 + half * 8 + (lane >> 2);
      const PrefillRow row = RowOf(job, block, local);
      if (row.i < 0 || block.span.past + row.i > block.last_time) continue;
      const float per_sum =
          PerSum(maximum[m][half], sum[m][half], a.sinks ? a.sinks + row.head : nullptr);
      const int64_t to = RowStart(a.y, block.b, row.head, row.i);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int element = 8 * n + 2 * (lane & 3);
        if (element < a.key.role.head_dim) {
          StorePair(a.y, to + element, out[m][n][2 * half] * per_sum,
                    out[m][n][2 * half + 1] * per_sum, job.wide_y);
        }
      }
    }
}

// part: [kRows, D + 2].
template <int D>
__device__ void PrefillRows<D>::StorePart(const PrefillJob& job, const PrefillBlock& block,
                                          float* part, int lane) {
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = threadIdx.x / kWarp * Shape::kWarpRows + m * 16 + half * 8 + (lane >> 2);
      if (Time(job, block, m, half) < 0) continue;
      float* to = part + local * (D + 2);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<float2*>(to + 8 * n + 2 * (lane & 3)) =
            make_float2(out[m][n][2 * half], out[m][n][2 * half + 1]);
      }
      if ((lane & 3) == 0)
        *reinterpret_cast<float2*>(to + D) = make_float2(maximum[m][half], sum[m][half]);
    }
}

// Rows of y without a token: 0, or NaN if the token found no page. All threads.
template <int D>
__device__ __forceinline__ void StoreEmptyRows(const PrefillJob& job, const PrefillBlock& block,
                                               int warp, int lane) {
  using Shape = PrefillShape<D>;
  const AttentionJob& a = job.attention;
  if (block.span.past + block.first_row + a.positions <= block.span.end) return;
  for (int r = 0; r < Shape::kWarpRows; ++r) {
    const PrefillRow row = RowOf(job, block, warp * Shape::kWarpRows + r);
    const int time = block.span.past + row.i;
    if (row.i < 0 || time < block.span.end) continue;
    StoreConstant(a.y, RowStart(a.y, block.b, row.head, row.i), a.key.role.head_dim,
                  time < block.span.end + block.span.lost, lane);
  }
}

template <int D>
__global__ void __launch_bounds__(PrefillShape<D>::kThreads, 2)
    PrefillKernel(const __grid_constant__ PrefillJob job) {
  using Shape = PrefillShape<D>;
  extern __shared__ float4 dynamic[];
  PrefillShared<D>* shared = reinterpret_cast<PrefillShared<D>*>(dynamic);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.y;
  const PrefillBlock block = BlockOf<Shape::kKeys>(job, blockIdx.x);
  if (split == 0) StoreEmptyRows<D>(job, block, warp, lane);
  const KeyRange tiles = SplitTiles(block.tiles(), job.splits, split);
  if (tiles.first >= tiles.end) return;

  // Positions of the warp's rows.
  const int first_time = block.first_time + warp * Shape::kWarpRows / job.attention.heads;
  const int last = block.first_time + ((warp + 1) * Shape::kWarpRows - 1) / job.attention.heads;
  const int last_time = last < block.last_time ? last : block.last_time;

  FetchTile<D>(job, block, tiles.first, shared);
  ptx::CopyCommit();
  LoadQueries<D>(job, block, shared, warp, lane);
  __syncwarp();
  PrefillRows<D> rows;
  rows.Clear();
#pragma unroll
  for (int m = 0; m < Shape::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.factor[m][half] =
          job.attention.scale * 1.44269504f *
          shared->factor[warp * Shape::kWarpRows + m * 16 + half * 8 + (lane >> 2)];
    }
  const uint32_t query = ptx::SharedAddress(shared->query) + warp * Shape::kWarpRows * 128;

  for (int i = tiles.first; i < tiles.end; ++i) {
    ptx::CopyWait<0>();
    __syncthreads();
    if (i + 1 < tiles.end) FetchTile<D>(job, block, i + 1, shared);
    ptx::CopyCommit();
    const TileOf tile = TileNumber<Shape::kKeys>(block, i);
    uint16_t* value = shared->stage[i & 1][1];
    if (Sight(block.first_time, block.last_time, tile, Shape::kKeys, block.page_size,
              block.window) != 2) {
      // 0 times a value that is not finite would reach rows that do not see it.
      bool bad = false;
      for (int unit = threadIdx.x; unit < Shape::kUnits; unit += Shape::kThreads) {
        const uint4 x = ptx::LoadShared128(ptx::SharedAddress(value + 8 * unit));
        bad = bad || AnyBad(x.x) || AnyBad(x.y) || AnyBad(x.z) || AnyBad(x.w);
      }
      if (__syncthreads_or(bad)) {
        rows.AddBadValues(job, block, tile, value, lane);
        __syncthreads();
        for (int at = threadIdx.x; at < Shape::kTileHalves; at += Shape::kThreads)
          if ((value[at] & 0x7C00u) == 0x7C00u) value[at] = 0;
        __syncthreads();
      }
    }
    const int sight =
        Sight(first_time, last_time, tile, Shape::kKeys, block.page_size, block.window);
    if (sight == 0) continue;
    rows.Score(query, ptx::SharedAddress(shared->stage[i & 1][0]), lane);
    rows.Finish(job, block, tile, sight == 1, lane);
    rows.Weigh();
    rows.Add(ptx::SharedAddress(value), lane);
  }
  rows.JoinSums();
  if (job.splits == 1) {
    rows.Store(job, block, lane);
  } else {
    const int64_t part = static_cast<int64_t>(blockIdx.x) * job.splits + split;
    rows.StorePart(job, block, job.parts + part * (Shape::kRows * (D + 2)), lane);
  }
}

// The body of prefill_d*.cu.
template <int D>
Status LaunchPrefillKernel(const PrefillJob& job, cudaStream_t stream) {
  const AttentionJob& a = job.attention;
  const dim3 grid(static_cast<unsigned>(job.lanes) * a.head_blocks * a.row_blocks, job.splits);
  return Launch(PrefillKernel<D>, grid, PrefillShape<D>::kThreads, sizeof(PrefillShared<D>), stream,
                job);
}

}  // namespace cuda
}  // namespace hqmq
