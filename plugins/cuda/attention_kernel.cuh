// Page-causal attention of a block of query rows (docs/semantics.md).
//
// A block of four warps takes up to 4*R rows (positions x heads of one KV head's group). Tiles of
// up to 32 keys are decoded into shared memory by all; each warp owns R rows: lane = key for the
// scores, lanes = pairs of elements for the outputs. Every row's sums run over elements and keys in
// an order that no other row, no tile size and no launch changes.
#pragma once

#include "decode_tile.cuh"
#include "kernels.h"
#include "ptx.cuh"
#include "softmax_state.cuh"

namespace hqmq {
namespace cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;

// Floats of dynamic shared memory: a tile, queries, weights, and the rows' running outputs.
__host__ __device__ __forceinline__ int AttentionFloats(int rows, int head_dim, bool walks) {
  return kTileTokens * TileStride(head_dim) + rows * (head_dim + kTileTokens) +
         (walks ? rows * (head_dim + 2) : 0);
}

// New and old tokens first…first+count-1 exactly, as fp16 holds them → tile; 0 past the end.
__device__ __forceinline__ void LoadExactTile(const RoleView& view, const Span& span, int b, int h,
                                              int64_t lane, int first, int count, float* tile,
                                              int stride) {
  const int d = view.role.head_dim;
  for (int i = threadIdx.x; i < count * d; i += blockDim.x) {
    const int t = i / d, element = i - t * d;
    tile[t * stride + element] =
        first + t < span.end
            ? FloatFromHalf(TokenHalf(view, span, b, h, lane, first + t, element, true))
            : 0.0f;
  }
}

// The first sink_tokens of a sequence, of a page that is read from its codes → rows of the page's
// first tile, as fp16 holds them but rotated as codes are. Not inlined: it is rarely needed.
inline __device__ __noinline__ void LoadSinks(const RoleView& view, Span span, int b, int h,
                                              int64_t lane, float* tile, int stride) {
  const RoleParams& role = view.role;
  const int d = role.head_dim, warp_lane = threadIdx.x % kWarp;
  for (int t = threadIdx.x / kWarp; t < role.sink_tokens; t += kAttentionWarps) {
    float* row = tile + t * stride;
    for (int i = warp_lane; i < d; i += kWarp)
      row[i] = FloatFromHalf(TokenHalf(view, span, b, h, lane, t, i, false));
    __syncwarp();
    if (role.hadamard) WarpHadamard(row, d, view.hadamard_scale, warp_lane);
  }
}

// Tokens first…first+count-1 of a coded page → tile, rotated as codes are. Page 0 is full when it
// is read so, and its first tile has all sink_tokens.
__device__ __forceinline__ void LoadCodedTile(const RoleView& view, const Span& span, int b, int h,
                                              int64_t lane, const Call& call, int first, int count,
                                              float* tile, int stride, OutlierScratch* scratch) {
  const int p = view.role.page_size;
  const int page = PageIndex(call, b, h, first / p);
  DecodeTile<false>(view, page, h, first % p, count, tile, stride, scratch);
  if (first >= view.role.sink_tokens) return;
  __syncthreads();
  LoadSinks(view, span, b, h, lane, tile, stride);
}

// The rows of one warp.
template <int R, int N>
struct WarpRows {
  int time[R];  // absolute position, -1: no row
  Softmax state[R];
  float2 out[R][N];

  __device__ void Clear() {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      state[r] = {MinusInfinity(), 0.0f};
#pragma unroll
      for (int j = 0; j < N; ++j) out[r][j] = make_float2(0.0f, 0.0f);
    }
  }
};

// Token of T (-1: none) and query head of a row of a block.
struct QueryRow {
  int i, head;
};

// Keys [first, end) that row `time` sees of a part.
struct Keys {
  int first, end;
};

__device__ __forceinline__ Keys KeysOf(int time, bool own, int page_size, int window) {
  if (time < 0) return {0, 0};
  const int page = time & ~(page_size - 1);
  const int oldest = window > 0 && time >= window ? time - window + 1 : 0;
  if (!own) return {oldest, page};
  return {oldest > page ? oldest : page, time + 1};
}

// Scores of one tile of K, softmax weights → weights [count, R]. Returns how the warp sees the
// tile: 0 not at all, 1 in part, 2 all rows see all keys.
template <int R, int N>
__device__ __forceinline__ int ScoreTile(const AttentionJob& job, bool own, int first, int count,
                                         const float* tile, int stride, const float* q,
                                         float* weights, int lane, WarpRows<R, N>* rows) {
  const int d = job.key.role.head_dim, key = first + lane;
  bool visible[R], any = false, all = true;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int time = rows->time[r];
    const Keys keys = KeysOf(time, own, job.key.role.page_size, job.window);
    visible[r] = lane < count && key >= keys.first && key < keys.end;
    any = any || (keys.first < first + count && keys.end > first);
    all = all && (time < 0 || (keys.first <= first && keys.end >= first + count));
  }
  if (!any) return 0;
  float4 sum[R];
#pragma unroll
  for (int r = 0; r < R; ++r) sum[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4* k = reinterpret_cast<const float4*>(tile + lane * stride);
#pragma unroll(R > 2 ? 1 : 4)
  for (int c = 0; c < d / 4; ++c) {
    const float4 x = k[c];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float4 y = reinterpret_cast<const float4*>(q + r * d)[c];
      sum[r].x = Fma(x.x, y.x, sum[r].x);
      sum[r].y = Fma(x.y, y.y, sum[r].y);
      sum[r].z = Fma(x.z, y.z, sum[r].z);
      sum[r].w = Fma(x.w, y.w, sum[r].w);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float score = Mul(Add(Add(sum[r].x, sum[r].y), Add(sum[r].z, sum[r].w)), job.scale);
    if (job.softcap > 0.0f) score = Mul(job.softcap, tanhf(Div(score, job.softcap)));
    if (!visible[r]) score = MinusInfinity();
    Softmax& state = rows->state[r];
    const float maximum = fmaxf(state.maximum, WarpMax(score)), base = Finite(maximum);
    const float old = Exp(Sub(state.maximum, base)), weight = Exp(Sub(score, base));
    state.sum = Fma(state.sum, old, WarpSum(weight));
    state.maximum = maximum;
#pragma unroll
    for (int j = 0; j < N; ++j)
      rows->out[r][j] = make_float2(Mul(rows->out[r][j].x, old), Mul(rows->out[r][j].y, old));
    if (lane < count) weights[lane * R + r] = weight;
  }
  return all ? 2 : 1;
}

// Adds the weighted rows of one tile of V. kGuarded: a key without weight is not touched, whatever
// it holds (NaN of a token the row does not see).
template <bool kGuarded, int R, int N>
__device__ __forceinline__ void AddTile(const float* tile, int stride, int count, int size,
                                        const float* weights, int lane, WarpRows<R, N>* rows) {
#pragma unroll(R > 2 ? 1 : 4)
  for (int key = 0; key < count; ++key) {
    float2 v[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int element = 2 * (lane + j * kWarp);
      v[j] = element < size ? *reinterpret_cast<const float2*>(tile + key * stride + element)
                            : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float weight = weights[key * R + r];
      if (kGuarded && weight == 0.0f) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        rows->out[r][j].x = Fma(weight, v[j].x, rows->out[r][j].x);
        rows->out[r][j].y = Fma(weight, v[j].y, rows->out[r][j].y);
      }
    }
  }
}

// Grid: x = (lane * head_blocks + head block) * row_blocks + row block; y = part, or 1 block that
// walks through all parts.
template <int R, int N>
__global__ void __launch_bounds__(kAttentionThreads, R == 1   ? 4
                                                     : R == 2 ? 3
                                                              : 2)
    AttendKernel(const __grid_constant__ AttentionJob job) {
  HQMQ_DYNAMIC_SHARED(shared);
  __shared__ OutlierScratch outliers;
  constexpr int kRows = R * kAttentionWarps;
  const RoleParams& role = job.key.role;
  const int p = role.page_size, d = role.head_dim, stride = TileStride(d), step = TileTokens(p);
  const int warp = threadIdx.x / kWarp, warp_lane = threadIdx.x % kWarp;
  const bool walks = job.states == nullptr;
  float* tile = reinterpret_cast<float*>(shared);
  float* q = tile + kTileTokens * stride + warp * R * d;
  float* weights = tile + kTileTokens * stride + kRows * d + warp * R * kTileTokens;
  float* total = tile + kTileTokens * stride + kRows * (d + kTileTokens) + warp * R * (d + 2);

  const int64_t heads_index = blockIdx.x / job.row_blocks, lane = heads_index / job.head_blocks;
  const int b = static_cast<int>(lane / job.call.heads),
            h = static_cast<int>(lane % job.call.heads);
  const int first_head = static_cast<int>(heads_index % job.head_blocks) * job.heads;
  const int first_row = static_cast<int>(blockIdx.x % job.row_blocks) * job.positions;
  const Span span = SpanOf(job.call, p, b);

  const auto row_of = [&](int r) {
    const int local = warp * R + r, row = local / job.heads;
    const int in_group = first_head + local - row * job.heads, i = first_row + row;
    const bool exists = row < job.positions && i < job.call.tokens && in_group < job.group;
    return QueryRow{exists ? i : -1, h * job.group + in_group};
  };

  WarpRows<R, N> rows;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const QueryRow row = row_of(r);
    const int time = span.past + row.i;
    rows.time[r] = row.i >= 0 && time < span.end ? time : -1;
    if (!walks) continue;
    if (row.i >= 0 && time >= span.end) {
      StoreConstant(job.y, RowStart(job.y, b, row.head, row.i), d, time < span.end + span.lost,
                    warp_lane);
    }
    float* running = total + r * (d + 2);
    for (int i = warp_lane; i < d + 2; i += kWarp) running[i] = i == d ? MinusInfinity() : 0.0f;
  }
  const int oldest_time = span.past + first_row;
  if (oldest_time >= span.end) return;
  const int newest_time = span.end - 1 < oldest_time + job.positions - 1
                              ? span.end - 1
                              : oldest_time + job.positions - 1;
  const int coded_end = newest_time & ~(p - 1);
  const int seen = KeysOf(oldest_time, false, p, job.window).first;

  bool loaded = false, loaded_rotated = false;
  const int first_part = walks ? 0 : blockIdx.y, end_part = walks ? job.parts : first_part + 1;
  for (int part = first_part; part < end_part; ++part) {
    const bool own = part == job.parts - 1;
    int begin = own ? oldest_time & ~(p - 1) : part * kSplitTokens;
    int end = own ? newest_time + 1 : begin + kSplitTokens;
    begin = begin > seen ? begin : seen;
    if (!own) end = end < coded_end ? end : coded_end;
    if (begin >= end) continue;

    const bool rotated = role.hadamard && !own;
    if (!loaded || rotated != loaded_rotated) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const QueryRow row = row_of(r);
        const int64_t from = RowStart(job.q, b, row.head, row.i);
        for (int i = warp_lane; i < d; i += kWarp)
          q[r * d + i] = rows.time[r] < 0 ? 0.0f : LoadFloat(job.q, from + i);
        __syncwarp();
        if (rotated) WarpHadamard(q + r * d, d, job.key.hadamard_scale, warp_lane);
      }
      loaded = true;
      loaded_rotated = rotated;
    }

    rows.Clear();
    for (int first = begin & ~(step - 1); first < end; first += step) {
      if (own) {
        LoadExactTile(job.key, span, b, h, lane, first, step, tile, stride);
      } else {
        LoadCodedTile(job.key, span, b, h, lane, job.call, first, step, tile, stride, &outliers);
      }
      __syncthreads();
      const int sees = ScoreTile(job, own, first, step, tile, stride, q, weights, warp_lane, &rows);
      __syncthreads();
      if (own) {
        LoadExactTile(job.value, span, b, h, lane, first, step, tile, stride);
      } else {
        LoadCodedTile(job.value, span, b, h, lane, job.call, first, step, tile, stride, &outliers);
      }
      __syncthreads();
      if (sees == 1) AddTile<true>(tile, stride, step, d, weights, warp_lane, &rows);
      if (sees == 2) AddTile<false>(tile, stride, step, d, weights, warp_lane, &rows);
      __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (rows.time[r] < 0) continue;
      const Softmax& state = rows.state[r];
      float* out = total + r * (d + 2);  // outputs, maximum, sum
      Factors factors = {0.0f, 1.0f};
      Softmax joined = state;
      if (walks) {
        if (own && job.value.role.hadamard) {
          __syncwarp();
          WarpHadamard(out, d, job.value.hadamard_scale, warp_lane);
        }
        if (state.sum == 0.0f) continue;  // no key of this part
        joined = {out[d], out[d + 1]};
        factors = Join(&joined, state);
      } else {
        const QueryRow row = row_of(r);
        const int64_t index =
            (static_cast<int64_t>(b) * job.call.heads * job.group + row.head) * job.call.tokens +
            row.i;
        out = job.states + (index * job.parts + part) * (d + 2);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int element = 2 * (warp_lane + j * kWarp);
        if (element >= d) continue;
        float2* to = reinterpret_cast<float2*>(out + element);
        *to = walks ? Joined(*to, rows.out[r][j], factors) : rows.out[r][j];
      }
      __syncwarp();
      if (warp_lane == 0) {
        out[d] = joined.maximum;
        out[d + 1] = joined.sum;
      }
      __syncwarp();
    }
  }
  if (!walks) return;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    if (rows.time[r] < 0) continue;
    const QueryRow row = row_of(r);
    const float* out = total + r * (d + 2);
    StoreOutput(job.y, RowStart(job.y, b, row.head, row.i), out, d, {out[d], out[d + 1]},
                job.sinks ? job.sinks + row.head : nullptr, warp_lane);
  }
}

// Blocks of 4*R rows for head_dim up to 64*N. Defined in attention_*.cu, one file a pair.
template <int R, int N>
Status LaunchAttend(const AttentionJob& job, cudaStream_t stream);

// The body of that file.
template <int R, int N>
Status LaunchAttendKernel(const AttentionJob& job, cudaStream_t stream) {
  const int64_t lanes = static_cast<int64_t>(job.call.batch) * job.call.heads;
  const bool walks = job.states == nullptr;
  const dim3 grid(static_cast<unsigned>(lanes * job.head_blocks * job.row_blocks),
                  walks ? 1 : job.parts);
  const size_t shared =
      sizeof(float) * AttentionFloats(R * kAttentionWarps, job.key.role.head_dim, walks);
  return Launch(AttendKernel<R, N>, grid, kAttentionThreads, shared, stream, job);
}

}  // namespace cuda
}  // namespace hqmq
