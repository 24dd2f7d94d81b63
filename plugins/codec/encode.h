// Tokens and chunks to codes: squared norms, scale, level, code; and the choice of a page's Med3x
// outliers. Arithmetic of hqmq_trt/oracle/codec.py, bit for bit (docs/format.md).
#pragma once

#include <cstdint>

#include "hadamard.h"
#include "layout.h"
#include "numeric.h"
#include "search.h"

namespace hqmq {
inline namespace HQMQ_ISA {

constexpr float kOutlierFactorSquared = 9.0f;  // C² of Med3x
constexpr float kFloatMax = 3.402823466e38f;
constexpr float kInfinity = __builtin_huge_valf();
// Marks an outlier in an array of squared norms.
constexpr float kOutlierMark = -1.0f;

template <class F>
HQMQ_HD F SquaredNorm(const F x[4]) {
  return Add(Add(Mul(x[0], x[0]), Mul(x[1], x[1])), Add(Mul(x[2], x[2]), Mul(x[3], x[3])));
}

template <class F>
HQMQ_HD typename Lanes<F>::Mask IsFinite(F norm2) {
  return LessEqual(norm2, Lanes<F>::Set(kFloatMax));  // false for NaN
}

// Scale of a token before it is rounded to fp16. norm2: squared norms of its chunks, kOutlierMark
// for outliers; overwritten.
template <class F>
HQMQ_HD F TokenScale(Gain gain, int radius_bits, F* norm2, int chunks) {
  using L = Lanes<F>;
  const F zero = L::Set(0.0f), one = L::Set(1.0f);
  F raw;
  if (gain == Gain::kMax) {
    F largest = zero;
    for (int c = 0; c < chunks; ++c) largest = Max(largest, norm2[c]);
    raw = Div(Sqrt(largest), L::Set(static_cast<float>((1 << radius_bits) - 1)));
  } else {
    F kept = zero;
    for (int c = 0; c < chunks; ++c) {
      kept = Add(kept, Select(Less(norm2[c], zero), zero, one));
      norm2[c] = Max(norm2[c], zero);
    }
    const F elements = Mul(L::Set(4.0f), Max(kept, one));
    raw = Sqrt(Div(TreeSum(norm2, chunks), elements));
  }
  return Min(raw, L::Set(kHalfMax));
}

// Midpoint between levels i and i+1: the boundary of nearest-level rounding.
HQMQ_HD float LevelMiddle(const float* levels, int i) {
  return Mul(Add(levels[i + 1], levels[i]), 0.5f);
}

// Level of a chunk, an integer in F. scale: as stored. middles: [2^r - 1], for Gain::kRms.
template <class F>
HQMQ_HD F ChunkLevel(Gain gain, int radius_bits, F norm2, F projection, F scale,
                     const float* middles) {
  using L = Lanes<F>;
  const int top = (1 << radius_bits) - 1;
  if (gain == Gain::kMax) {
    return Min(Round(Div(Sqrt(norm2), scale)), L::Set(static_cast<float>(top)));
  }
  const F ratio = Div(projection, scale), zero = L::Set(0.0f), one = L::Set(1.0f);
  F level = zero;
  for (int i = 0; i < top; ++i)
    level = Add(level, Select(Less(L::Set(middles[i]), ratio), one, zero));
  return level;
}

// Squared error of a chunk coded with that radius (level times scale), minus its squared norm: by
// the sum over a token's chunks a short scale is chosen (docs/format.md, arithmetic, step 9).
template <class F>
HQMQ_HD F RadiusError(F radius, F projection) {
  return Mul(radius, Sub(radius, Add(projection, projection)));
}

// The i-th short scale to try for a token, i in 0…2: the nearest, the one below, the one above. 0:
// there is none.
HQMQ_HD uint32_t ShortCandidate(uint32_t nearest, int i) {
  if (nearest == 0) return 0;
  const uint32_t tried = i == 0 ? nearest : i == 1 ? nearest - 1 : nearest + 1;
  return tried <= kLargestShortScale ? tried : 0;
}

// What a token's chunks lose with that scale: the tree sum of RadiusError, 0 for outliers. norm2
// (of outliers below 0), projection: of its chunks; levels: [2^r]; errors: scratch, one for each
// chunk.
template <class F>
HQMQ_HD F ScaleError(int radius_bits, const F* norm2, const F* projection, int chunks, F scale,
                     const float* levels, const float* middles, F* errors) {
  using L = Lanes<F>;
  const F zero = L::Set(0.0f);
  for (int c = 0; c < chunks; ++c) {
    const F level = ChunkLevel(Gain::kRms, radius_bits, norm2[c], projection[c], scale, middles);
    const F radius = Mul(L::Gather(levels, level, 1), scale);
    errors[c] = Select(Less(norm2[c], zero), zero, RadiusError(radius, projection[c]));
  }
  return TreeSum(errors, chunks);
}

// Replaces the fp16 scales of one token a lane by the short scale, as fp16, that loses least
// (docs/format.md, arithmetic, step 9). Arguments as for ScaleError.
template <class F>
HQMQ_HD void ChooseShortScale(int radius_bits, const F* norm2, const F* projection, int chunks,
                              const float* levels, const float* middles, F* errors,
                              uint16_t* scales) {
  using L = Lanes<F>;
  uint16_t tried[L::kCount];
  F least = L::Set(kInfinity), best = L::Set(0.0f);
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < L::kCount; ++k) {
      tried[k] = static_cast<uint16_t>(ShortCandidate(ShortScale(scales[k]), i) << 7);
    }
    const F scale = L::LoadHalf(tried);
    const F error =
        ScaleError(radius_bits, norm2, projection, chunks, scale, levels, middles, errors);
    const auto better = And(Less(L::Set(0.0f), scale), Less(error, least));
    least = Select(better, error, least);
    best = Select(better, scale, best);
  }
  L::StoreHalf(best, scales);
}

// Stores bits of fp16 as token t's scale; the inverse of ReadScale. A short scale must be one as
// fp16, or kHalfNan.
HQMQ_HD void WriteScale(Gain gain, uint16_t half, int64_t t, int32_t* scales) {
  if (gain == Gain::kMax) {
    reinterpret_cast<uint16_t*>(scales)[t] = half;
  } else {
    reinterpret_cast<uint8_t*>(scales)[t] =
        half == kHalfNan ? kShortNan : static_cast<uint8_t>(half >> 7);
  }
}

// Code of a chunk as an integer in F (at most 23 bits, exact) from its nearest word. norm2 below 0
// marks an outlier: code 0. scale 0 (a token of zeros, or a non-finite one) gives code 0.
template <class F>
HQMQ_HD F CodeOf(const RoleParams& role, const Layout& layout, const Nearest<F>& near, F norm2,
                 F scale, const float* middles) {
  using L = Lanes<F>;
  const F zero = L::Set(0.0f);
  const F level = ChunkLevel(role.gain, role.radius_bits, norm2, near.projection, scale, middles);
  const F level_unit = L::Set(static_cast<float>(1 << layout.index_bits));
  const F sign_unit = L::Set(static_cast<float>(1 << (layout.index_bits + layout.radius_bits)));
  const F code = Add(near.word, Add(Mul(level, level_unit), Mul(near.negative, sign_unit)));
  return Select(And(Less(zero, scale), LessEqual(zero, norm2)), code, zero);
}

// CodeOf of chunk x.
template <class F>
HQMQ_HD F ChunkCode(const RoleParams& role, const Layout& layout, const F x[4], F norm2, F scale,
                    const float* secondaries, const float* middles) {
  const Nearest<F> near = NearestWord(x, secondaries, role.secondaries);
  return CodeOf(role, layout, near, norm2, scale, middles);
}

// k-th smallest (from 0) of n non-negative floats: their bits order as they do. norm2(i) gives the
// i-th.
template <class Norm>
HQMQ_HD float KthSmallest(Norm norm2, int n, int k) {
  uint32_t prefix = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    int counts[16] = {};
    const uint32_t above = shift == 28 ? 0 : ~0u << (shift + 4);
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = BitCast<uint32_t>(norm2(i));
      if ((bits & above) == (prefix & above)) ++counts[(bits >> shift) & 15];
    }
    uint32_t digit = 0;
    while (k >= counts[digit]) k -= counts[digit++];
    prefix |= digit << shift;
  }
  return BitCast<float>(prefix);
}

// Outliers of a page: norm > 3 x the lower median, compared as squares; with more than `capacity`,
// the largest win, equal ones by position. norm2(i): squared norm of chunk i = t*D/4 + c, n of
// them. Calls mark(i) for the chosen in ascending i; returns how many found no slot.
template <class Norm, class Mark>
HQMQ_HD int ChooseOutliers(Norm norm2, int n, int capacity, Mark mark) {
  const float bound = Mul(kOutlierFactorSquared, KthSmallest(norm2, n, (n - 1) / 2));
  int above = 0;
  for (int i = 0; i < n; ++i) above += Less(bound, norm2(i));
  float least = bound;  // the smallest norm that may win
  int ties = 0;         // how many of exactly that norm do
  if (above > capacity) {
    if (capacity == 0) return above;
    least = KthSmallest(norm2, n, n - capacity);
    int larger = 0;
    for (int i = 0; i < n; ++i) larger += Less(least, norm2(i));
    ties = capacity - larger;
  }
  for (int i = 0; i < n; ++i) {
    const float x = norm2(i);
    const bool tie = above > capacity && x == least && ties > 0;
    ties -= tie;
    if (Less(least, x) || tie) mark(i);
  }
  return above > capacity ? above - capacity : 0;
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
