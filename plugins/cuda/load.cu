// HqmqDequantize on the GPU.
#include "decode_tile.cuh"
#include "kernels.h"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// One page of one head: blockIdx.x over [B, H, M].
__global__ void __launch_bounds__(kThreads) LoadKernel(const __grid_constant__ LoadJob job) {
  HQMQ_DYNAMIC_SHARED(shared);
  __shared__ OutlierScratch outliers;
  float* tile = reinterpret_cast<float*>(shared);
  const RoleView& view = job.view;
  const int p = view.role.page_size, d = view.role.head_dim, stride = TileStride(d);
  const Call& call = job.call;
  const int64_t lane = blockIdx.x / call.num_pages;
  const int m = static_cast<int>(blockIdx.x % call.num_pages), first = m * p;
  const int b = static_cast<int>(lane / call.heads), h = static_cast<int>(lane % call.heads);
  const uint16_t* tail = view.cache.tail + TailStart(view.role, lane, 0);
  const int length = Clamp(call.past_length[b], 0, static_cast<int64_t>(call.num_pages) * p);

  if (first + p > length) {  // the open page, or beyond it
    for (int i = threadIdx.x; i < p * d; i += kThreads) {
      const int t = i / d, element = i - t * d;
      const float value = first + t < length ? FloatFromHalf(tail[i]) : 0.0f;
      StoreFloat(view.x, RowStart(view.x, b, h, first + t) + element, value);
    }
    return;
  }
  const int page = PageIndex(call, b, h, m);
  const int count = TileTokens(p), warp = threadIdx.x / kWarp, warp_lane = threadIdx.x % kWarp;
  for (int start = 0; start < p; start += count) {
    DecodeTile<true>(view, page, h, start, count, tile, stride, &outliers);
    __syncthreads();
    for (int t = warp; t < count; t += kThreads / kWarp) {
      const int64_t to = RowStart(view.x, b, h, first + start + t);
      if (first + start + t < view.role.sink_tokens) {
        const uint16_t* row = tail + (p + first + start + t) * d;
#pragma unroll 1
        for (int i = warp_lane; i < d; i += kWarp)
          StoreFloat(view.x, to + i, FloatFromHalf(row[i]));
        continue;
      }
      float* row = tile + t * stride;
      if (view.role.hadamard) WarpHadamard(row, d, view.hadamard_scale, warp_lane);
      for (int i = warp_lane; i < d; i += kWarp) StoreFloat(view.x, to + i, row[i]);
    }
    __syncthreads();
  }
}

}  // namespace

Status Load(const LoadJob& job, cudaStream_t stream) {
  const int64_t pages = static_cast<int64_t>(job.call.batch) * job.call.heads * job.call.num_pages;
  const size_t shared = sizeof(float) * kTileTokens * TileStride(job.view.role.head_dim);
  return Launch(LoadKernel, dim3(static_cast<unsigned>(pages)), kThreads, shared, stream, job);
}

}  // namespace cuda
}  // namespace hqmq
