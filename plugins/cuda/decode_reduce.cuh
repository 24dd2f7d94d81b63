// From the warps of a block to a part, and from the parts of a problem to rows of y.
//
// Warps do not wait for each other at the end of an item. Each stores its state (StoreState) and
// goes on with its tiles of the next item; half way through them it joins its share of the states
// (JoinStates), which all warps have stored by then as a rule.
#pragma once

#include "decode_own.cuh"

namespace hqmq {
namespace cuda {

// The item whose states are stored and not yet joined.
struct Pending {
  int split = -1;       // -1: none, or its share is joined
  uint32_t parity = 0;  // of the barriers' next phase
};

// Stores a warp's state of an item. Every weight is scaled by 2^kWeightShift; it cancels between
// outputs and sums. states: float4 [kDecodeWarps, kTiles, kWarp].
template <int D, int kColumns, bool kPairs>
__device__ __forceinline__ void StoreState(LaneRows<D, kColumns, kPairs>* rows, float4* states,
                                           DecodeShared<D>* shared, int warp, int lane) {
#pragma unroll
  for (int offset = kPairs ? 2 : 4; offset < kWarp; offset *= 2) {
    rows->sum[0] += __shfl_xor_sync(kAllLanes, rows->sum[0], offset);
    rows->sum[1] += __shfl_xor_sync(kAllLanes, rows->sum[1], offset);
  }
  if (lane < 4) {
    *reinterpret_cast<float2*>(&shared->maximum[warp][2 * lane]) =
        make_float2(rows->base[0] + kWeightShift, rows->base[1] + kWeightShift);
    *reinterpret_cast<float2*>(&shared->sum[warp][2 * lane]) =
        make_float2(rows->sum[0], rows->sum[1]);
  }
  constexpr int kTiles = LaneRows<D, kColumns>::kTiles;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    states[(warp * kTiles + tile) * kWarp + lane] =
        make_float4(rows->out[tile][0], rows->out[tile][1], rows->out[tile][2], rows->out[tile][3]);
  }
  // Every lane for itself: compute-sanitizer does not follow a warp's barrier and then one arrival.
  ptx::BarrierArrive(ptx::SharedAddress(&shared->stored));
}

__device__ __forceinline__ float Across(float x, int offset) {
  return __shfl_xor_sync(kAllLanes, x, offset);
}

// Sums one warp's share of the stored states in the order of warps, into the block's part; in the
// last split of a problem the last kOwnWarps warps hold the exact tokens, which are a part of their
// own. Lane (q = lane / 8, x = lane % 8) takes warps 4q…4q+3.
template <int D, int kColumns, class P>
__device__ __forceinline__ void JoinStates(const DecodeJob& job, const P& p, int problem,
                                           Pending* pending, const float4* states,
                                           DecodeShared<D>* shared, int warp, int lane) {
  static_assert(kDecodeWarps == 16 && kOwnWarps == 4, "four warps for each q");
  lane = ptx::Late(lane);
  constexpr int kTiles = LaneRows<D, kColumns>::kTiles;
  constexpr int kShare = kTiles * kWarp / kDecodeWarps;  // float4 of a warp
  const bool last = pending->split == p.own;
  const int q = lane >> 3, x = lane & 7;
  const bool own = last && q == 3;
  float* const parts =
      job.parts + static_cast<int64_t>(FirstPartOf(job, p, problem)) * PartFloats(kColumns, D);
  float* const part = parts + (pending->split + own) * PartFloats(kColumns, D);
  ptx::BarrierWait(ptx::SharedAddress(&shared->stored), pending->parity);

  const auto maximum_of = [&](float of) {
    float most = own ? kNoScore : of;
    most = fmaxf(most, Across(most, 8));
    most = fmaxf(most, Across(most, 16));
    return own ? of : most;
  };
  const auto sum_of = [&](float of) {
    float total = own ? 0.0f : of;
    total += Across(total, 8);
    total += Across(total, 16);
    return own ? of : total;
  };
  if (warp == 0) {  // maxima and sums of row x
    float of[4], most = kNoScore, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = fmaxf(most, of[i] = shared->maximum[4 * q + i][x]);
    most = maximum_of(most);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += shared->sum[4 * q + i][x] * ptx::Exp2(of[i] - most);
    sum = sum_of(sum);
    if (q == 0 || own) {
      part[kColumns * D + x] = most;
      part[kColumns * D + kDecodeRows + x] = sum;
    }
  }
  // A float4 holds columns 2(x % 4) and 2(x % 4) + 1, twice each.
  float2 factor[4], most = make_float2(kNoScore, kNoScore);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    factor[i] = *reinterpret_cast<const float2*>(&shared->maximum[4 * q + i][2 * (x & 3)]);
    most = make_float2(fmaxf(most.x, factor[i].x), fmaxf(most.y, factor[i].y));
  }
  most = make_float2(maximum_of(most.x), maximum_of(most.y));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    factor[i] = make_float2(ptx::Exp2(factor[i].x - most.x), ptx::Exp2(factor[i].y - most.y));
  }
#pragma unroll
  for (int j = 0; j < kShare; j += 8) {
    const bool active = kShare >= 8 || x < kShare;
    const int at = warp * kShare + j + (active ? x : 0);
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 y = states[(4 * q + i) * (kTiles * kWarp) + at];
      sum = make_float4(Fma(y.x, factor[i].x, sum.x), Fma(y.y, factor[i].y, sum.y),
                        Fma(y.z, factor[i].x, sum.z), Fma(y.w, factor[i].y, sum.w));
    }
    const float total[4] = {sum_of(sum.x), sum_of(sum.y), sum_of(sum.z), sum_of(sum.w)};
    if (active && (q == 0 || own)) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Output to = OutputOf<D, kColumns>(at / kWarp, at % kWarp, k);
        float value = total[k];
        if (own && shared->bad_values && to.row < p.rows)
          value += BadValues<D>(job, p, *shared, to.row, to.element);
        part[to.row * D + to.element] = value;
      }
    }
  }
  ptx::BarrierArrive(ptx::SharedAddress(&shared->joined));
  pending->split = -1;
}

// Waits until all warps have joined their shares: the states may be overwritten. Once for each
// JoinStates.
template <int D>
__device__ __forceinline__ void WaitJoined(Pending* pending, DecodeShared<D>* shared) {
  ptx::BarrierWait(ptx::SharedAddress(&shared->joined), pending->parity);
  pending->parity ^= 1;
}

// Counts `count` finished parts; true in all threads of the block that finished last. All threads;
// their shares are joined.
template <int D>
__device__ __forceinline__ bool AreLastParts(const DecodeJob& job, const Problem& p, int problem,
                                             int count, DecodeShared<D>* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    bool last = count == p.splits;
    if (!last) {
      ptx::GridWait();  // the counters are set to 0 by the kernel before
      last = ptx::AddInOrder(job.counters + problem, static_cast<uint32_t>(count)) + count ==
             static_cast<uint32_t>(p.splits);
    }
    shared->flag = last;
  }
  __syncthreads();
  return shared->flag != 0;
}

// Rows of a problem that hold no token, from row `first` on. All threads.
template <int D, int kColumns>
__device__ __forceinline__ void StoreEmptyRows(const DecodeJob& job, const Problem& p, int first,
                                               int warp, int lane) {
  const AttentionJob& a = job.attention;
  const int row = p.row + warp;
  if (warp < first || warp >= kColumns || row >= job.rows) return;
  const int token = job.by_group(row);
  StoreConstant(a.y, RowStart(a.y, p.b, p.h * a.group + row - token * a.group, token), D,
                p.span.past + token < p.span.end + p.span.lost, lane);
}

// Hadamard (codec/hadamard.h) of a row by a warp; lane i has elements 4i… of each 128.
template <int D, int kChunks>
__device__ __forceinline__ void HadamardByChunks(float4 (&x)[kChunks], float scale, int lane) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const float4 pairs = make_float4(Add(x[c].x, x[c].y), Sub(x[c].x, x[c].y), Add(x[c].z, x[c].w),
                                     Sub(x[c].z, x[c].w));
    x[c] = make_float4(Add(pairs.x, pairs.z), Add(pairs.y, pairs.w), Sub(pairs.x, pairs.z),
                       Sub(pairs.y, pairs.w));
#pragma unroll
    for (int stride = 1; stride < (D < 128 ? D / 4 : kWarp); stride *= 2) {
      const auto pair = [&](float value) {
        const float other = Across(value, stride);
        return lane & stride ? Sub(other, value) : Add(value, other);
      };
      x[c] = make_float4(pair(x[c].x), pair(x[c].y), pair(x[c].z), pair(x[c].w));
    }
  }
  if constexpr (kChunks == 2) {
    const float4 low = x[0], high = x[1];
    x[0] =
        make_float4(Add(low.x, high.x), Add(low.y, high.y), Add(low.z, high.z), Add(low.w, high.w));
    x[1] =
        make_float4(Sub(low.x, high.x), Sub(low.y, high.y), Sub(low.z, high.z), Sub(low.w, high.w));
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    x[c] =
        make_float4(Mul(x[c].x, scale), Mul(x[c].y, scale), Mul(x[c].z, scale), Mul(x[c].w, scale));
  }
}

__device__ __forceinline__ void AddTimes(float4* x, float4 y, float weight) {
  *x = make_float4(Fma(y.x, weight, x->x), Fma(y.y, weight, x->y), Fma(y.z, weight, x->z),
                   Fma(y.w, weight, x->w));
}

// Joins the parts of a problem into its rows of y. All threads; parts are complete.
template <int D, int kColumns, class P>
__device__ __forceinline__ void JoinParts(const DecodeJob& job, const P& p, int problem,
                                          DecodeShared<D>* shared, int warp, int lane) {
  const AttentionJob& a = job.attention;
  StoreEmptyRows<D, kColumns>(job, p, p.rows, warp, lane);
  if (warp >= p.rows) return;
  constexpr int kFloats = PartFloats(kColumns, D);
  constexpr int kChunks = (D / 4 + kWarp - 1) / kWarp;  // of a lane
  constexpr int kBatch = 16 / kChunks;                  // parts whose loads are under way at once
  const float* const parts =
      job.parts + static_cast<int64_t>(FirstPartOf(job, p, problem)) * kFloats;
  const int coded = p.own + 1, count = coded + 1;  // the last one: of the exact tokens
  const int row = p.row + warp, token = job.by_group(row);
  const int head = p.h * a.group + row - token * a.group;
  const bool active = D >= 4 * kWarp || 4 * lane < D;
  const float* const from = parts + warp * D + (active ? 4 * lane : 0);
  // All loads first.
  constexpr int kOfLane = (kMostParts + kWarp - 1) / kWarp;
  float maximum = kNoScore, sum = 0.0f, of[kOfLane], sums[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int n = lane + i * kWarp;
    const float* state = parts + n * kFloats + kColumns * D + warp;
    of[i] = n < count ? ptx::LoadGlobal32(state) : kNoScore;
    sums[i] = n < count ? ptx::LoadGlobal32(state + kDecodeRows) : 0.0f;
  }
  float4 batch[kBatch][kChunks], own[kChunks], x[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    own[c] = ptx::LoadGlobal128(from + static_cast<int64_t>(coded) * kFloats + c * 4 * kWarp);
    x[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
#pragma unroll
  for (int n = 0; n < kBatch; ++n) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      // Beyond the last part, it again, with a weight of 0: loads without branches.
      batch[n][c] = ptx::LoadGlobal128(from + min(n, coded - 1) * kFloats + c * 4 * kWarp);
    }
  }
  // Weights carry 2^kWeightShift; so does the sink's.
  const float sink = a.sinks ? a.sinks[head] * 1.44269504f : kNoScore;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) maximum = fmaxf(maximum, of[i]);
  maximum = fmaxf(WarpMax(maximum), sink);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int n = lane + i * kWarp;
    const float weight = ptx::Exp2(of[i] - maximum);
    if (n < kMostParts) shared->weight[warp][n] = n < count ? weight : 0.0f;
    sum += sums[i] * weight;
  }
  sum = WarpSum(sum);
  if (a.sinks) sum += ptx::Exp2(sink - maximum + kWeightShift);
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kBatch; ++n) {
    const float weight = n < coded ? shared->weight[warp][n] : 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) AddTimes(&x[c], batch[n][c], weight);
  }
#pragma unroll 4
  for (int n = kBatch; n < coded; ++n) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      AddTimes(&x[c], ptx::LoadGlobal128(from + static_cast<int64_t>(n) * kFloats + c * 4 * kWarp),
               shared->weight[warp][n]);
    }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = TurnedOutput(*shared, x[c]);
  if (a.value.role.hadamard) HadamardByChunks<D>(x, a.value.hadamard_scale, lane);
  const float weight = shared->weight[warp][coded], per_sum = 1.0f / sum;
  if (!active) return;
  const int64_t to = RowStart(a.y, p.b, head, token) + 4 * lane;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    AddTimes(&x[c], own[c], weight);
    const float y[4] = {x[c].x, x[c].y, x[c].z, x[c].w};
#pragma unroll
    for (int k = 0; k < 4; ++k) StoreFloat(a.y, to + c * 4 * kWarp + k, y[k] * per_sum);
  }
}

}  // namespace cuda
}  // namespace hqmq
