// Eight floats in one host vector: AVX2, FMA and F16C where compiled for them, plain vector code
// elsewhere. Each lane rounds as numeric.h does for one float.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace hqmq {
inline namespace HQMQ_ISA {

struct F32x8 {
  typedef float Vector __attribute__((vector_size(32)));
  Vector v;
};

struct Mask8 {
  typedef int32_t Vector __attribute__((vector_size(32)));
  Vector v;  // 0 or -1 in each lane
};

HQMQ_HD F32x8 Add(F32x8 a, F32x8 b) { return {a.v + b.v}; }
HQMQ_HD F32x8 Sub(F32x8 a, F32x8 b) { return {a.v - b.v}; }
HQMQ_HD F32x8 Mul(F32x8 a, F32x8 b) { return {a.v * b.v}; }
HQMQ_HD F32x8 Div(F32x8 a, F32x8 b) { return {a.v / b.v}; }
HQMQ_HD F32x8 Neg(F32x8 a) { return {-a.v}; }

HQMQ_HD F32x8 Fma(F32x8 a, F32x8 b, F32x8 c) {
#ifdef HQMQ_X86_V3
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
#else
  F32x8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return out;
#endif
}

HQMQ_HD F32x8 Sqrt(F32x8 a) {
#ifdef HQMQ_X86_V3
  return {_mm256_sqrt_ps(a.v)};
#else
  F32x8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = Sqrt(static_cast<float>(a.v[i]));
  return out;
#endif
}

HQMQ_HD F32x8 Round(F32x8 a) {
#ifdef HQMQ_X86_V3
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  F32x8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = Round(static_cast<float>(a.v[i]));
  return out;
#endif
}

HQMQ_HD F32x8 Abs(F32x8 a) {
  const Mask8::Vector bits = BitCast<Mask8::Vector>(a.v) & 0x7FFFFFFF;
  return {BitCast<F32x8::Vector>(bits)};
}

HQMQ_HD F32x8 Max(F32x8 a, F32x8 b) {
#ifdef HQMQ_X86_V3
  return {_mm256_max_ps(a.v, b.v)};  // a > b ? a : b
#else
  return {a.v > b.v ? a.v : b.v};
#endif
}

HQMQ_HD F32x8 Min(F32x8 a, F32x8 b) {
#ifdef HQMQ_X86_V3
  return {_mm256_min_ps(a.v, b.v)};  // a < b ? a : b
#else
  return {a.v < b.v ? a.v : b.v};
#endif
}

HQMQ_HD Mask8 Less(F32x8 a, F32x8 b) { return {a.v < b.v}; }
HQMQ_HD Mask8 LessEqual(F32x8 a, F32x8 b) { return {a.v <= b.v}; }
HQMQ_HD Mask8 And(Mask8 a, Mask8 b) { return {a.v & b.v}; }
HQMQ_HD Mask8 Xor(Mask8 a, Mask8 b) { return {a.v ^ b.v}; }

HQMQ_HD F32x8 Select(Mask8 mask, F32x8 a, F32x8 b) {
#ifdef HQMQ_X86_V3
  return {_mm256_blendv_ps(b.v, a.v, BitCast<F32x8::Vector>(mask.v))};
#else
  const Mask8::Vector x = BitCast<Mask8::Vector>(a.v), y = BitCast<Mask8::Vector>(b.v);
  const Mask8::Vector bits = (x & mask.v) | (y & ~mask.v);
  return {BitCast<F32x8::Vector>(bits)};
#endif
}

template <>
struct Lanes<F32x8> {
  static constexpr int kCount = 8;
  using Mask = Mask8;

  static HQMQ_HD F32x8 Set(float x) { return {F32x8::Vector{x, x, x, x, x, x, x, x}}; }

  static HQMQ_HD F32x8 Load(const float* from) {
    F32x8 out;
    memcpy(&out.v, from, sizeof(out.v));
    return out;
  }

  static HQMQ_HD void Store(F32x8 x, float* to) { memcpy(to, &x.v, sizeof(x.v)); }

  static HQMQ_HD F32x8 Gather(const float* base, F32x8 which, int stride) {
#ifdef HQMQ_X86_V3
    const __m256i at = _mm256_mullo_epi32(_mm256_cvttps_epi32(which.v), _mm256_set1_epi32(stride));
    return {_mm256_i32gather_ps(base, at, sizeof(float))};
#else
    F32x8 out;
    for (int i = 0; i < 8; ++i) out.v[i] = base[static_cast<int>(which.v[i]) * stride];
    return out;
#endif
  }

  static HQMQ_HD F32x8 LoadHalf(const uint16_t* from) {
#ifdef HQMQ_X86_V3
    __m128i bits;
    memcpy(&bits, from, sizeof(bits));
    return {_mm256_cvtph_ps(bits)};
#else
    F32x8 out;
    for (int i = 0; i < 8; ++i) out.v[i] = FloatFromHalf(from[i]);
    return out;
#endif
  }

  static HQMQ_HD void StoreHalf(F32x8 x, uint16_t* to) {
#ifdef HQMQ_X86_V3
    const __m128i bits = _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &bits, sizeof(bits));
#else
    for (int i = 0; i < 8; ++i) to[i] = HalfFromFloat(x.v[i]);
#endif
  }

  static HQMQ_HD void StoreInt(F32x8 x, int32_t* to) {
#ifdef HQMQ_X86_V3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvttps_epi32(x.v));
#else
    for (int i = 0; i < 8; ++i) to[i] = static_cast<int32_t>(x.v[i]);
#endif
  }
};

}  // namespace HQMQ_ISA
}  // namespace hqmq
