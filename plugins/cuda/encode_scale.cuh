// The short scale of a token with gain RMS, of three the one that leaves the least error
// (docs/format.md, arithmetic, steps 8 and 9), and the levels that go with it.
#pragma once

#include <cstdint>

#include "codec/encode.h"
#include "views.cuh"

namespace hqmq {
namespace cuda {

__device__ __forceinline__ float FloatOfShortScale(uint32_t scale) {
  return FloatFromHalf(static_cast<uint16_t>(scale << 7));
}

// Stores the scale of token t of a page: fp16, or a short one. finite: else it becomes NaN.
__device__ __forceinline__ void StoreScale(Gain gain, int32_t* scales, int t, uint32_t scale,
                                           bool finite) {
  if (gain == Gain::kRms) {
    reinterpret_cast<uint8_t*>(scales)[t] = finite ? static_cast<uint8_t>(scale) : kShortNan;
  } else {
    reinterpret_cast<uint16_t*>(scales)[t] = finite ? static_cast<uint16_t>(scale) : kHalfNan;
  }
}

// How many of the middles, which ascend as levels do, are below `ratio`: ChunkLevel of encode.h for
// gain RMS, one bit of the level after the other. middles: [2^r - 1].
__device__ __forceinline__ int LevelOf(int radius_bits, float ratio, const float* middles) {
  int level = 0;
#pragma unroll
  for (int bit = 7; bit >= 0; --bit) {
    if (bit >= radius_bits) continue;
    const int half = 1 << bit;
    level += middles[level + half - 1] < ratio ? half : 0;
  }
  return level;
}

// The scale of a token, 0 if `nearest` is (a token of zeros, or one that is not finite), and the
// levels of the kCount chunks that this lane has of it; projection: theirs. sum(errors): of all of
// the token's chunks, in the order of a tree sum. Every lane of the warp calls it.
template <int kCount, class Sum>
__device__ __forceinline__ uint32_t ChooseShortScale(int radius_bits, uint32_t nearest,
                                                     const float (&projection)[kCount],
                                                     const float* middles, const float* levels,
                                                     const Sum& sum, int (&level)[kCount]) {
  uint32_t chosen = 0;
  float least = BitCast<float>(0x7F800000u);
#pragma unroll
  for (int i = 0; i < kCount; ++i) level[i] = 0;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const uint32_t scale = n == 0 ? nearest : n == 1 ? nearest - 1 : nearest + 1;
    const float step = FloatOfShortScale(scale);
    float error[kCount];
    int own[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      own[i] = LevelOf(radius_bits, Div(projection[i], step), middles);
      error[i] = RadiusError(Mul(levels[own[i]], step), projection[i]);
    }
    const float all = sum(error);
    const bool better =
        nearest > 0 && scale - 1 < kLargestShortScale && all < least;  // 1 … kLargestShortScale
    least = better ? all : least;
    chosen = better ? scale : chosen;
#pragma unroll
    for (int i = 0; i < kCount; ++i) level[i] = better ? own[i] : level[i];
  }
  return chosen;
}

}  // namespace cuda
}  // namespace hqmq
