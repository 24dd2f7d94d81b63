// The short scale of a token with gain RMS, of three the one that leaves the least error
// (docs/format.md, arithmetic, steps 8 and 9), and the levels that go with it.
#pragma once

#include <cstdint>

#include "codec/encode.h"
#include "views.cuh"

namespace hqmq {
namespace cuda {

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

// ChooseShortScale of encode.h by the lanes that have a token: its scale, 0 if `nearest` is (a
// token of zeros, or one that is not finite), and the levels of the kCount chunks that this lane
// has of it; projection: theirs. sum(errors): of all of the token's chunks, in the order of a tree
// sum. Every lane of the warp calls it.
template <int kCount, class Sum>
__device__ __forceinline__ uint32_t ChooseByLanes(int radius_bits, uint32_t nearest,
                                                  const float (&projection)[kCount],
                                                  const float* middles, const float* levels,
                                                  const Sum& sum, int (&level)[kCount]) {
  uint32_t chosen = 0;
  float least = BitCast<float>(0x7F800000u);
#pragma unroll
  for (int i = 0; i < kCount; ++i) level[i] = 0;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const uint32_t scale = ShortCandidate(nearest, n);
    const float step = FloatFromHalf(static_cast<uint16_t>(scale << 7));
    float error[kCount];
    int own[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      own[i] = LevelOf(radius_bits, Div(projection[i], step), middles);
      error[i] = RadiusError(Mul(levels[own[i]], step), projection[i]);
    }
    const float all = sum(error);
    const bool better = scale > 0 && all < least;
    least = better ? all : least;
    chosen = better ? scale : chosen;
#pragma unroll
    for (int i = 0; i < kCount; ++i) level[i] = better ? own[i] : level[i];
  }
  return chosen;
}

}  // namespace cuda
}  // namespace hqmq
