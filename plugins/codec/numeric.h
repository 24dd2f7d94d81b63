// Scalar arithmetic of the codec: every operation rounds once, on host and device alike, and is
// never contracted.
//
// The wrappers (Add, Mul, Fma, …) have overloads for float here and for eight floats in simd.h, so
// that a template over the lane type runs the same lines on a GPU thread, a scalar and a vector.
// Host code needs -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#elif defined(HQMQ_X86_V3)
#include <immintrin.h>
#endif

namespace hqmq {
inline namespace HQMQ_ISA {

template <class To, class From>
HQMQ_HD To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "BitCast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Bits of the fp16 value nearest to a float (ties to even), from and to bit patterns, in plain
// integers.
constexpr uint16_t HalfBitsFromFloatBits(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) {  // NaN stays a quiet NaN
    return static_cast<uint16_t>(sign | 0x7E00u | ((size >> 13) & 0x3FFu));
  }
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds to infinity
  if (size < 0x33000001u) return static_cast<uint16_t>(sign);             // at most half of 2^-24
  uint32_t mantissa = 0, shift = 13;
  if (size < 0x38800000u) {  // subnormal: mantissa with its implicit bit, in units of 2^-24
    mantissa = (size & 0x7FFFFFu) | 0x800000u;
    shift = 126 - (size >> 23);
  } else {
    mantissa = size - 0x38000000u;  // exponent bias 127 to 15
  }
  const uint32_t rest = mantissa & ((1u << shift) - 1), tie = 1u << (shift - 1);
  uint32_t result = mantissa >> shift;
  result += rest > tie || (rest == tie && (result & 1));
  return static_cast<uint16_t>(sign | result);
}

constexpr uint32_t FloatBitsFromHalfBits(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t exponent = (half >> 10) & 0x1Fu, mantissa = half & 0x3FFu;
  if (exponent == 31) {
    return sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0);
  }
  if (exponent == 0) {
    if (mantissa == 0) return sign;
    exponent = 113;
    while (!(mantissa & 0x400u)) {
      mantissa <<= 1;
      --exponent;
    }
    return sign | (exponent << 23) | ((mantissa & 0x3FFu) << 13);
  }
  return sign | ((exponent + 112) << 23) | (mantissa << 13);
}

HQMQ_HD constexpr uint16_t Bf16BitsFromFloatBits(uint32_t bits) {
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

HQMQ_HD uint16_t HalfFromFloat(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#elif defined(HQMQ_X86_V3) && !defined(__CUDACC__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  return HalfBitsFromFloatBits(BitCast<uint32_t>(x));
#endif
}

HQMQ_HD float FloatFromHalf(uint16_t half) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(half));
#elif defined(HQMQ_X86_V3) && !defined(__CUDACC__)
  return _cvtsh_ss(half);
#else
  return BitCast<float>(FloatBitsFromHalfBits(half));
#endif
}

HQMQ_HD uint16_t Bf16FromFloat(float x) { return Bf16BitsFromFloatBits(BitCast<uint32_t>(x)); }

HQMQ_HD float FloatFromBf16(uint16_t bits) {
  return BitCast<float>(static_cast<uint32_t>(bits) << 16);
}

constexpr float kHalfMax = 65504.0f;
constexpr uint16_t kHalfNan = 0x7E00;

#if defined(__CUDA_ARCH__)
HQMQ_HD float Add(float a, float b) { return __fadd_rn(a, b); }
HQMQ_HD float Sub(float a, float b) { return __fsub_rn(a, b); }
HQMQ_HD float Mul(float a, float b) { return __fmul_rn(a, b); }
HQMQ_HD float Div(float a, float b) { return __fdiv_rn(a, b); }
HQMQ_HD float Sqrt(float a) { return __fsqrt_rn(a); }
HQMQ_HD float Fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
HQMQ_HD float Round(float a) { return rintf(a); }
#else
HQMQ_HD float Add(float a, float b) { return a + b; }
HQMQ_HD float Sub(float a, float b) { return a - b; }
HQMQ_HD float Mul(float a, float b) { return a * b; }
HQMQ_HD float Div(float a, float b) { return a / b; }
HQMQ_HD float Sqrt(float a) { return std::sqrt(a); }
HQMQ_HD float Fma(float a, float b, float c) { return std::fma(a, b, c); }
HQMQ_HD float Round(float a) { return std::rint(a); }  // ties to even
#endif

HQMQ_HD float Neg(float a) { return -a; }
HQMQ_HD float Abs(float a) { return BitCast<float>(BitCast<uint32_t>(a) & 0x7FFFFFFFu); }
HQMQ_HD float Max(float a, float b) { return a > b ? a : b; }
HQMQ_HD float Min(float a, float b) { return a < b ? a : b; }

// Comparisons give a mask: bool for float.
HQMQ_HD bool Less(float a, float b) { return a < b; }
HQMQ_HD bool LessEqual(float a, float b) { return a <= b; }
HQMQ_HD bool And(bool a, bool b) { return a && b; }
HQMQ_HD bool Xor(bool a, bool b) { return a != b; }
HQMQ_HD float Select(bool mask, float a, float b) { return mask ? a : b; }

// Lane types: how many lanes, what a comparison gives, and moves between lanes and memory.
template <class F>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = 1;
  using Mask = bool;
  static HQMQ_HD float Set(float x) { return x; }
  // lane i takes base[which[i] * stride]
  static HQMQ_HD float Gather(const float* base, float which, int stride) {
    return base[static_cast<int>(which) * stride];
  }
  static HQMQ_HD float LoadHalf(const uint16_t* from) { return FloatFromHalf(*from); }
  static HQMQ_HD void StoreHalf(float x, uint16_t* to) { *to = HalfFromFloat(x); }
  static HQMQ_HD void StoreInt(float x, int32_t* to) { *to = static_cast<int32_t>(x); }
};

}  // namespace HQMQ_ISA
}  // namespace hqmq
