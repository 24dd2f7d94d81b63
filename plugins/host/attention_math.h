// Small dense kernels of attention: dot products, weighted sums of rows, exp, row conversions.
//
// Every element of a result is added up in one order, whatever the tile it falls in, so that the
// rows which happen to share a block never change a row's bits.
#pragma once

#include "codec/simd.h"
#include "hqmq_host.h"

namespace hqmq {
inline namespace HQMQ_ISA {

using Vector = Lanes<F32x8>;

HQMQ_HD float SumOfLanes(F32x8 x) {
  float lane[8];
  Vector::Store(x, lane);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

// Sums of eight vectors, each in the order of SumOfLanes.
HQMQ_HD F32x8 SumsOfLanes(const F32x8 x[8]) {
#ifdef HQMQ_X86_V3
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0].v, x[1].v), _mm256_hadd_ps(x[2].v, x[3].v));
  const __m256 high =
      _mm256_hadd_ps(_mm256_hadd_ps(x[4].v, x[5].v), _mm256_hadd_ps(x[6].v, x[7].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                        _mm256_permute2f128_ps(low, high, 0x31))};
#else
  F32x8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = SumOfLanes(x[i]);
  return out;
#endif
}

// e^x for x up to 88; 0 below -87; NaN stays NaN. Relative error below 2e-7 (Cephes' polynomial).
HQMQ_HD F32x8 Exp(F32x8 x) {
  x = Min(Vector::Set(88.0f), x);
  const F32x8 n = Round(Mul(x, Vector::Set(1.44269504f)));
  F32x8 f = Fma(n, Vector::Set(-0.693359375f), x);
  f = Fma(n, Vector::Set(2.12194440e-4f), f);
  F32x8 y = Vector::Set(1.9875691500e-4f);
  y = Fma(y, f, Vector::Set(1.3981999507e-3f));
  y = Fma(y, f, Vector::Set(8.3334519073e-3f));
  y = Fma(y, f, Vector::Set(4.1665795894e-2f));
  y = Fma(y, f, Vector::Set(1.6666665459e-1f));
  y = Fma(y, f, Vector::Set(5.0000001201e-1f));
  y = Add(Fma(y, Mul(f, f), f), Vector::Set(1.0f));
  const F32x8 bounded = Max(n, Vector::Set(-126.0f));
  const Mask8::Vector power = __builtin_convertvector(bounded.v, Mask8::Vector);
  const F32x8 scale = {BitCast<F32x8::Vector>((power + 127) << 23)};
  return Select(Less(x, Vector::Set(-87.0f)), Vector::Set(0.0f), Mul(y, scale));
}

HQMQ_HD float Exp(float x) {
  float lane[8];
  Vector::Store(Exp(Vector::Set(x)), lane);
  return lane[0];
}

// cap * tanh(x / cap)
HQMQ_HD F32x8 SoftCap(F32x8 x, float cap) {
  const F32x8 one = Vector::Set(1.0f), two = Vector::Set(2.0f);
  const F32x8 e = Exp(Mul(x, Vector::Set(2.0f / cap)));
  return Mul(Vector::Set(cap), Sub(one, Div(two, Add(e, one))));
}

template <int kRows, int kTokens>
HQMQ_HD void DotTile(const float* q, const float* k, int dim, float* score, int score_stride) {
  F32x8 sum[kRows * kTokens];
#pragma GCC unroll 8
  for (int i = 0; i < kRows * kTokens; ++i) sum[i] = Vector::Set(0.0f);
  for (int d = 0; d < dim; d += 8) {
    F32x8 key[kTokens];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) key[t] = Vector::Load(k + t * dim + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32x8 query = Vector::Load(q + r * dim + d);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        sum[r * kTokens + t] = Fma(query, key[t], sum[r * kTokens + t]);
    }
  }
  if constexpr (kRows * kTokens == 8) {
    float out[8];
    Vector::Store(SumsOfLanes(sum), out);
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) score[r * score_stride + t] = out[r * kTokens + t];
    }
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t)
        score[r * score_stride + t] = SumOfLanes(sum[r * kTokens + t]);
    }
  }
}

template <int kRows, int kTokens>
HQMQ_HD void DotRows(const float* q, const float* k, int tokens, int dim, float* score,
                     int score_stride) {
  int t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    DotTile<kRows, kTokens>(q, k + t * dim, dim, score + t, score_stride);
  for (; t < tokens; ++t) DotTile<kRows, 1>(q, k + t * dim, dim, score + t, score_stride);
}

// score[r][t] = q[r]·k[t]; rows of q and k are `dim` floats (a multiple of 8).
inline void Dots(const float* q, int rows, const float* k, int tokens, int dim, float* score,
                 int score_stride) {
  int r = 0;
  for (; r + 4 <= rows; r += 4)
    DotRows<4, 2>(q + r * dim, k, tokens, dim, score + r * score_stride, score_stride);
  for (; r + 2 <= rows; r += 2)
    DotRows<2, 4>(q + r * dim, k, tokens, dim, score + r * score_stride, score_stride);
  for (; r < rows; ++r)
    DotRows<1, 8>(q + r * dim, k, tokens, dim, score + r * score_stride, score_stride);
}

template <int kRows, int kVectors>
HQMQ_HD void SumTile(const float* weight, int weight_stride, const float* v, int tokens, int dim,
                     float* out) {
  F32x8 sum[kRows * kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[r * kVectors + i] = Vector::Load(out + r * dim + 8 * i);
  }
  for (int t = 0; t < tokens; ++t) {
    F32x8 value[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) value[i] = Vector::Load(v + t * dim + 8 * i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32x8 w = Vector::Set(weight[r * weight_stride + t]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i)
        sum[r * kVectors + i] = Fma(w, value[i], sum[r * kVectors + i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) Vector::Store(sum[r * kVectors + i], out + r * dim + 8 * i);
  }
}

template <int kRows, int kVectors>
HQMQ_HD void SumRows(const float* weight, int weight_stride, const float* v, int tokens, int dim,
                     float* out) {
  int d = 0;
  for (; d + 8 * kVectors <= dim; d += 8 * kVectors) {
    SumTile<kRows, kVectors>(weight, weight_stride, v + d, tokens, dim, out + d);
  }
  for (; d < dim; d += 8) SumTile<kRows, 1>(weight, weight_stride, v + d, tokens, dim, out + d);
}

// out[r] += Σ_t weight[r][t] * v[t]; rows of v and out are `dim` floats (a multiple of 8).
inline void WeightedSums(const float* weight, int weight_stride, int rows, const float* v,
                         int tokens, int dim, float* out) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    SumRows<4, 2>(weight + r * weight_stride, weight_stride, v, tokens, dim, out + r * dim);
  }
  for (; r + 2 <= rows; r += 2) {
    SumRows<2, 4>(weight + r * weight_stride, weight_stride, v, tokens, dim, out + r * dim);
  }
  for (; r < rows; ++r)
    SumRows<1, 8>(weight + r * weight_stride, weight_stride, v, tokens, dim, out + r * dim);
}

// `count` elements of an hqmq_dtype → float32.
HQMQ_HD void LoadRow(const void* from, int32_t dtype, int count, float* to) {
  if (dtype == HQMQ_FLOAT32) {
    memcpy(to, from, sizeof(float) * count);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from);
  int i = 0;
  if (dtype == HQMQ_FLOAT16) {
    for (; i + 8 <= count; i += 8) Vector::Store(Vector::LoadHalf(bits + i), to + i);
    for (; i < count; ++i) to[i] = FloatFromHalf(bits[i]);
  } else {
    for (; i < count; ++i) to[i] = FloatFromBf16(bits[i]);
  }
}

// Values as fp16 holds them.
HQMQ_HD void RoundToHalf(float* x, int count) {
  uint16_t bits[8];
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    Vector::StoreHalf(Vector::Load(x + i), bits);
    Vector::Store(Vector::LoadHalf(bits), x + i);
  }
  for (; i < count; ++i) x[i] = FloatFromHalf(HalfFromFloat(x[i]));
}

// float32 → `count` elements of an hqmq_dtype, rounded to nearest even.
HQMQ_HD void StoreRow(const float* from, int count, int32_t dtype, void* to) {
  if (dtype == HQMQ_FLOAT32) {
    memcpy(to, from, sizeof(float) * count);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(to);
  int i = 0;
  if (dtype == HQMQ_FLOAT16) {
    for (; i + 8 <= count; i += 8) Vector::StoreHalf(Vector::Load(from + i), bits + i);
    for (; i < count; ++i) bits[i] = HalfFromFloat(from[i]);
  } else {
    for (; i < count; ++i) bits[i] = Bf16FromFloat(from[i]);
  }
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
