// Nearest codeword of a chunk among 24*S, by S rotations and the closed form for the Hurwitz units.
//
// F is the lane type: float on a GPU thread or scalar host, F32x8 on a host vector (eight chunks
// side by side).
#pragma once

#include "numeric.h"

namespace hqmq {
inline namespace HQMQ_ISA {

// v = x * conj(q), q = (q0, q1, q2, q3), each component a product and a chain of three fmas.
template <class F>
HQMQ_HD void RotateByConjugate(const F x[4], F q0, F q1, F q2, F q3, F v[4]) {
  const F n1 = Neg(q1), n2 = Neg(q2), n3 = Neg(q3);
  v[0] = Fma(x[3], q3, Fma(x[2], q2, Fma(x[1], q1, Mul(x[0], q0))));
  v[1] = Fma(x[3], q2, Fma(x[2], n3, Fma(x[1], q0, Mul(x[0], n1))));
  v[2] = Fma(x[3], n1, Fma(x[2], q0, Fma(x[1], q3, Mul(x[0], n2))));
  v[3] = Fma(x[3], q0, Fma(x[2], q1, Fma(x[1], n2, Mul(x[0], n3))));
}

// Score of the nearest axis unit, max|v_i|, and of the nearest unit ½(±1±i±j±k), ½Σ|v_i|.
template <class F>
HQMQ_HD void UnitScores(const F v[4], F* axis, F* half) {
  const F a = Abs(v[0]), b = Abs(v[1]), c = Abs(v[2]), d = Abs(v[3]);
  *axis = Max(Max(a, b), Max(c, d));
  *half = Mul(Lanes<F>::Set(0.5f), Add(Add(a, b), Add(c, d)));
}

template <class F>
struct Nearest {
  F word;        // 0…12*S-1, an integer in a float
  F negative;    // 1: the codeword is minus that word
  F projection;  // ⟨x, codeword⟩ ≥ 0
};

// The word of secondary q = (q0, q1, q2, q3), number `which`, that is nearest to x; the axis units
// before the half units. best: its score.
template <class F>
HQMQ_HD Nearest<F> WordOf(const F x[4], F q0, F q1, F q2, F q3, F which, F best) {
  using L = Lanes<F>;
  F v[4], axis, half;
  RotateByConjugate(x, q0, q1, q2, q3, v);
  UnitScores(v, &axis, &half);

  const F zero = L::Set(0.0f), one = L::Set(1.0f);
  F longest = zero, size = Abs(v[0]), axis_negative = Select(Less(v[0], zero), one, zero);
  for (int i = 1; i < 4; ++i) {
    const auto longer = Less(size, Abs(v[i]));
    size = Select(longer, Abs(v[i]), size);
    longest = Select(longer, L::Set(static_cast<float>(i)), longest);
    axis_negative = Select(longer, Select(Less(v[i], zero), one, zero), axis_negative);
  }
  const auto minus = Less(v[0], zero);
  F half_primary = L::Set(4.0f);
  for (int i = 1; i < 4; ++i) {
    const F weight = L::Set(static_cast<float>(1 << (i - 1)));
    half_primary = Add(half_primary, Select(Xor(Less(v[i], zero), minus), weight, zero));
  }
  const auto is_axis = LessEqual(half, axis);
  Nearest<F> out;
  out.word = Add(Mul(which, L::Set(12.0f)), Select(is_axis, longest, half_primary));
  out.negative = Select(is_axis, axis_negative, Select(minus, one, zero));
  out.projection = best;
  return out;
}

// secondaries: [count, 4]. The first best secondary wins ties.
template <class F>
HQMQ_HD Nearest<F> NearestWord(const F x[4], const float* secondaries, int count) {
  using L = Lanes<F>;
  F v[4], axis, half, best = L::Set(-1.0f), which = L::Set(0.0f);
  for (int s = 0; s < count; ++s) {
    const float* q = secondaries + 4 * s;
    RotateByConjugate(x, L::Set(q[0]), L::Set(q[1]), L::Set(q[2]), L::Set(q[3]), v);
    UnitScores(v, &axis, &half);
    const F score = Max(axis, half);
    const auto better = Less(best, score);
    best = Select(better, score, best);
    which = Select(better, L::Set(static_cast<float>(s)), which);
  }
  return WordOf(x, L::Gather(secondaries, which, 4), L::Gather(secondaries + 1, which, 4),
                L::Gather(secondaries + 2, which, 4), L::Gather(secondaries + 3, which, 4), which,
                best);
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
