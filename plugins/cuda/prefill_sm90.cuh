// The same attention on sm_90a: one warpgroup fetches tiles, two multiply them with their 64 query
// rows each (wgmma). A warpgroup's scores of the next tile and outputs of this one are under way
// while it makes weights.
#pragma once

#include "prefill_output.cuh"
#include "wgmma.cuh"

namespace hqmq {
namespace cuda {

template <int D>
struct Sm90Shape {
  static constexpr int kDim = D;
  static constexpr int kWarps = 8;  // that multiply
  static constexpr int kProducers = 128;
  static constexpr int kThreads = kWarps * kWarp + kProducers;
  static constexpr int kRowTiles = 1, kWarpRows = 16, kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kPrefillTile;
  static constexpr int kTileHalves = kKeys * D;
  static constexpr int kTileBytes = 2 * kTileHalves;
  static constexpr int kUnits = kTileHalves / 8;
  static constexpr int kStages = 4;
  static_assert(kRows == PrefillShape<D>::kRows && kKeys == PrefillShape<D>::kKeys,
                "one cut of rows and keys");
};

template <int D>
struct alignas(1024) Sm90Shared {
  using Shape = Sm90Shape<D>;
  uint16_t tile[2][Shape::kStages][Shape::kTileHalves];  // K, V
  uint16_t query[Shape::kRows * D];
  float factor[Shape::kRows];
  uint64_t full[2][Shape::kStages], empty[2][Shape::kStages];
  int32_t bad[Shape::kStages];  // the tile of V has values that are not finite, and hidden keys
};

constexpr int kProducerBarrier = 1, kRowsBarrier = 2;  // of ptx::SyncThreads

// Stage of the n-th tile of a block, and the parity of its barriers' phase.
template <class Shape>
struct Sm90Stage {
  int index;
  uint32_t parity;
  __device__ explicit Sm90Stage(int n)
      : index(n % Shape::kStages), parity(n / Shape::kStages & 1) {}
};

template <int D>
__device__ __forceinline__ void FetchTiles(const PrefillJob& job, const PrefillBlock& block,
                                           const KeyRange& tiles, Sm90Shared<D>* shared,
                                           int thread) {
  using Shape = Sm90Shape<D>;
  for (int i = tiles.first; i < tiles.end; ++i) {
    const Sm90Stage<Shape> stage(i - tiles.first);
    const TileOf tile = TileNumber<Shape::kKeys>(block, i);
    const bool masked = Sight(block.first_time, block.last_time, tile, Shape::kKeys,
                              block.page_size, block.window) != 2;
#pragma unroll 1
    for (int role = 0; role < 2; ++role) {
      const uint32_t full = ptx::SharedAddress(&shared->full[role][stage.index]);
      uint16_t* to = shared->tile[role][stage.index];
      ptx::BarrierWait(ptx::SharedAddress(&shared->empty[role][stage.index]), stage.parity ^ 1);
      const uint16_t* from =
          job.tiles + ((static_cast<int64_t>(block.in_wave) * 2 + role) * job.lane_tiles +
                       tile.first / kPrefillTile) *
                          Shape::kTileHalves;
      if (tile.exact || (role == 1 && masked)) {
        if (thread == 0) shared->bad[stage.index] = 0;
        ptx::SyncThreads(kProducerBarrier, Shape::kProducers);
        bool bad = false;
        if (tile.exact) {
          bad = LoadExact<Shape, Shape::kProducers>(job, block, role, tile.first, to, thread);
          ptx::FenceProducts();
        } else {
          for (int unit = thread; unit < Shape::kUnits; unit += Shape::kProducers)
            bad = bad || AnyBad(reinterpret_cast<const uint4*>(from)[unit]);
        }
        if (bad && role == 1) shared->bad[stage.index] = 1;
        ptx::SyncThreads(kProducerBarrier, Shape::kProducers);
      } else if (role == 1 && thread == 0) {
        shared->bad[stage.index] = 0;
      }
      if (thread != 0) continue;
      if (tile.exact) {
        ptx::ArriveAt(full);
      } else {
        ptx::BarrierExpect(full, Shape::kTileBytes);
        ptx::BulkCopy(ptx::SharedAddress(to), from, Shape::kTileBytes, full);
      }
    }
  }
}

template <int D>
struct Sm90Rows {
  using Shape = Sm90Shape<D>;
  static constexpr uint32_t kPartBytes = Shape::kKeys * 128;
  PrefillRows<Shape> rows;
  uint32_t query[D / 16][4], weight[Shape::kKeys / 16][4];

  __device__ __forceinline__ void LoadQuery(const Sm90Shared<D>& shared, int warp, int lane) {
    const int row = warp * Shape::kWarpRows + (lane & 15);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint4 x = ptx::LoadMatrices(ptx::SharedAddress(
          shared.query + 8 * TileUnit<Shape::kRows>(row, 2 * step + (lane >> 4))));
      query[step][0] = x.x;
      query[step][1] = x.y;
      query[step][2] = x.z;
      query[step][3] = x.w;
    }
  }

  // Starts scores = queries * keys.
  __device__ __forceinline__ void StartScores(const uint16_t* tile) {
    const uint64_t first = ptx::Operand(ptx::SharedAddress(tile), kPartBytes);
    ptx::Hold(rows.score[0]);
    ptx::ProductsBegin();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t b = ptx::OperandAfter(first, step / 4 * kPartBytes + step % 4 * 32);
      if (step == 0) {
        ptx::MultiplyKeys<false>(rows.score[0], query[step], b);
      } else {
        ptx::MultiplyKeys<true>(rows.score[0], query[step], b);
      }
    }
    ptx::ProductsCommit();
  }

  // Starts outputs += weights * values.
  __device__ __forceinline__ void StartOutputs(const uint16_t* tile) {
    const uint64_t first = ptx::Operand(ptx::SharedAddress(tile), kPartBytes);
    ptx::Hold(rows.out[0]);
    ptx::ProductsBegin();
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      ptx::MultiplyValues<true>(rows.out[0], weight[step],
                                ptx::OperandAfter(first, step * (16 * 128)));
    }
    ptx::ProductsCommit();
  }

  __device__ __forceinline__ void Pack() {
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      uint32_t p[1][4];
      rows.Pack(step, p);
#pragma unroll
      for (int k = 0; k < 4; ++k) weight[step][k] = p[0][k];
    }
  }
};

// Adds values that are not finite to the rows that see them, and makes them 0 for the product. All
// warps with rows.
template <int D>
__device__ __forceinline__ void TakeBadValues(const PrefillJob& job, const PrefillBlock& block,
                                              const TileOf& tile, uint16_t* value, int lane,
                                              PrefillRows<Sm90Shape<D>>* rows) {
  using Shape = Sm90Shape<D>;
  constexpr int kThreads = Shape::kWarps * kWarp;
  rows->AddBadValues(job, block, tile, value, lane);
  ptx::SyncThreads(kRowsBarrier, kThreads);
  for (int at = threadIdx.x; at < Shape::kTileHalves; at += kThreads)
    if ((value[at] & 0x7C00u) == 0x7C00u) value[at] = 0;
  ptx::FenceProducts();
  ptx::SyncThreads(kRowsBarrier, kThreads);
}

template <int D>
__device__ __forceinline__ void AttendTiles(const PrefillJob& job, const PrefillBlock& block,
                                            const KeyRange& tiles, Sm90Shared<D>* shared, int warp,
                                            int lane, float* part) {
  using Shape = Sm90Shape<D>;
  // Positions of the warp's rows.
  const int first_time = block.first_time + warp * Shape::kWarpRows / job.attention.heads;
  const int last = block.first_time + ((warp + 1) * Shape::kWarpRows - 1) / job.attention.heads;
  const int last_time = last < block.last_time ? last : block.last_time;
  const auto masked = [&](const TileOf& tile) {
    return Sight(first_time, last_time, tile, Shape::kKeys, block.page_size, block.window) != 2;
  };
  const auto wait = [&](int role, const Sm90Stage<Shape>& stage) {
    ptx::BarrierWait(ptx::SharedAddress(&shared->full[role][stage.index]), stage.parity);
  };
  const auto release = [&](int role, const Sm90Stage<Shape>& stage) {
    __syncwarp();
    if (lane == 0) ptx::ArriveAt(ptx::SharedAddress(&shared->empty[role][stage.index]));
  };

  LoadQueries<Shape>(job, block, shared->query, shared->factor, warp, lane);
  __syncwarp();
  Sm90Rows<D> state;
  PrefillRows<Shape>& rows = state.rows;
  rows.Clear();
  state.LoadQuery(*shared, warp, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.factor[0][half] = job.attention.scale * 1.44269504f *
                           shared->factor[warp * Shape::kWarpRows + half * 8 + (lane >> 2)];
  }

  float old[1][2];
  const Sm90Stage<Shape> begin(0);
  wait(0, begin);
  state.StartScores(shared->tile[0][begin.index]);
  ptx::ProductsWait<0>();
  ptx::Hold(rows.score[0]);
  release(0, begin);
  const TileOf first = TileNumber<Shape::kKeys>(block, tiles.first);
  rows.Finish(job, block, first, masked(first), lane);
  rows.Weigh(job, old);  // there are no outputs yet
  state.Pack();

  // Values of tile i; before products that its outputs would have to wait for.
  const auto values = [&](int i, const Sm90Stage<Shape>& stage) {
    wait(1, stage);
    uint16_t* value = shared->tile[1][stage.index];
    if (shared->bad[stage.index])
      TakeBadValues<D>(job, block, TileNumber<Shape::kKeys>(block, i), value, lane, &rows);
    return value;
  };
  for (int i = tiles.first; i + 1 < tiles.end; ++i) {
    const Sm90Stage<Shape> stage(i - tiles.first), after(i - tiles.first + 1);
    const uint16_t* value = values(i, stage);
    wait(0, after);
    state.StartScores(shared->tile[0][after.index]);
    state.StartOutputs(value);
    ptx::ProductsWait<1>();
    ptx::Hold(rows.score[0]);
    release(0, after);
    const TileOf next = TileNumber<Shape::kKeys>(block, i + 1);
    rows.Finish(job, block, next, masked(next), lane);
    const bool grows = rows.Weigh(job, old);
    ptx::ProductsWaitAfter<0>(fminf(rows.sum[0][0], rows.sum[0][1]));
    ptx::Hold(rows.out[0]);
    release(1, stage);
    if (grows) rows.Rescale(old);
    state.Pack();
  }
  state.StartOutputs(values(tiles.end - 1, Sm90Stage<Shape>(tiles.end - 1 - tiles.first)));
  ptx::ProductsWait<0>();
  ptx::Hold(rows.out[0]);
  rows.JoinSums();
  if (part) {
    rows.StorePart(job, block, part, lane);
  } else {
    rows.Store(job, block, lane);
  }
}

template <int D>
__global__ void __launch_bounds__(Sm90Shape<D>::kThreads, 1)
    Sm90Kernel(const __grid_constant__ PrefillJob job) {
#ifdef HQMQ_WARPGROUPS
  using Shape = Sm90Shape<D>;
  HQMQ_DYNAMIC_SHARED(dynamic);
  const uint32_t start = ptx::SharedAddress(dynamic);
  auto* shared = reinterpret_cast<Sm90Shared<D>*>(reinterpret_cast<char*>(dynamic) +
                                                  ((1024 - (start & 1023)) & 1023));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.y;
  const PrefillBlock block = BlockOf<Shape::kKeys>(job, blockIdx.x);
  const KeyRange tiles = SplitTiles(block.tiles(), job.splits, split);
  if (split == 0 && warp < Shape::kWarps) StoreEmptyRows<Shape>(job, block, warp, lane);
  if (tiles.first >= tiles.end) return;

  if (threadIdx.x == 0) {
    for (int role = 0; role < 2; ++role)
      for (int stage = 0; stage < Shape::kStages; ++stage) {
        ptx::InitBarrier(ptx::SharedAddress(&shared->full[role][stage]), 1);
        ptx::InitBarrier(ptx::SharedAddress(&shared->empty[role][stage]), Shape::kWarps);
      }
    ptx::BarrierFence();
  }
  __syncthreads();
  if (warp >= Shape::kWarps) {
    ptx::FewerRegisters<72>();
    FetchTiles<D>(job, block, tiles, shared, threadIdx.x - Shape::kWarps * kWarp);
  } else {
    ptx::MoreRegisters<216>();
    float* part = nullptr;
    if (job.splits > 1) {
      part = job.parts +
             (static_cast<int64_t>(blockIdx.x) * job.splits + split) * (Shape::kRows * (D + 2));
    }
    AttendTiles<D>(job, block, tiles, shared, warp, lane, part);
  }
#endif
}

// The body of prefill_sm90_d*.cu.
template <int D>
Status LaunchSm90Kernel(const PrefillJob& job, cudaStream_t stream) {
  const AttentionJob& a = job.attention;
  const dim3 grid(static_cast<unsigned>(job.lanes) * a.head_blocks * a.row_blocks, job.splits);
  return Launch(Sm90Kernel<D>, grid, Sm90Shape<D>::kThreads, sizeof(Sm90Shared<D>) + 1024, stream,
                job);
}

}  // namespace cuda
}  // namespace hqmq
