// The same attention on sm_90a: one warpgroup fetches tiles, two multiply them with their 64 query
// rows each (wgmma), 128 keys a round. A warpgroup's scores of the next round and outputs of this
// one are under way while it makes weights.
#pragma once

#include "prefill_sm90_rows.cuh"

namespace hqmq {
namespace cuda {

// At a multiple of 1024 bytes.
template <int D>
struct alignas(16) Sm90Shared {
  using Shape = Sm90Shape<D>;
  uint16_t round[2][Shape::kStages][Shape::kRoundHalves];  // K, V
  uint16_t query[Shape::kRows * D];
  float factor[Shape::kRows];
  int32_t time[Shape::kRows];  // of rows without a token: -1
  // Here, as registers are few.
  PrefillBlock block;
  KeyRange tiles, clear;  // of the split; ClearTiles
  uint64_t full[2][Shape::kStages], empty[2][Shape::kStages];
  // The tile of V has values that are not finite, and hidden keys. Not of clear rounds.
  int32_t bad[Shape::kStages][Shape::kTiles];
};

template <int D>
constexpr size_t kSm90SharedBytes = sizeof(Sm90Shared<D>) + 1024;
static_assert(kSm90SharedBytes<128> <= 227 * 1024, "what a block may have on sm_90");

constexpr int kProducerBarrier = 1, kRowsBarrier = 2;  // of ptx::SyncThreads

// Stage of a round, from the block's first on, and the parity of its barriers' phase.
template <class Shape>
struct Sm90Stage {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ Sm90Stage Next() const {
    const bool last = index == Shape::kStages - 1;
    Sm90Stage next;
    next.index = last ? 0 : index + 1;
    next.parity = last ? parity ^ 1 : parity;
    return next;
  }
};

// Coded tiles of a split, by number, of which all rows of the block see all keys.
template <int kKeys>
__device__ __forceinline__ KeyRange ClearTiles(const PrefillBlock& block, const KeyRange& tiles) {
  const KeyRange old = SeenKeys(block.first_time, false, block.page_size, block.window);
  const KeyRange young = SeenKeys(block.last_time, false, block.page_size, block.window);
  const int first = (young.first + kKeys - 1) / kKeys - block.coded;
  const int end = old.end / kKeys - block.coded;
  return {first, end < tiles.end ? end : tiles.end};
}

// Whether the round that starts with tile i is of such tiles only.
template <class Shape>
__device__ __forceinline__ bool IsClear(const KeyRange& clear, int i) {
  return i >= clear.first && i + Shape::kTiles <= clear.end;
}

// Tiles of a round that the copies do not bring as they are: exact tokens, and a look for values
// that are not finite where keys are hidden. All threads that fetch.
template <int D>
__device__ __forceinline__ void LoadUnclear(const PrefillJob& job, const PrefillBlock& block,
                                            int role, int i, int count, const uint16_t* from,
                                            uint16_t* to, int32_t* bad, int thread) {
  using Shape = Sm90Shape<D>;
  if (thread == 0 && role == 1) {
    for (int n = 0; n < Shape::kTiles; ++n) bad[n] = 0;
  }
  __syncwarp();
  ptx::SyncThreads(kProducerBarrier, Shape::kProducers);
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    const TileOf tile = TileNumber<Shape::kKeys>(block, i + n);
    bool found = false;
    if (tile.exact) {
      found = LoadExact<Shape, Shape::kProducers>(job, block, role, tile.first,
                                                  to + n * Shape::kTilePart, thread);
    } else if (role == 1 && Sight(block.first_time, block.last_time, tile, Shape::kKeys,
                                  block.page_size, block.window) != 2) {
      const auto* units = reinterpret_cast<const uint4*>(from + int64_t{tile.first} * D);
      for (int unit = thread; unit < Shape::kUnits; unit += Shape::kProducers)
        found = found || AnyBad(units[unit]);
    }
    if (found && role == 1) bad[n] = 1;
  }
  ptx::FenceProducts();
  ptx::SyncThreads(kProducerBarrier, Shape::kProducers);
}

template <int D>
__device__ __forceinline__ void FetchRounds(const PrefillJob& job, Sm90Shared<D>* shared,
                                            int thread) {
  using Shape = Sm90Shape<D>;
  const PrefillBlock& block = shared->block;
  const KeyRange tiles = shared->tiles, clear = shared->clear;
  Sm90Stage<Shape> stage;
#pragma unroll 1
  for (int i = tiles.first; i < tiles.end; i += Shape::kTiles) {
    const int count = tiles.end - i < Shape::kTiles ? tiles.end - i : Shape::kTiles;
#pragma unroll 1
    for (int role = 0; role < 2; ++role) {
      const uint32_t full = ptx::SharedAddress(&shared->full[role][stage.index]);
      uint16_t* to = shared->round[role][stage.index];
      const uint16_t* from = job.tiles + (static_cast<int64_t>(block.in_wave) * 2 + role) *
                                             job.lane_tiles * Shape::kTileHalves;
      // The others wait for this thread.
      if (thread == 0)
        ptx::BarrierWait(ptx::SharedAddress(&shared->empty[role][stage.index]), stage.parity ^ 1);
      if (!IsClear<Shape>(clear, i)) {
        LoadUnclear<D>(job, block, role, i, count, from, to, shared->bad[stage.index], thread);
      }
      if (thread == 0) {
        const int coded = block.coded_tiles - i;  // of the round, the first ones
        const int copies = coded < 0 ? 0 : coded < count ? coded : count;
        if (copies) {
          ptx::BarrierExpect(full, copies * (2 * Shape::kTileHalves));
        } else {
          ptx::ArriveAt(full);
        }
#pragma unroll 1
        for (int n = 0; n < copies; ++n) {
          const uint16_t* tile = from + int64_t{TileNumber<Shape::kKeys>(block, i + n).first} * D;
#pragma unroll
          for (int part = 0; part < D / 64; ++part) {
            ptx::BulkCopy(ptx::SharedAddress(to + part * Shape::kRoundPart + n * Shape::kTilePart),
                          tile + part * Shape::kTilePart, 2 * Shape::kTilePart, full);
          }
        }
      }
    }
    stage = stage.Next();
  }
}

// Adds values that are not finite to the rows that see them, and makes them 0 for the product. All
// warps with rows.
template <int D>
__device__ __forceinline__ void TakeBadValues(const PrefillBlock& block, const TileOf& tile,
                                              uint16_t* value, int lane, Sm90Rows<D>* state) {
  using Shape = Sm90Shape<D>;
  constexpr int kThreads = Shape::kWarps * kWarp;
  state->rows.AddBadValues(tile, value, lane,
                           [&](int, int half) { return state->Seen(block, tile, half); });
  ptx::SyncThreads(kRowsBarrier, kThreads);
  for (int at = threadIdx.x; at < Shape::kTileHalves; at += kThreads) {
    uint16_t& x = value[at / Shape::kTilePart * Shape::kRoundPart + at % Shape::kTilePart];
    if ((x & 0x7C00u) == 0x7C00u) x = 0;
  }
  ptx::FenceProducts();
  ptx::SyncThreads(kRowsBarrier, kThreads);
}

template <int D>
__device__ __forceinline__ void AttendRounds(const PrefillJob& job, Sm90Shared<D>* shared, int warp,
                                             int lane, float* part) {
  using Shape = Sm90Shape<D>;
  const PrefillBlock& block = shared->block;
  const KeyRange tiles = shared->tiles, clear = shared->clear;
  LoadQueries<Shape>(job, block, shared->query, shared->factor, warp, lane);
  Sm90Rows<D> state;
  PrefillRows<Shape>& rows = state.rows;
  rows.Clear();
  state.StoreTimes(job, block, shared->time, warp, lane);
  __syncwarp();
  state.LoadQuery(shared->query, warp, lane);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    rows.factor[0][half] = job.attention.scale * 1.44269504f *
                           shared->factor[warp * Shape::kWarpRows + half * 8 + (lane >> 2)];
  }

  const auto wait = [&](int role, const Sm90Stage<Shape>& stage) {
    ptx::BarrierWait(ptx::SharedAddress(&shared->full[role][stage.index]), stage.parity);
  };
  const auto release = [&](int role, const Sm90Stage<Shape>& stage) {
    __syncwarp();
    if (lane == 0) ptx::ArriveAt(ptx::SharedAddress(&shared->empty[role][stage.index]));
  };
  // Values of the round that starts with tile i; before products that its outputs would have to
  // wait for.
  const auto values = [&](int i, const Sm90Stage<Shape>& stage) {
    wait(1, stage);
    uint16_t* value = shared->round[1][stage.index];
    if (!IsClear<Shape>(clear, i)) {
#pragma unroll 1
      for (int n = 0; n < Shape::kTiles; ++n) {
        if (!shared->bad[stage.index][n]) continue;
        TakeBadValues<D>(block, TileNumber<Shape::kKeys>(block, i + n),
                         value + n * Shape::kTilePart, lane, &state);
      }
    }
    return value;
  };
  // Weights of the round that starts with tile i.
  float old[1][2];
  const auto weigh = [&](int i) {
    state.Cap(job);
    if (!IsClear<Shape>(clear, i)) {
#pragma unroll
      for (int n = 0; n < Shape::kTiles; ++n) {
        const TileOf tile = TileNumber<Shape::kKeys>(block, i + n);
        state.Mask(block, tile, i + n >= tiles.end, n, lane);
      }
    }
    return state.Weigh(job, old);
  };

  Sm90Stage<Shape> stage;
  wait(0, stage);
  state.StartScores(shared->round[0][stage.index]);
  ptx::ProductsWait<0>();
  ptx::Hold(rows.score[0]);
  release(0, stage);
  weigh(tiles.first);  // there are no outputs yet
  state.Pack();
  int i = tiles.first;
#pragma unroll 1
  for (; i + Shape::kTiles < tiles.end; i += Shape::kTiles) {
    const uint16_t* value = values(i, stage);
    const Sm90Stage<Shape> after = stage.Next();
    wait(0, after);
    state.StartScores(shared->round[0][after.index]);
    state.template StartOutputs<Shape::kTiles>(value);
    ptx::ProductsWait<1>();
    ptx::Hold(rows.score[0]);
    release(0, after);
    const bool grows = weigh(i + Shape::kTiles);
    ptx::ProductsWaitAfter<0>(fminf(rows.sum[0][0], rows.sum[0][1]));
    ptx::Hold(rows.out[0]);
    release(1, stage);
    if (grows) rows.Rescale(old);
    state.Pack();
    stage = after;
  }
  const uint16_t* value = values(i, stage);
  if (i + Shape::kTiles <= tiles.end) {
    state.template StartOutputs<Shape::kTiles>(value);
    ptx::ProductsWait<0>();
    ptx::Hold(rows.out[0]);
  } else {
    state.template StartOutputs<1>(value);
    ptx::ProductsWait<0>();
    ptx::Hold(rows.out[0]);
  }
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
    shared->block = block;
    shared->tiles = tiles;
    shared->clear = ClearTiles<Shape::kKeys>(block, tiles);
    for (int role = 0; role < 2; ++role)
      for (int stage = 0; stage < Shape::kStages; ++stage) {
        ptx::InitBarrier(ptx::SharedAddress(&shared->full[role][stage]), 1);
        ptx::InitBarrier(ptx::SharedAddress(&shared->empty[role][stage]), Shape::kWarps);
      }
    ptx::BarrierFence();
  }
  __syncthreads();
  if (warp >= Shape::kWarps) {
    ptx::FewerRegisters<56>();
    FetchRounds<D>(job, shared, threadIdx.x - Shape::kWarps * kWarp);
  } else {
    ptx::MoreRegisters<224>();
    float* part = nullptr;
    if (job.splits > 1) {
      part = job.parts +
             (static_cast<int64_t>(blockIdx.x) * job.splits + split) * (Shape::kRows * (D + 2));
    }
    AttendRounds<D>(job, shared, warp, lane, part);
  }
#endif
}

// The body of prefill_sm90_d*.cu.
template <int D>
Status LaunchSm90Kernel(const PrefillJob& job, cudaStream_t stream) {
  const AttentionJob& a = job.attention;
  const dim3 grid(static_cast<unsigned>(job.lanes) * a.head_blocks * a.row_blocks, job.splits);
  return Launch(Sm90Kernel<D>, grid, Sm90Shape<D>::kThreads, kSm90SharedBytes<D>, stream, job);
}

}  // namespace cuda
}  // namespace hqmq
