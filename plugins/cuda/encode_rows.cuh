// Rows of a page in registers: loading, rotation, scales and packing. A group of lanes has a row,
// each lane one chunk of it or two (c and c + 32).
#pragma once

#include "encode_job.h"
#include "encode_scale.cuh"
#include "tails.cuh"

namespace hqmq {
namespace cuda {

template <int D>
struct RowShape {
  static constexpr int kChunks = D / 4;
  static constexpr int kLanes = kChunks < kWarp ? kChunks : kWarp;
  static constexpr int kPer = kChunks / kLanes;            // chunks of a row that a lane has
  static constexpr int kGroups = kEncodeThreads / kLanes;  // rows that a block has in hand
  static constexpr int kBatch = 8 / kPer;                  // rows of a group loaded at once
};

// Where the rows of a page come from: fp16, or bf16 bits that Converted turns to fp16. Aligned as
// HasVectors asks.
struct PageRows {
  const RoleView& view;
  const uint16_t* tail;  // of the lane, its first P rows
  int64_t start;         // of the lane's new tokens in x
  int first, past;       // tokens: the page's first one, those held before the call

  // kWide: x is float32.
  template <bool kWide>
  __device__ __forceinline__ uint2 Load(int row, int element) const {
    const int t = first + row;
    const bool fresh = t >= past;
    const int64_t at = start + (t - past) * view.x.token + element;
    if (kWide && fresh) return LoadHalves(view.x, at, true);
    const uint16_t* base = fresh ? static_cast<const uint16_t*>(view.x.data) : tail;
    const int held = (t & (view.role.page_size - 1)) * view.role.head_dim + element;
    return *reinterpret_cast<const uint2*>(base + (fresh ? at : held));
  }

  // Of rows of a call in bf16.
  __device__ __forceinline__ uint2 Converted(int row, uint2 loaded) const {
    return first + row >= past ? HalvesFromBf16(loaded) : loaded;
  }
};

__device__ __forceinline__ void Unpack(uint2 halves, float x[4]) {
  x[0] = FloatFromHalf(static_cast<uint16_t>(halves.x));
  x[1] = FloatFromHalf(static_cast<uint16_t>(halves.x >> 16));
  x[2] = FloatFromHalf(static_cast<uint16_t>(halves.y));
  x[3] = FloatFromHalf(static_cast<uint16_t>(halves.y >> 16));
}

// Hadamard of codec/hadamard.h over a row. A product with 1 or -1 is exact, so that fma rounds as
// its sum or difference does.
template <int D>
__device__ __forceinline__ void RotateRow(float (&x)[RowShape<D>::kPer][4], float scale, int lane) {
  using Shape = RowShape<D>;
#pragma unroll
  for (int j = 0; j < Shape::kPer; ++j) {
    const float a = Add(x[j][0], x[j][1]), b = Sub(x[j][0], x[j][1]);
    const float c = Add(x[j][2], x[j][3]), d = Sub(x[j][2], x[j][3]);
    x[j][0] = Add(a, c);
    x[j][1] = Add(b, d);
    x[j][2] = Sub(a, c);
    x[j][3] = Sub(b, d);
#pragma unroll
    for (int offset = 1; offset < Shape::kLanes; offset *= 2) {
      const float sign = lane & offset ? -1.0f : 1.0f;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        x[j][k] = Fma(x[j][k], sign, __shfl_xor_sync(kAllLanes, x[j][k], offset));
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (Shape::kPer == 2) {
      const float low = x[0][k], high = x[1][k];
      x[0][k] = Add(low, high);
      x[1][k] = Sub(low, high);
    }
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) x[j][k] = Mul(x[j][k], scale);
  }
}

// Tree sum over a row; x: of the lane's chunks.
template <int D>
__device__ __forceinline__ float RowSum(const float (&x)[RowShape<D>::kPer]) {
  float sum = x[0];
  if constexpr (RowShape<D>::kPer == 2) sum = Add(sum, x[1]);
#pragma unroll
  for (int offset = RowShape<D>::kLanes / 2; offset > 0; offset /= 2)
    sum = Add(sum, __shfl_xor_sync(kAllLanes, sum, offset));
  return sum;
}

// TokenScale of encode.h for a row without outliers, as fp16. norm2: of the lane's chunks.
template <int D>
__device__ __forceinline__ uint16_t RowScale(const RoleParams& role,
                                             const float (&norm2)[RowShape<D>::kPer]) {
  using Shape = RowShape<D>;
  float x = norm2[0];
  if (role.gain == Gain::kMax) {
    if constexpr (Shape::kPer == 2) x = fmaxf(x, norm2[1]);
#pragma unroll
    for (int offset = Shape::kLanes / 2; offset > 0; offset /= 2)
      x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
    x = Div(Sqrt(x), static_cast<float>((1 << role.radius_bits) - 1));
  } else {
    x = Sqrt(Mul(RowSum<D>(norm2), 1.0f / D));  // a power of two: exactly the quotient
  }
  return HalfFromFloat(Min(x, kHalfMax));
}

// Packs the codes of chunk `chunk` of each lane into the words of its row: the planes of
// codec/layout.h, which begin with a word in rows of 16 chunks and more.
template <int D>
__device__ __forceinline__ void StoreCode(int code_bits, int chunk, uint32_t code, int32_t* words) {
#pragma unroll
  for (int width = 16; width > 0; width /= 2) {
    if (!(code_bits & width)) continue;
    const int shift = code_bits & -2 * width, bit = chunk * width;
    uint32_t word = (code >> shift & ((1u << width) - 1)) << (bit & 31);
#pragma unroll
    for (int offset = 1; offset < RowShape<D>::kLanes && offset * width < 32; offset *= 2)
      word |= __shfl_xor_sync(kAllLanes, word, offset);
    if (!(bit & 31)) words[(D / 4 * shift + bit) >> 5] = static_cast<int32_t>(word);
  }
}

}  // namespace cuda
}  // namespace hqmq
