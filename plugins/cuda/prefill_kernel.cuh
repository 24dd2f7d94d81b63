// Attention of a block of query rows over fp16 tiles. Four warps of 16 or 32 rows; K and V of a
// tile come while the tile before is worked on.
#pragma once

#include "prefill_output.cuh"

namespace hqmq {
namespace cuda {

template <int D>
__global__ void __launch_bounds__(PrefillShape<D>::kThreads, 2)
    PrefillKernel(const __grid_constant__ PrefillJob job) {
  using Shape = PrefillShape<D>;
  HQMQ_DYNAMIC_SHARED(dynamic);
  PrefillShared<D>* shared = reinterpret_cast<PrefillShared<D>*>(dynamic);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.y;
  const PrefillBlock block = BlockOf<Shape::kKeys>(job, blockIdx.x);
  if (split == 0) StoreEmptyRows<Shape>(job, block, warp, lane);
  const KeyRange tiles = SplitTiles(block.tiles(), job.splits, split);
  if (tiles.first >= tiles.end) return;

  // Positions of the warp's rows.
  const int first_time = block.first_time + warp * Shape::kWarpRows / job.attention.heads;
  const int last = block.first_time + ((warp + 1) * Shape::kWarpRows - 1) / job.attention.heads;
  const int last_time = last < block.last_time ? last : block.last_time;

  FetchTile<D>(job, block, tiles.first, shared);
  ptx::CopyCommit();
  LoadQueries<Shape>(job, block, shared->query, shared->factor, warp, lane);
  __syncwarp();
  PrefillRows<Shape> rows;
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
        bad = bad || AnyBad(ptx::LoadShared128(ptx::SharedAddress(value + 8 * unit)));
      }
      if (__syncthreads_or(bad)) {
        rows.AddBadValues(tile, value, lane,
                          [&](int m, int half) { return rows.Seen(job, block, tile, m, half); });
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
    float old[Shape::kRowTiles][2];
    if (rows.Weigh(job, old)) rows.Rescale(old);
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
