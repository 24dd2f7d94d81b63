// A few tokens of the cache into shared memory as floats.
#pragma once

#include "codec/decode.h"
#include "views.cuh"

namespace hqmq {
namespace cuda {

// Tokens of a tile. A tile never crosses a page: smaller pages make smaller tiles.
constexpr int kTileTokens = 32;
constexpr int kTileMaskWords = kTileTokens * (kMaxHeadDim / 4) / 32;

__host__ __device__ __forceinline__ int TileTokens(int page_size) {
  return page_size < kTileTokens ? page_size : kTileTokens;
}

// Floats from one row of a tile to the next: an odd number of float4, so that the rows of a warp's
// lanes lie in different banks.
__host__ __device__ __forceinline__ int TileStride(int head_dim) {
  return 4 * ((head_dim / 4) | 1);
}

// Outlier bits of a tile and how many outliers of the page come before each word.
struct OutlierScratch {
  uint32_t mask[kTileMaskWords];
  int32_t before[kTileMaskWords];
};

// Codeword of codec/decode.h, rounded a few times instead of once: for attention.
__device__ __forceinline__ void CodewordInFloat(int primary, const float4& q, float out[4]) {
  const bool half = primary >= 4;
  const int minus = primary - 4;
  const float p0 = half ? 0.5f : primary == 0 ? 1.0f : 0.0f;
  const float p1 = half ? (minus & 1 ? -0.5f : 0.5f) : primary == 1 ? 1.0f : 0.0f;
  const float p2 = half ? (minus & 2 ? -0.5f : 0.5f) : primary == 2 ? 1.0f : 0.0f;
  const float p3 = half ? (minus & 4 ? -0.5f : 0.5f) : primary == 3 ? 1.0f : 0.0f;
  out[0] = Fma(-p3, q.w, Fma(-p2, q.z, Fma(-p1, q.y, Mul(p0, q.x))));
  out[1] = Fma(-p3, q.z, Fma(p2, q.w, Fma(p1, q.x, Mul(p0, q.y))));
  out[2] = Fma(p3, q.y, Fma(p2, q.x, Fma(-p1, q.w, Mul(p0, q.z))));
  out[3] = Fma(p3, q.x, Fma(-p2, q.y, Fma(p1, q.z, Mul(p0, q.w))));
}

// By warp 0: the tile's outlier bits. `first`: its first token within the page; a multiple of 32,
// or the tile is the page. Others see the result after __syncthreads().
__device__ __forceinline__ void LoadOutlierMask(const int32_t* page_mask, int first, int count,
                                                int chunks, OutlierScratch* scratch) {
  const int lane = threadIdx.x;
  const int start = first * chunks / 32, words = (count * chunks + 31) / 32;
  int sum = 0;
  for (int i = lane; i < start; i += kWarp) sum += __popc(static_cast<uint32_t>(page_mask[i]));
  int before = WarpSum(sum);
  for (int base = 0; base < words; base += kWarp) {
    const int i = base + lane;
    const uint32_t mask = i < words ? static_cast<uint32_t>(page_mask[start + i]) : 0;
    int through = __popc(mask);
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int left = __shfl_up_sync(kAllLanes, through, offset);
      if (lane >= offset) through += left;
    }
    if (i < words) {
      scratch->mask[i] = mask;
      scratch->before[i] = before + through - __popc(mask);
    }
    before += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
}

// A code with its index at most `last`. Caches come from files and, while TensorRT builds, may hold
// anything: reads stay within the codebook.
__device__ __forceinline__ uint32_t WithinCodebook(const Layout& layout, uint32_t code,
                                                   uint32_t last) {
  const uint32_t mask = (1u << layout.index_bits) - 1;
  return (code & ~mask) | min(code & mask, last);
}

// Coded tokens first…first+count-1 of one page of head h → tile [count, stride]: page mean added,
// still rotated; NaN if there is no page. `page`: PageIndex. All threads of the block call it;
// synchronise before reading the tile. kExact: the bits of HqmqDequantize.
template <bool kExact>
__device__ __forceinline__ void DecodeTile(const RoleView& view, int64_t page, int h, int first,
                                           int count, float* tile, int stride,
                                           OutlierScratch* scratch) {
  const RoleParams& role = view.role;
  const int chunks = role.head_dim / 4, p = role.page_size;
  if (page == kNoPage) {
    const float nan = BitCast<float>(0x7FC00000u);
    for (int i = threadIdx.x; i < count * chunks; i += blockDim.x) {
      float* to = tile + i / chunks * stride + i % chunks * 4;
      *reinterpret_cast<float4*>(to) = make_float4(nan, nan, nan, nan);
    }
    return;
  }
  if (role.storage == Storage::kFp16) {
    const uint32_t* words =
        reinterpret_cast<const uint32_t*>(view.cache.codes) + (page * p + first) * 2 * chunks;
    for (int i = threadIdx.x; i < count * 2 * chunks; i += blockDim.x) {
      const uint32_t word = words[i];
      float2* to = reinterpret_cast<float2*>(tile + i / (2 * chunks) * stride) + i % (2 * chunks);
      *to = make_float2(FloatFromHalf(static_cast<uint16_t>(word)),
                        FloatFromHalf(static_cast<uint16_t>(word >> 16)));
    }
    return;
  }
  const Layout& layout = view.layout;
  const int64_t row = page * p + first;
  const int32_t* words = view.cache.codes + row * layout.words;
  const uint16_t* mean = role.page_mean ? view.cache.mean + page * role.head_dim : nullptr;
  const float* secondaries = view.secondaries + static_cast<int64_t>(h) * role.secondaries * 4;
  const bool outliers = role.outlier_capacity > 0;
  if (outliers) {
    if (threadIdx.x < kWarp) {
      LoadOutlierMask(view.cache.outlier_mask + page * view.mask_words, first, count, chunks,
                      scratch);
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count * chunks; i += blockDim.x) {
    const int t = i / chunks, c = i - t * chunks;
    float out[4];
    if (outliers && (scratch->mask[i >> 5] >> (i & 31) & 1)) {
      const uint32_t below = scratch->mask[i >> 5] & ((1u << (i & 31)) - 1);
      const int slot = scratch->before[i >> 5] + __popc(below);
      const uint16_t* value =
          view.cache.outlier_value +
          (page * role.outlier_capacity + min(slot, role.outlier_capacity - 1)) * 4;
      for (int k = 0; k < 4; ++k) out[k] = FloatFromHalf(value[k]);
    } else {
      const uint32_t code = WithinCodebook(layout, UnpackCode(layout, c, words + t * layout.words),
                                           12u * role.secondaries - 1);
      const float scale = FloatFromHalf(ReadScale(role.gain, view.cache.scales, row + t));
      if (kExact) {
        DecodeChunk(layout, code, scale, secondaries, view.levels, out);
      } else {
        const uint32_t index = code & ((1u << layout.index_bits) - 1);
        const uint32_t level = code >> layout.index_bits & ((1u << layout.radius_bits) - 1);
        const float size = Mul(view.levels[level], scale);
        const float radius = code >> (layout.index_bits + layout.radius_bits) ? -size : size;
        const float4 q = reinterpret_cast<const float4*>(secondaries)[index / 12];
        CodewordInFloat(static_cast<int>(index % 12), q, out);
        for (int k = 0; k < 4; ++k) out[k] = Mul(out[k], radius);
      }
    }
    if (mean) {
      for (int k = 0; k < 4; ++k) out[k] = Add(out[k], FloatFromHalf(mean[4 * c + k]));
    }
    *reinterpret_cast<float4*>(tile + t * stride + 4 * c) =
        make_float4(out[0], out[1], out[2], out[3]);
  }
}

}  // namespace cuda
}  // namespace hqmq
