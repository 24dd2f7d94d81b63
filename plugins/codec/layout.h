// The bit layout of `codes`. Mirrors hqmq_trt/format.py, which explains it; tests compare the two.
#pragma once

#include <cstdint>

#include "macros.h"
#include "params.h"

namespace hqmq {
inline namespace HQMQ_ISA {

// Whole bits that index one of 12*S codewords up to sign.
HQMQ_HD int IndexBits(int secondaries) {
  int bits = 0;
  while ((1 << bits) < 12 * secondaries) ++bits;
  return bits;
}

// `width` bits of every chunk's code, from bit `shift` of the code, at bit `offset` of the token.
struct Plane {
  int width;
  int shift;
  int offset;
};

struct Layout {
  Plane planes[5];
  int num_planes;
  int index_bits;
  int radius_bits;
  int code_bits;
  int chunks;  // of a token, D/4
  int words;   // W: int32 words of a token
};

HQMQ_HD Layout MakeLayout(const RoleParams& role) {
  Layout out = {};
  out.chunks = role.head_dim / 4;
  if (role.storage == Storage::kFp16) {
    out.words = (16 * role.head_dim + 31) / 32;
    return out;
  }
  out.index_bits = IndexBits(role.secondaries);
  out.radius_bits = role.radius_bits;
  out.code_bits = out.index_bits + role.radius_bits + 1;
  int shift = 0;
  for (int width = 16; width > 0; width /= 2) {
    if (out.code_bits & width) {
      out.planes[out.num_planes++] = {width, shift, out.chunks * shift};
      shift += width;
    }
  }
  out.words = (out.code_bits * out.chunks + 31) / 32;
  return out;
}

// Int32 words of a page's outlier_mask: one bit a chunk, then one word counting the chunks dropped.
HQMQ_HD int MaskWords(const RoleParams& role) {
  return (role.page_size * (role.head_dim / 4) + 31) / 32 + 1;
}

// A token's scale: fp16, or the 8 bits of a short scale, bits 14…7 of fp16 (docs/format.md).
HQMQ_HD constexpr int ScaleBits(Gain gain) { return gain == Gain::kRms ? 8 : 16; }

// Z: int32 words of a page's scales.
HQMQ_HD int ScaleWords(const RoleParams& role) {
  return role.page_size * ScaleBits(role.gain) / 32;
}

constexpr uint32_t kLargestShortScale = 247;
constexpr uint8_t kShortNan = 255;

// The short scale nearest to a finite fp16 number of at least 0.
HQMQ_HD uint32_t ShortScale(uint16_t half) {
  const uint32_t nearest = (half + 64u) >> 7;
  return nearest < kLargestShortScale ? nearest : kLargestShortScale;
}

// Bits of fp16 of token t's scale. scales: the words of its page; pages of one role lie one after
// another without gaps, so that t may also count from an earlier page's start.
HQMQ_HD uint16_t ReadScale(Gain gain, const int32_t* scales, int64_t t) {
  if (gain == Gain::kMax) return reinterpret_cast<const uint16_t*>(scales)[t];
  return static_cast<uint16_t>(reinterpret_cast<const uint8_t*>(scales)[t] << 7);
}

HQMQ_HD uint32_t MakeCode(const Layout& layout, uint32_t index, uint32_t level, uint32_t negative) {
  return index | level << layout.index_bits | negative << (layout.index_bits + layout.radius_bits);
}

// Sets the code of one chunk in a token's words, which start as zeros.
HQMQ_HD void PackCode(const Layout& layout, int chunk, uint32_t code, int32_t* words) {
  for (int i = 0; i < layout.num_planes; ++i) {
    const Plane& plane = layout.planes[i];
    const uint32_t field = (code >> plane.shift) & ((1u << plane.width) - 1);
    const int bit = plane.offset + chunk * plane.width;
    words[bit >> 5] =
        static_cast<int32_t>(static_cast<uint32_t>(words[bit >> 5]) | field << (bit & 31));
  }
}

// Sets all codes of a token (chunk c at codes[c * stride]) in its words, which start as zeros.
HQMQ_HD void PackToken(const Layout& layout, const int32_t* codes, int stride, int32_t* words) {
  for (int i = 0; i < layout.num_planes; ++i) {
    const Plane& plane = layout.planes[i];
    const uint32_t mask = (1u << plane.width) - 1;
    int bit = plane.offset;
    uint32_t word = static_cast<uint32_t>(words[bit >> 5]);  // a plane may start within a word
    for (int c = 0; c < layout.chunks; ++c) {
      word |= ((static_cast<uint32_t>(codes[c * stride]) >> plane.shift) & mask) << (bit & 31);
      bit += plane.width;
      if ((bit & 31) == 0 || c + 1 == layout.chunks) {
        words[(bit - 1) >> 5] = static_cast<int32_t>(word);
        word = 0;
      }
    }
  }
}

HQMQ_HD uint32_t UnpackCode(const Layout& layout, int chunk, const int32_t* words) {
  uint32_t code = 0;
  for (int i = 0; i < layout.num_planes; ++i) {
    const Plane& plane = layout.planes[i];
    const int bit = plane.offset + chunk * plane.width;
    const uint32_t word = static_cast<uint32_t>(words[bit >> 5]) >> (bit & 31);
    code |= (word & ((1u << plane.width) - 1)) << plane.shift;
  }
  return code;
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
