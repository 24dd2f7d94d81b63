// Orthonormal Walsh-Hadamard transform in Sylvester order; its own inverse.
#pragma once

#include <cmath>

#include "numeric.h"

namespace hqmq {
inline namespace HQMQ_ISA {

// 1/√size rounded to float. The host computes it; pass it to device code.
inline float HadamardScale(int size) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
}

// In place over `size` (a power of two) lane vectors: strides 1, 2, 4, …, then times scale =
// 1/√size.
template <class F>
HQMQ_HD void Hadamard(F* x, int size, float scale) {
  for (int stride = 1; stride < size; stride *= 2) {
    for (int block = 0; block < size; block += 2 * stride) {
      for (int i = block; i < block + stride; ++i) {
        const F low = x[i], high = x[i + stride];
        x[i] = Add(low, high);
        x[i + stride] = Sub(low, high);
      }
    }
  }
  const F factor = Lanes<F>::Set(scale);
  for (int i = 0; i < size; ++i) x[i] = Mul(x[i], factor);
}

// Sum by halves: the upper half (of the next power of two) is added to the lower, again and again.
// Overwrites x.
template <class F>
HQMQ_HD F TreeSum(F* x, int count) {
  int half = 1;
  while (2 * half < count) half *= 2;
  for (; count > 1; count = half, half /= 2) {
    for (int i = 0; i + half < count; ++i) x[i] = Add(x[i], x[i + half]);
  }
  return x[0];
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
