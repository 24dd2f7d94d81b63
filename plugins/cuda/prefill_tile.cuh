// Tiles of keys and values in shared memory, and queries as fp16.
#pragma once

#include "prefill_work.cuh"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {

template <int D>
struct PrefillShape {
  static constexpr int kDim = D;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  // Of a warp, 16 rows each: two halve the loads of keys and values, if registers allow.
  static constexpr int kRowTiles = D > 128 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = D > 128 ? 32 : 64;  // of a tile
  static constexpr int kRoundKeys = kKeys;         // of the tiles that are weighed together
  static constexpr int kTileHalves = kKeys * D;
  static constexpr int kTileBytes = 2 * kTileHalves;
  static constexpr int kUnits = kTileHalves / 8;  // of 16 bytes
};

// Two stages of K and V, and the block's queries.
template <int D>
struct alignas(128) PrefillShared {
  using Shape = PrefillShape<D>;
  uint16_t stage[2][2][Shape::kTileHalves];  // [stage][K, V]
  uint16_t query[Shape::kRows * D];          // as a tile of kRows tokens
  float factor[Shape::kRows];                // what query was divided by, powers of two
};

// Eight elements of a row of activations as fp16; elements from d on are 0.
__device__ __forceinline__ uint4 EightHalves(const Rows& x, int64_t row, int element, int d,
                                             bool wide) {
  uint16_t out[8];
  if (wide) {
    if (element >= d) return make_uint4(0, 0, 0, 0);
    const uint4 bits =
        *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(x.data) + row + element);
    if (x.dtype == HQMQ_FLOAT16) return bits;
    memcpy(out, &bits, sizeof(out));
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = HalfFromFloat(FloatFromBf16(out[k]));
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      out[k] = element + k < d ? LoadHalf(x, row + element + k) : uint16_t{0};
  }
  uint4 halves;
  memcpy(&halves, out, sizeof(halves));
  return halves;
}

// Whether one of the halves is not finite.
__device__ __forceinline__ bool AnyBad(uint32_t x) {
  return (x & 0x7C00u) == 0x7C00u || (x & 0x7C000000u) == 0x7C000000u;
}
__device__ __forceinline__ bool AnyBad(uint4 x) {
  return AnyBad(x.x) || AnyBad(x.y) || AnyBad(x.z) || AnyBad(x.w);
}

// Exact tokens of one role → a tile of a round's; 0 where no row looks. By kThreads threads, of
// which this is `thread`; synchronise before reading. Returns whether this thread met NaN or
// infinity.
template <class Shape, int kThreads>
__device__ __forceinline__ bool LoadExact(const PrefillJob& job, const PrefillBlock& block,
                                          int role, int first, uint16_t* to, int thread) {
  constexpr int D = Shape::kDim;
  const RoleView& view = role ? job.attention.value : job.attention.key;
  const int d = view.role.head_dim;
  const Rows tail = {view.cache.tail, HQMQ_FLOAT16, 0, 0, 0};
  bool bad = false;
#pragma unroll 1
  for (int i = thread; i < Shape::kUnits; i += kThreads) {
    const int t = i / (D / 8), unit = i % (D / 8), token = first + t;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (token >= block.span.past && token <= block.last_time) {
      const int64_t row = RowStart(view.x, block.b, block.h, token - block.span.past);
      x = EightHalves(view.x, row, 8 * unit, d, job.wide_x[role]);
    } else if (token >= block.exact_begin && token <= block.last_time) {
      const int64_t row = block.lane * TailRows(view.role) + (token & (block.page_size - 1));
      x = EightHalves(tail, row * d, 8 * unit, d, job.wide_tail[role]);
    }
    bad = bad || AnyBad(x);
    ptx::StoreShared128(ptx::SharedAddress(to + 8 * TileUnit<Shape::kRoundKeys>(t, unit)), x);
  }
  return bad;
}

// A coded tile of one role from the workspace, as asynchronous copies.
template <int D>
__device__ __forceinline__ void CopyCoded(const PrefillJob& job, const PrefillBlock& block,
                                          int role, int first, uint16_t* to) {
  using Shape = PrefillShape<D>;
  const int64_t tile =
      (static_cast<int64_t>(block.in_wave) * 2 + role) * job.lane_tiles + first / kPrefillTile;
  const uint16_t* from = job.tiles + tile * (kPrefillTile * D) + first % kPrefillTile * 64;
  const uint32_t at = ptx::SharedAddress(to);
#pragma unroll
  for (int n = 0; n < Shape::kUnits / Shape::kThreads; ++n) {
    const int i = threadIdx.x + n * Shape::kThreads;
    const int part = i / (8 * Shape::kKeys), within = i % (8 * Shape::kKeys);
    ptx::CopyAsync16(at + 16 * i, from + (part * (8 * kPrefillTile) + within) * 8);
  }
}

template <int D>
__device__ __forceinline__ void FetchTile(const PrefillJob& job, const PrefillBlock& block,
                                          int number, PrefillShared<D>* shared) {
  using Shape = PrefillShape<D>;
  const TileOf tile = TileNumber<PrefillShape<D>::kKeys>(block, number);
  uint16_t (&stage)[2][PrefillShape<D>::kTileHalves] = shared->stage[number & 1];
#pragma unroll
  for (int role = 0; role < 2; ++role) {
    if (tile.exact) {
      LoadExact<Shape, Shape::kThreads>(job, block, role, tile.first, stage[role], threadIdx.x);
    } else {
      CopyCoded<D>(job, block, role, tile.first, stage[role]);
    }
  }
}

// A row of a block: token of the call (-1: none) and query head.
struct PrefillRow {
  int i, head;
};
__device__ __forceinline__ PrefillRow RowOf(const PrefillJob& job, const PrefillBlock& block,
                                            int row) {
  const AttentionJob& a = job.attention;
  const int position = row / a.heads, in_group = block.first_head + row - position * a.heads;
  const int i = block.first_row + position;
  const bool exists = position < a.positions && i < a.call.tokens && in_group < a.group;
  return {exists ? i : -1, block.h * a.group + in_group};
}

// The queries of a warp as fp16, the largest of a row in [1, 2) times the row's factor; 0 for rows
// without a token. The warp synchronises before and after.
template <class Shape>
__device__ __forceinline__ void LoadQueries(const PrefillJob& job, const PrefillBlock& block,
                                            uint16_t* query, float* factor, int warp, int lane) {
  constexpr int kEach = Shape::kDim / kWarp;  // elements of a lane
  const AttentionJob& a = job.attention;
  const int d = a.key.role.head_dim;
#pragma unroll 4
  for (int r = 0; r < Shape::kWarpRows; ++r) {
    const int local = warp * Shape::kWarpRows + r;
    const PrefillRow row = RowOf(job, block, local);
    const bool given = row.i >= 0 && block.span.past + row.i <= block.last_time;
    const int64_t from = RowStart(a.q, block.b, row.head, row.i) + lane * kEach;
    float x[kEach], largest = 0.0f;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      x[k] = given && lane * kEach + k < d ? LoadFloat(a.q, from + k) : 0.0f;
      largest = fmaxf(largest, fabsf(x[k]));
    }
    const uint32_t exponent = __float_as_uint(WarpMax(largest)) & 0x7F800000u;
    const bool usual = exponent >= 0x01000000u && exponent <= 0x7E000000u;
    const float per_unit = usual ? __uint_as_float(0x7F000000u - exponent) : 1.0f;
    if (lane == 0) factor[local] = usual ? __uint_as_float(exponent) : 1.0f;
    const int element = lane * kEach, unit = TileUnit<Shape::kRows>(local, element / 8);
    uint16_t* to = query + 8 * unit + element % 8;
#pragma unroll
    for (int k = 0; k < kEach; k += 2) {
      *reinterpret_cast<uint32_t*>(to + k) = ptx::PackHalf(x[k] * per_unit, x[k + 1] * per_unit);
    }
  }
}

}  // namespace cuda
}  // namespace hqmq
