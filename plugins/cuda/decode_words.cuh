// What the codecs of the decode kernel share: words as fp16, and their products with radii.
#pragma once

#include "decode_job.h"
#include "decode_tile.cuh"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {

// Calls store(i, word i of head h) for the kWords words of a table, by all threads. Codes beyond
// the codebook get its last word.
template <int kWords, class Store>
__device__ __forceinline__ void FillWords(const RoleView& view, int h, const Store& store) {
  const float4* secondaries = reinterpret_cast<const float4*>(view.secondaries) +
                              static_cast<int64_t>(h) * view.role.secondaries;
  const int last = 12 * view.role.secondaries - 1;
#pragma unroll 4
  for (int i = threadIdx.x; i < kWords; i += kDecodeThreads) {
    const int word = i < last ? i : last;
    float out[4];
    CodewordInFloat(word % 12, secondaries[word / 12], out);
    store(i, make_uint2(ptx::PackHalf(out[0], out[1]), ptx::PackHalf(out[2], out[3])));
  }
}

// A word times the lower or the upper half of `radii`.
__device__ __forceinline__ uint2 TimesRadius(uint2 word, uint32_t radii, bool upper) {
  return upper ? make_uint2(ptx::MultiplyHigh(word.x, radii), ptx::MultiplyHigh(word.y, radii))
               : make_uint2(ptx::MultiplyLow(word.x, radii), ptx::MultiplyLow(word.y, radii));
}

}  // namespace cuda
}  // namespace hqmq
