// The tokens that a query sees exactly, from the tail and from the call: those of its own page and
// the first ones of the sequence (sink_tokens, of K and V alike).
#pragma once

#include "decode_rows.cuh"
#include "decode_shared.cuh"
#include "softmax_state.cuh"

namespace hqmq {
namespace cuda {

// The exact tokens of a problem's rows as a list of slots: a slot for each token of their own
// pages, and before them one for each of the first tokens of the sequence, if a row of a later page
// than page 0 sees any.
struct OwnSlots {
  int begin;  // first token of the own pages, and its slot
  int first;  // slot

  __device__ __forceinline__ OwnSlots(const DecodeJob& job, const Problem& p) {
    const AttentionJob& a = job.attention;
    const int page_size = a.key.role.page_size, count = a.key.role.sink_tokens;
    begin = p.first_time & ~(page_size - 1);
    const bool any = p.last_time >= page_size && OldestKey(p.first_time, a.window) < count;
    first = any ? begin - count : begin;
  }
  __device__ __forceinline__ int Token(int slot) const {
    return slot < begin ? slot - first : slot;
  }
  // Whether the row at position `time` sees a slot.
  __device__ __forceinline__ bool Sees(const AttentionJob& a, int time, int slot) const {
    const int page = time & ~(a.key.role.page_size - 1);
    const bool given = slot < begin ? page > 0 : slot >= page && slot <= time;
    return given && Token(slot) >= OldestKey(time, a.window);
  }
};

// fp16 row of a slot of one role (0: K, 1: V), null after the last one that a row sees.
template <int D>
__device__ __forceinline__ const uint16_t* OwnRow(const DecodeJob& job, const Problem& p, int role,
                                                  const DecodeShared<D>& shared,
                                                  const OwnSlots& slots, int slot) {
  if (slot > p.last_time) return nullptr;
  const int t = slots.Token(slot);
  if (t >= p.span.past) return shared.fresh[role][t - p.span.past];
  const RoleView& view = role ? job.attention.value : job.attention.key;
  const int page_size = view.role.page_size;
  const int row = slot < slots.begin ? page_size + t : t & (page_size - 1);
  const int64_t sequence = static_cast<int64_t>(p.b) * job.attention.call.heads + p.h;
  return view.cache.tail + (sequence * TailRows(view.role) + row) * D;
}

__device__ __forceinline__ uint4 LoadOwn(const uint16_t* row, int element) {
  return row ? *reinterpret_cast<const uint4*>(row + element) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ bool IsFiniteHalf(uint16_t x) { return (x & 0x7C00u) != 0x7C00u; }

// NaN and infinity as 0: a row whose weight of a token is 0 must not see them. `any` tells of some.
__device__ __forceinline__ uint32_t FiniteHalves(uint32_t x, bool* any) {
  const bool low = IsFiniteHalf(static_cast<uint16_t>(x));
  const bool high = IsFiniteHalf(static_cast<uint16_t>(x >> 16));
  *any = *any || !low || !high;
  return (low ? x & 0xFFFFu : 0) | (high ? x & 0xFFFF0000u : 0);
}

__device__ __forceinline__ uint4 FiniteHalves(uint4 x, bool* any) {
  return make_uint4(FiniteHalves(x.x, any), FiniteHalves(x.y, any), FiniteHalves(x.z, any),
                    FiniteHalves(x.w, any));
}

// Exact tiles of one of the kOwnWarps warps. Sums up into rows.
template <int D, int kColumns, bool kPairs>
__device__ __forceinline__ void AttendOwn(const DecodeJob& job, const Problem& p,
                                          DecodeShared<D>* shared, int own_warp, int lane,
                                          LaneRows<D, kColumns, kPairs>* rows) {
  lane = ptx::Late(lane);
  const AttentionJob& a = job.attention;
  const int r = lane >> 2, j = lane & 3;
  const OwnSlots slots(job, p);
  QueryLane<D, kColumns> query;
  query.Load(*shared, 0, lane);
  float factor[2];
  int time[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = (2 * j + i) & (kColumns - 1);
    factor[i] = a.scale * 1.44269504f * shared->factor[0][row];
    time[i] = RowTime(job, p, p.row + row);
  }
  bool bad = false;
  for (int tile = slots.first + own_warp * kDecodeTile; tile <= p.last_time;
       tile += kOwnWarps * kDecodeTile) {
    float score[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const uint16_t* k0 = OwnRow(job, p, 0, *shared, slots, tile + r);
    const uint16_t* k1 = OwnRow(job, p, 0, *shared, slots, tile + r + 8);
    // Half of V's rows arrive while K's products are made, where registers allow.
    constexpr int kLoads = (D / 32 + 1) / 2;
    uint4 v[2][2][kLoads];
    const auto load_values = [&](int half) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint16_t* from = OwnRow(job, p, 1, *shared, slots, tile + 2 * j + n + 8 * half);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) v[half][n][i] = LoadOwn(from, r * (D / 8) + 8 * i);
      }
    };
    if constexpr (D <= 128) load_values(0);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      const uint4 x = LoadOwn(k0, j * (D / 4) + 8 * i), y = LoadOwn(k1, j * (D / 4) + 8 * i);
      ptx::Mma(score, x.x, y.x, x.y, y.y, query.chunk[2 * i].x, query.chunk[2 * i].y);
      ptx::Mma(score, x.z, y.z, x.w, y.w, query.chunk[2 * i + 1].x, query.chunk[2 * i + 1].y);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      score[k] *= factor[k & 1];
      if (job.cap > 0.0f) score[k] = Capped(score[k], job.cap, job.per_cap);
      if (!slots.Sees(a, time[k & 1], tile + r + 8 * (k / 2))) score[k] = MinusInfinity();
    }
    uint32_t weight[kColumns / 2][2];
    const float one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    float p[4];
    rows->Weigh(score, one, 1.0f, weight, p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (D > 128 || half == 1) load_values(half);
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint4 x = FiniteHalves(v[half][0][i], &bad), y = FiniteHalves(v[half][1][i], &bad);
        rows->Add(2 * i, make_uint2(x.x, x.y), make_uint2(y.x, y.y), half, weight);
        rows->Add(2 * i + 1, make_uint2(x.z, x.w), make_uint2(y.z, y.w), half, weight);
      }
    }
  }
  if (__any_sync(kAllLanes, bad) && lane == 0) shared->bad_values = 1;
}

// What AttendOwn left out of one output: the sum of the values that are not finite, over the tokens
// that row `row` of the problem sees.
template <int D>
__device__ __noinline__ float BadValues(const DecodeJob& job, const Problem& p,
                                        const DecodeShared<D>& shared, int row, int element) {
  const int time = RowTime(job, p, p.row + row);
  const OwnSlots slots(job, p);
  float sum = 0.0f;
  for (int slot = slots.first; slot <= time; ++slot) {
    if (!slots.Sees(job.attention, time, slot)) continue;
    const uint16_t x = OwnRow(job, p, 1, shared, slots, slot)[element];
    if (!IsFiniteHalf(x)) sum += FloatFromHalf(x);
  }
  return sum;
}

}  // namespace cuda
}  // namespace hqmq
