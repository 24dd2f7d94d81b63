// Codes back to chunks.
#pragma once

#include <cstdint>

#include "layout.h"
#include "numeric.h"

namespace hqmq {
inline namespace HQMQ_ISA {

// Codeword word = 12*s + p up to sign: primary p (left) times secondary q (w, x, y, z), rounded
// once. p 0…3: axes 1, i, j, k. 4 + n1 + 2*n2 + 4*n3: ½(1 ± i ± j ± k), n = 1 for minus.
HQMQ_HD void Codeword(int primary, const float q[4], float out[4]) {
  double p[4] = {0, 0, 0, 0};
  if (primary < 4) {
    p[primary] = 1.0;
  } else {
    const int minus = primary - 4;
    p[0] = 0.5;
    p[1] = minus & 1 ? -0.5 : 0.5;
    p[2] = minus & 2 ? -0.5 : 0.5;
    p[3] = minus & 4 ? -0.5 : 0.5;
  }
  // Products with 0, ±½ and ±1 are exact, so contraction changes nothing here.
  const double w = q[0], x = q[1], y = q[2], z = q[3];
  out[0] = static_cast<float>(p[0] * w - p[1] * x - p[2] * y - p[3] * z);
  out[1] = static_cast<float>(p[0] * x + p[1] * w + p[2] * z - p[3] * y);
  out[2] = static_cast<float>(p[0] * y - p[1] * z + p[2] * w + p[3] * x);
  out[3] = static_cast<float>(p[0] * z + p[1] * y - p[2] * x + p[3] * w);
}

// One chunk from its code, the token's scale, and the head's secondaries [S, 4] and levels [2^r]:
// before the page mean and the inverse Hadamard rotation.
HQMQ_HD void DecodeChunk(const Layout& layout, uint32_t code, float scale, const float* secondaries,
                         const float* levels, float out[4]) {
  const uint32_t index = code & ((1u << layout.index_bits) - 1);
  const uint32_t level = (code >> layout.index_bits) & ((1u << layout.radius_bits) - 1);
  const float size = Mul(levels[level], scale);
  const float radius = code >> (layout.index_bits + layout.radius_bits) ? Neg(size) : size;
  Codeword(static_cast<int>(index % 12), secondaries + 4 * (index / 12), out);
  for (int i = 0; i < 4; ++i) out[i] = Mul(out[i], radius);
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
