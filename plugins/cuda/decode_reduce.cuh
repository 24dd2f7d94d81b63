// From the warps of a block to a part, and from the parts of a problem to rows of y.
#pragma once

#include "decode_own.cuh"

namespace hqmq {
namespace cuda {

// Sums the warps' states in order and writes the block's part; in the last split of a problem also
// that of the exact tokens, which the last kOwnWarps warps hold. All threads. Every weight is
// scaled by 2^kWeightShift; it cancels between outputs and sums.
template <int D, int kColumns>
__device__ __forceinline__ void WritePart(const DecodeJob& job, const Problem& p, int problem,
                                          int split, LaneRows<D, kColumns>* rows,
                                          DecodeShared<D>* shared, int warp, int lane) {
  const bool last = split == p.splits - 1;
  const int coded_warps = last ? kDecodeWarps - kOwnWarps : kDecodeWarps;
  const int r = lane >> 2, j = lane & 3;
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    rows->sum[0] += __shfl_xor_sync(kAllLanes, rows->sum[0], offset);
    rows->sum[1] += __shfl_xor_sync(kAllLanes, rows->sum[1], offset);
  }
  if (r == 0) {
    *reinterpret_cast<float2*>(&shared->maximum[warp][2 * j]) =
        make_float2(rows->maximum[0], rows->maximum[1]);
    *reinterpret_cast<float2*>(&shared->sum[warp][2 * j]) = make_float2(rows->sum[0], rows->sum[1]);
  }
  __syncthreads();
  const bool own = warp >= coded_warps;
  float* part =
      job.parts + (static_cast<int64_t>(problem) * (job.splits + 1) + (own ? job.splits : split)) *
                      PartFloats(kColumns, D);
  // Lane (r, j) has columns 2j and 2j+1 of warps r and r+8.
  float maximum[2] = {kNoScore, kNoScore}, sum[2] = {0.0f, 0.0f};
  float of[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = r + 8 * i;
    const bool same = (from >= coded_warps) == own;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      of[i][k] = same ? shared->maximum[from][2 * j + k] : kNoScore;
      maximum[k] = fmaxf(maximum[k], of[i][k]);
    }
  }
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    maximum[0] = fmaxf(maximum[0], __shfl_xor_sync(kAllLanes, maximum[0], offset));
    maximum[1] = fmaxf(maximum[1], __shfl_xor_sync(kAllLanes, maximum[1], offset));
  }
  if (warp == 0 || warp == coded_warps) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = r + 8 * i;
      const bool same = (from >= coded_warps) == own;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (same) sum[k] += shared->sum[from][2 * j + k] * ptx::Exp2(of[i][k] - maximum[k]);
      }
    }
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], offset);
      sum[1] += __shfl_xor_sync(kAllLanes, sum[1], offset);
    }
    if (r == 0) {
      float* to = part + kColumns * D + 2 * j;
      *reinterpret_cast<float2*>(to) = make_float2(maximum[0], maximum[1]);
      *reinterpret_cast<float2*>(to + kDecodeRows) = make_float2(sum[0], sum[1]);
    }
  }
  const float factor[2] = {ptx::Exp2(rows->maximum[0] - maximum[0]) * rows->unit,
                           ptx::Exp2(rows->maximum[1] - maximum[1]) * rows->unit};
  const float* reduce = reinterpret_cast<const float*>(shared->reduce);
  // Threads that sum: one for each float of a round, twice where there are two parts.
  const int group = threadIdx.x / kRoundFloats, at = threadIdx.x % kRoundFloats;
  float* group_part = job.parts + (static_cast<int64_t>(problem) * (job.splits + 1) +
                                   (group ? job.splits : split)) *
                                      PartFloats(kColumns, D);
#pragma unroll
  for (int tile = 0; tile < LaneRows<D, kColumns>::kTiles; ++tile) {
    float4 x;
    x.x = rows->out[tile][0] * factor[0];
    x.y = rows->out[tile][1] * factor[1];
    x.z = rows->out[tile][2] * factor[0];
    x.w = rows->out[tile][3] * factor[1];
    shared->reduce[warp][lane] = x;
    __syncthreads();
    if (group == 0 || (group == 1 && last)) {
      const int begin = group ? coded_warps : 0, end = group ? kDecodeWarps : coded_warps;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        if (w >= begin && w < end) total += reduce[w * kRoundFloats + at];
      }
      const Output to = OutputOf<D, kColumns>(tile, at >> 2, at & 3);
      group_part[to.row * D + to.element] = total;
    }
    __syncthreads();
  }
  if (last && shared->bad_values) {
    float* own_part = job.parts + (static_cast<int64_t>(problem) * (job.splits + 1) + job.splits) *
                                      PartFloats(kColumns, D);
    for (int i = threadIdx.x; i < p.rows * D; i += kDecodeThreads)
      own_part[i] = ptx::LoadGlobal32(own_part + i) + BadValues<D>(job, p, *shared, i / D, i % D);
  }
}

// Rows of a problem that hold no token, from row `first` on. All threads.
template <int D, int kColumns>
__device__ __forceinline__ void StoreEmptyRows(const DecodeJob& job, const Problem& p, int first,
                                               int warp, int lane) {
  const AttentionJob& a = job.attention;
  const int row = p.row + warp;
  if (warp < first || warp >= kColumns || row >= job.rows) return;
  const int token = row / a.group;
  StoreConstant(a.y, RowStart(a.y, p.b, p.h * a.group + row - token * a.group, token), D,
                p.span.past + token < p.span.end + p.span.lost, lane);
}

// Joins the parts of a problem into its rows of y. All threads; parts are complete.
template <int D, int kColumns>
__device__ __forceinline__ void JoinParts(const DecodeJob& job, const Problem& p, int problem,
                                          DecodeShared<D>* shared, int warp, int lane) {
  const AttentionJob& a = job.attention;
  StoreEmptyRows<D, kColumns>(job, p, p.rows, warp, lane);
  if (warp >= p.rows) return;
  constexpr int kFloats = PartFloats(kColumns, D);
  constexpr int kChunks = (D / 4 + kWarp - 1) / kWarp;  // of a lane
  const float* parts = job.parts + static_cast<int64_t>(problem) * (job.splits + 1) * kFloats;
  const int count = p.splits + 1;  // the last one lies at job.splits
  const int row = p.row + warp, token = row / a.group;
  const int head = p.h * a.group + row - token * a.group;
  // Weights of the parts; kMostSplits + 1 of them.
  constexpr int kOfLane = (kMostSplits + 1 + kWarp - 1) / kWarp;
  float maximum = kNoScore, sum = 0.0f, of[kOfLane], sums[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int n = lane + i * kWarp;
    const float* state =
        parts + static_cast<int64_t>(n < p.splits ? n : job.splits) * kFloats + kColumns * D + warp;
    of[i] = n < count ? ptx::LoadGlobal32(state) : kNoScore;
    sums[i] = n < count ? ptx::LoadGlobal32(state + kDecodeRows) : 0.0f;
    maximum = fmaxf(maximum, of[i]);
  }
  // Weights carry 2^kWeightShift; so does the sink's.
  const float sink = a.sinks ? a.sinks[head] * 1.44269504f : kNoScore;
  maximum = fmaxf(WarpMax(maximum), sink);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int n = lane + i * kWarp;
    const float weight = ptx::Exp2(of[i] - maximum);
    if (n < count) shared->weight[warp][n] = weight;
    sum += sums[i] * weight;
  }
  sum = WarpSum(sum);
  if (a.sinks) sum += ptx::Exp2(sink - maximum + kWeightShift);
  __syncwarp();
  float4 x[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) x[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float* from = parts + warp * D + 4 * lane;
#pragma unroll 8
  for (int n = 0; n < p.splits; ++n) {
    const float weight = shared->weight[warp][n];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (D >= 4 * kWarp || 4 * lane < D) {
        const float4 y =
            ptx::LoadGlobal128(from + static_cast<int64_t>(n) * kFloats + c * 4 * kWarp);
        x[c] = make_float4(Fma(y.x, weight, x[c].x), Fma(y.y, weight, x[c].y),
                           Fma(y.z, weight, x[c].z), Fma(y.w, weight, x[c].w));
      }
    }
  }
  float* scratch = reinterpret_cast<float*>(shared->reduce) + warp * D;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (D >= 4 * kWarp || 4 * lane < D)
      *reinterpret_cast<float4*>(scratch + 4 * lane + c * 4 * kWarp) = TurnedOutput(*shared, x[c]);
  }
  __syncwarp();
  if (a.value.role.hadamard) WarpHadamard(scratch, D, a.value.hadamard_scale, lane);
  const float own = shared->weight[warp][p.splits], per_sum = 1.0f / sum;
  const int64_t to = RowStart(a.y, p.b, head, token);
#pragma unroll
  for (int i = 0; i < D / kWarp; ++i) {
    const int element = lane + i * kWarp;
    const float exact =
        ptx::LoadGlobal32(parts + static_cast<int64_t>(job.splits) * kFloats + warp * D + element);
    StoreFloat(a.y, to + element, Fma(exact, own, scratch[element]) * per_sum);
  }
}

}  // namespace cuda
}  // namespace hqmq
