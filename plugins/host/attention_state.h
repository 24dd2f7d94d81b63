// Online-softmax states of a block of rows, and row transforms.
#pragma once

#include "attention_math.h"
#include "codec/hadamard.h"

namespace hqmq {
inline namespace HQMQ_ISA {

constexpr float kInfinity = __builtin_inff();

HQMQ_HD int Least(int a, int b) { return a < b ? a : b; }

// Online softmax of `rows` rows: maximum and sum so far, outputs scaled accordingly.
struct State {
  float* maximum;
  float* sum;
  float* out;  // [rows, dim]
};

HQMQ_HD State StateAt(float* floats, int rows, int dim) {
  return {floats + int64_t{rows} * dim, floats + int64_t{rows} * (dim + 1), floats};
}

inline void Clear(const State& state, int rows, int dim) {
  for (int r = 0; r < rows; ++r) state.maximum[r] = -kInfinity, state.sum[r] = 0.0f;
  memset(state.out, 0, sizeof(float) * rows * dim);
}

inline void Scale(float* x, int count, float factor) {
  const F32x8 f = Vector::Set(factor);
  for (int i = 0; i < count; i += 8) Vector::Store(Mul(Vector::Load(x + i), f), x + i);
}

// A maximum to subtract: that of an empty row, -infinity, would give NaN.
HQMQ_HD float Finite(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

inline void Merge(const State& into, const State& from, int rows, int dim) {
  for (int r = 0; r < rows; ++r) {
    const float maximum = Max(into.maximum[r], from.maximum[r]);
    const float a = Exp(into.maximum[r] - Finite(maximum)),
                b = Exp(from.maximum[r] - Finite(maximum));
    into.maximum[r] = maximum;
    into.sum[r] = Fma(into.sum[r], a, from.sum[r] * b);
    const F32x8 old = Vector::Set(a), fresh = Vector::Set(b);
    for (int d = r * dim; d < (r + 1) * dim; d += 8) {
      const F32x8 x = Mul(Vector::Load(from.out + d), fresh);
      Vector::Store(Fma(Vector::Load(into.out + d), old, x), into.out + d);
    }
  }
}

// In place, one row of `size` floats.
inline void HadamardRow(float* x, int size) {
  if (size < 16) return Hadamard(x, size, HadamardScale(size));
  // Strides 1, 2 and 4 within vectors, the rest across them: the same sums as the plain transform.
  for (int i = 0; i < size; i += 8) {
    for (int stride = 1; stride < 8; stride *= 2) {
      for (int j = 0; j < 8; ++j) {
        if (j & stride) continue;
        const float low = x[i + j], high = x[i + j + stride];
        x[i + j] = low + high;
        x[i + j + stride] = low - high;
      }
    }
  }
  for (int stride = 8; stride < size; stride *= 2) {
    for (int block = 0; block < size; block += 2 * stride) {
      for (int i = block; i < block + stride; i += 8) {
        const F32x8 low = Vector::Load(x + i), high = Vector::Load(x + i + stride);
        Vector::Store(Add(low, high), x + i);
        Vector::Store(Sub(low, high), x + i + stride);
      }
    }
  }
  Scale(x, size, HadamardScale(size));
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
