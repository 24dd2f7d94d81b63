// Online softmax: states of parts of the keys and how they combine. Both ways of running (parts in
// parallel and a combining kernel; one block that walks through them) use these lines in the same
// order and so give the same bits.
#pragma once

#include "views.cuh"

namespace hqmq {
namespace cuda {

constexpr int kPairs = kMaxHeadDim / (2 * kWarp);  // most pairs of elements a lane holds of a row

__device__ __forceinline__ float MinusInfinity() { return BitCast<float>(0xFF800000u); }

__device__ __forceinline__ float Exp(float x) { return exp2f(Mul(x, 1.44269504f)); }

// A maximum to subtract: that of no keys, -infinity, would give NaN.
__device__ __forceinline__ float Finite(float maximum) {
  return maximum == MinusInfinity() ? 0.0f : maximum;
}

struct Softmax {
  float maximum, sum;
};

// What the outputs of two states are multiplied by when `from` joins `into`.
struct Factors {
  float into, from;
};

__device__ __forceinline__ Factors Join(Softmax* into, const Softmax& from) {
  const float maximum = fmaxf(into->maximum, from.maximum), base = Finite(maximum);
  const Factors factors = {Exp(Sub(into->maximum, base)), Exp(Sub(from.maximum, base))};
  into->sum = Fma(into->sum, factors.into, Mul(from.sum, factors.from));
  into->maximum = maximum;
  return factors;
}

__device__ __forceinline__ float2 Joined(float2 into, float2 from, const Factors& factors) {
  return make_float2(Fma(into.x, factors.into, Mul(from.x, factors.from)),
                     Fma(into.y, factors.into, Mul(from.y, factors.from)));
}

// Writes a finished row of y by a warp. `row`: the joined outputs, in shared memory.
__device__ __forceinline__ void StoreOutput(const Rows& y, int64_t to, const float* row, int size,
                                            const Softmax& state, const float* sink, int lane) {
  Softmax total = state;
  float factor = 1.0f;
  if (sink) factor = Join(&total, {*sink, 1.0f}).into;
  for (int i = lane; i < size; i += kWarp)
    StoreFloat(y, to + i, Div(Mul(row[i], factor), total.sum));
}

// A row without a token (0), or whose token found no page (NaN).
__device__ __forceinline__ void StoreConstant(const Rows& y, int64_t to, int size, bool lost,
                                              int lane) {
  const float value = lost ? BitCast<float>(0x7FC00000u) : 0.0f;
  for (int i = lane; i < size; i += kWarp) StoreFloat(y, to + i, value);
}

}  // namespace cuda
}  // namespace hqmq
