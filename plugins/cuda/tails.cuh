// Rows of new tokens as fp16, four elements at a time, and the tail they are written to.
#pragma once

#include "encode_job.h"

namespace hqmq {
namespace cuda {

__device__ __forceinline__ uint2 HalvesFromBf16(uint2 from) {
  const auto half = [](uint32_t bits) {
    return static_cast<uint32_t>(HalfFromFloat(FloatFromBf16(static_cast<uint16_t>(bits))));
  };
  return make_uint2(half(from.x) | half(from.x >> 16) << 16, half(from.y) | half(from.y >> 16)
                                                                                << 16);
}

// Elements at … at + 3 of x as fp16. `vector`: HasVectors.
__device__ __forceinline__ uint2 LoadHalves(const Rows& x, int64_t at, bool vector) {
  if (vector && x.dtype != HQMQ_FLOAT32) {
    const uint2 from = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x.data) + at);
    return x.dtype == HQMQ_FLOAT16 ? from : HalvesFromBf16(from);
  }
  uint32_t half[4];
  if (vector) {
    const float4 from = *reinterpret_cast<const float4*>(static_cast<const float*>(x.data) + at);
    half[0] = HalfFromFloat(from.x);
    half[1] = HalfFromFloat(from.y);
    half[2] = HalfFromFloat(from.z);
    half[3] = HalfFromFloat(from.w);
  } else {
    for (int k = 0; k < 4; ++k) half[k] = LoadHalf(x, at + k);
  }
  return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

// Whether four elements of any row, and of the tail, can be moved at once.
inline bool HasVectors(const RoleView& view) {
  const int64_t quad = view.x.dtype == HQMQ_FLOAT32 ? 16 : 8;
  return reinterpret_cast<uintptr_t>(view.x.data) % quad == 0 &&
         reinterpret_cast<uintptr_t>(view.cache.tail) % 8 == 0 &&
         (view.x.batch | view.x.head | view.x.token) % 4 == 0;
}

__device__ __forceinline__ bool AnyNotFinite(uint32_t pair) {
  return (pair & 0x7C00u) == 0x7C00u || (pair & 0x7C000000u) == 0x7C000000u;
}

__device__ __forceinline__ void StoreHalves(uint16_t* to, uint2 halves, bool vector) {
  if (vector) {
    *reinterpret_cast<uint2*>(to) = halves;
  } else {
    to[0] = static_cast<uint16_t>(halves.x);
    to[1] = static_cast<uint16_t>(halves.x >> 16);
    to[2] = static_cast<uint16_t>(halves.y);
    to[3] = static_cast<uint16_t>(halves.y >> 16);
  }
}

// A page that fills and has no place in the pool: by one thread of its first role and head.
__device__ __forceinline__ void CountNoPage(const AppendJob& job, int page_size) {
  if (job.status) atomicAdd(&job.status->no_page, page_size);
}

// One new token of one head by one warp: its rows of the tail, and what the status counts; `first`:
// of the call and head. Loads before it needs the lengths.
__device__ __forceinline__ void WriteTail(const EncodeJob& whole, int role, int b, int h, int i,
                                          bool first, int warp_lane) {
  const AppendJob& job = whole.append;
  const RoleView& view = job.view[role];
  const bool vector = whole.vector[role];
  const int p = view.role.page_size, d = view.role.head_dim;
  const int64_t from = RowStart(view.x, b, h, i);
  uint2 halves = make_uint2(0, 0);
  if (4 * warp_lane < d) halves = LoadHalves(view.x, from + 4 * warp_lane, vector);
  const Span span = SpanOf(job.call, p, b);
  if (job.status && first && h == 0 && role == 0 && span.lost && warp_lane == 0)
    atomicAdd(&job.status->no_page, span.lost);
  const int t = span.past + i;
  const bool kept = t < span.end && t >= span.end - p;
  const bool sink = t < span.end && t < view.role.sink_tokens;
  if (t >= span.end + span.lost || (!kept && !sink && !job.status)) return;
  const int64_t lane = static_cast<int64_t>(b) * job.call.heads + h;
  uint16_t* to = view.cache.tail + TailStart(view.role, lane, t & (p - 1));
  bool bad = false;
  for (int k = 4 * warp_lane; k < d; k += 4 * kWarp) {
    if (k >= 4 * kWarp) halves = LoadHalves(view.x, from + k, vector);
    bad = bad || AnyNotFinite(halves.x) || AnyNotFinite(halves.y);
    if (kept) StoreHalves(to + k, halves, vector);
    // Token t of page 0 once more: P rows after row t mod P, which is t.
    if (sink) StoreHalves(to + p * d + k, halves, vector);
  }
  const bool counted = whole.fast[role] && job.call.tokens > 1 && t < span.end / p * p;
  if (job.status && !counted && __ballot_sync(kAllLanes, bad) && warp_lane == 0)
    atomicAdd(&job.status->not_finite, 1);
}

// What each launch does first: zeroes the counters, and with one new token writes its rows of the
// tails. By `blocks` blocks of `threads`.
__device__ __forceinline__ void StartAppend(const EncodeJob& job, int64_t block, int64_t blocks,
                                            int threads) {
  const Call& call = job.append.call;
  const int64_t lanes = static_cast<int64_t>(call.batch) * call.heads;
  for (int64_t i = block * threads + threadIdx.x; i < lanes * job.append.lane_counters && !job.role;
       i += blocks * threads) {
    job.append.counters[i] = 0;
  }
  if (call.tokens != 1) return;
  for (int64_t row = threadIdx.x / kWarp * blocks + block; row < lanes * job.roles;
       row += threads / kWarp * blocks) {
    const int role = job.role + (row >= lanes);
    const int64_t lane = row >= lanes ? row - lanes : row;
    WriteTail(job, role, static_cast<int>(lane / call.heads), static_cast<int>(lane % call.heads),
              0, true, threadIdx.x % kWarp);
  }
}

}  // namespace cuda
}  // namespace hqmq
