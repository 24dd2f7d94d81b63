// Rows of prefill attention to y, or to the parts that are joined later.
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

template <class Shape>
__device__ void PrefillRows<Shape>::Store(const PrefillJob& job, const PrefillBlock& block,
                                          int lane) {
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
template <class Shape>
__device__ void PrefillRows<Shape>::StorePart(const PrefillJob& job, const PrefillBlock& block,
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
template <class Shape>
__device__ __forceinline__ void StoreEmptyRows(const PrefillJob& job, const PrefillBlock& block,
                                               int warp, int lane) {
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

}  // namespace cuda
}  // namespace hqmq
