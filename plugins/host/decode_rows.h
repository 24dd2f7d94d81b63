// Decodes rows of a page to float32, eight chunks at a time: page mean not added, Hadamard rotation
// not undone.
#pragma once

#include "attention_kernels.h"
#include "codec/decode.h"
#include "codec/simd.h"

namespace hqmq {
inline namespace HQMQ_ISA {

typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));

// How radius levels are looked up: one or two 8-entry registers, or memory.
enum class Lookup { kEight, kSixteen, kMemory };

// Fields of `width` bits of eight chunks; `from` holds them from its lowest bit.
HQMQ_HD U32x8 LoadPlane(const uint8_t* from, int width) {
  if (width == 16) {
    typedef uint16_t U16x8 __attribute__((vector_size(16)));
    U16x8 x;
    memcpy(&x, from, sizeof(x));
#ifdef HQMQ_X86_V3
    return BitCast<U32x8>(_mm256_cvtepu16_epi32(BitCast<__m128i>(x)));
#else
    return __builtin_convertvector(x, U32x8);
#endif
  }
  if (width == 8) {
    typedef uint8_t U8x8 __attribute__((vector_size(8)));
    U8x8 x;
    memcpy(&x, from, sizeof(x));
#ifdef HQMQ_X86_V3
    return BitCast<U32x8>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(BitCast<int64_t>(x))));
#else
    return __builtin_convertvector(x, U32x8);
#endif
  }
  const uint32_t unit = static_cast<uint32_t>(width);
  uint32_t bits = 0;
  memcpy(&bits, from, width);  // eight fields of `width` bits are `width` bytes
  const U32x8 shifts = {0, unit, 2 * unit, 3 * unit, 4 * unit, 5 * unit, 6 * unit, 7 * unit};
  return ((U32x8{} + bits) >> shifts) & ((1u << unit) - 1);
}

// Codes of chunks 8*group…8*group+7. kBits: code bits known at compile time, or 0.
template <int kBits>
HQMQ_HD U32x8 LoadCodes(const Layout& layout, const uint8_t* token, int group) {
  U32x8 code = {};
  if constexpr (kBits != 0) {
    int shift = 0;
#pragma GCC unroll 5
    for (int width = 16; width > 0; width /= 2) {
      if (!(kBits & width)) continue;
      code |= LoadPlane(token + layout.chunks * shift / 8 + group * width, width) << shift;
      shift += width;
    }
  } else {
    for (int i = 0; i < layout.num_planes; ++i) {
      const Plane& plane = layout.planes[i];
      const uint8_t* from = token + plane.offset / 8 + group * plane.width;
      code |= LoadPlane(from, plane.width) << plane.shift;
    }
  }
  return code;
}

template <Lookup kLookup>
HQMQ_HD F32x8 LookUp(const float* levels, U32x8 level) {
#ifdef HQMQ_X86_V3
  const __m256i which = BitCast<__m256i>(level);
  if constexpr (kLookup == Lookup::kEight) {
    return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), which)};
  } else if constexpr (kLookup == Lookup::kSixteen) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), which);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), which);
    return {_mm256_blendv_ps(low, high, BitCast<__m256>(level << 28))};
  }
#endif
  F32x8 out;
  for (int i = 0; i < 8; ++i) out.v[i] = levels[level[i]];
  return out;
}

// out[4*i + j] = words[index[i]][j] * radius[i], eight chunks.
HQMQ_HD void WordsTimes(F32x8 radius, U32x8 index, const float* words, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    F32x4 x;
    memcpy(&x, words + 4 * size_t{index[i]}, sizeof(x));
    x *= static_cast<float>(radius.v[i]);
    memcpy(out + 4 * i, &x, sizeof(x));
  }
}

template <int kBits, Lookup kLookup>
HQMQ_HD void DecodeGroups(const Layout& layout, const uint8_t* token, float scale,
                          const float* words, const float* levels, float* out) {
  const uint32_t index_mask = (1u << layout.index_bits) - 1,
                 level_mask = (1u << layout.radius_bits) - 1;
  const F32x8 step = Lanes<F32x8>::Set(scale);
  for (int group = 0; group < layout.chunks / 8; ++group) {
    const U32x8 code = LoadCodes<kBits>(layout, token, group);
    const U32x8 index = code & index_mask;
    const U32x8 sign = (code >> (layout.index_bits + layout.radius_bits)) << 31;
    const F32x8 size = Mul(LookUp<kLookup>(levels, (code >> layout.index_bits) & level_mask), step);
    WordsTimes({BitCast<F32x8::Vector>(BitCast<U32x8>(size.v) ^ sign)}, index, words,
               out + 32 * group);
  }
}

// Chunks first… of a token, one at a time.
HQMQ_HD void DecodeSingly(const Layout& layout, const int32_t* token, int first, float scale,
                          const float* words, const float* levels, float* out) {
  for (int c = first; c < layout.chunks; ++c) {
    const uint32_t code = UnpackCode(layout, c, token);
    const float* word = words + 4 * size_t{code & ((1u << layout.index_bits) - 1)};
    const float size =
        Mul(levels[(code >> layout.index_bits) & ((1u << layout.radius_bits) - 1)], scale);
    const float radius = code >> (layout.index_bits + layout.radius_bits) ? Neg(size) : size;
    for (int i = 0; i < 4; ++i) out[4 * c + i] = Mul(word[i], radius);
  }
}

// One page of one head, decoded a few rows at a time, in order.
struct PageReader {
  const RoleParams* role;
  Layout layout;
  const float* words;
  const float* levels;
  const int32_t* codes;      // of the page's first row
  const int32_t* scales;     // of the page; null for fp16 storage
  const uint16_t* mean;      // of the page, or null
  const int32_t* mask;       // of the page, or null
  const uint16_t* outliers;  // of the page
  const uint16_t* sinks;     // rows that are kept exactly: the page's first num_sinks
  int num_sinks;
  int next_outlier;
};

HQMQ_HD PageReader OpenPage(const RoleParams& role, const Layout& layout, const WordTable& table,
                            const RoleCache& cache, int64_t sequence, int head, int num_pages,
                            int page) {
  PageReader out = {};
  out.role = &role;
  out.layout = layout;
  const int64_t pages = sequence * num_pages + page, rows = pages * role.page_size;
  out.codes = cache.codes + rows * layout.words;
  if (role.storage == Storage::kFp16) return out;
  if (page == 0) {
    out.sinks = cache.tail + (sequence * TailRows(role) + role.page_size) * role.head_dim;
    out.num_sinks = role.sink_tokens;
  }
  out.words = table.words + head * table.head_stride;
  out.levels = table.levels;
  out.scales = cache.scales + pages * ScaleWords(role);
  if (role.page_mean) out.mean = cache.mean + pages * role.head_dim;
  if (role.outlier_capacity > 0) {
    out.mask = cache.outlier_mask + pages * MaskWords(role);
    out.outliers = cache.outlier_value + pages * role.outlier_capacity * 4;
  }
  return out;
}

template <int kBits, Lookup kLookup>
HQMQ_HD void ReadPacked(const PageReader& page, int first, int count, int stride, float* out) {
  const bool by_groups = page.layout.chunks % 4 == 0;  // planes start at whole bytes
  for (int i = 0; i < count; ++i) {
    const int32_t* token = page.codes + int64_t{first + i} * page.layout.words;
    const float scale = FloatFromHalf(ReadScale(page.role->gain, page.scales, first + i));
    float* row = out + int64_t{i} * stride;
    int done = 0;
    if (by_groups) {
      DecodeGroups<kBits, kLookup>(page.layout, reinterpret_cast<const uint8_t*>(token), scale,
                                   page.words, page.levels, row);
      done = page.layout.chunks / 8 * 8;
    }
    DecodeSingly(page.layout, token, done, scale, page.words, page.levels, row);
  }
}

HQMQ_HD void LoadHalfRow(const uint16_t* from, int count, float* to) {
  int i = 0;
  for (; i + 8 <= count; i += 8) Lanes<F32x8>::Store(Lanes<F32x8>::LoadHalf(from + i), to + i);
  for (; i < count; ++i) to[i] = FloatFromHalf(from[i]);
}

// Passes over rows [first, first + count): their outliers come before those of the rows after them.
inline void SkipRows(PageReader* page, int first, int count) {
  if (page->mask == nullptr) return;
  const int chunks = page->layout.chunks;
  for (int bit = first * chunks; bit < (first + count) * chunks; ++bit) {
    page->next_outlier += (page->mask[bit >> 5] >> (bit & 31)) & 1;
  }
}

// Rows [first, first + count) of the page → out, `stride` floats apart. Rows must be read in order:
// outliers are stored in the order of their bits.
inline void ReadRows(PageReader* page, int first, int count, int stride, float* out) {
  const Layout& layout = page->layout;
  if (page->role->storage == Storage::kFp16) {
    for (int i = 0; i < count; ++i) {
      const int32_t* row = page->codes + int64_t{first + i} * layout.words;
      LoadHalfRow(reinterpret_cast<const uint16_t*>(row), page->role->head_dim,
                  out + int64_t{i} * stride);
    }
    return;
  }
  if (layout.code_bits == 12 && layout.radius_bits == 3) {
    ReadPacked<12, Lookup::kEight>(*page, first, count, stride, out);
  } else if (layout.code_bits == 14 && layout.radius_bits == 3) {
    ReadPacked<14, Lookup::kEight>(*page, first, count, stride, out);
  } else if (layout.code_bits == 16 && layout.radius_bits == 4) {
    ReadPacked<16, Lookup::kSixteen>(*page, first, count, stride, out);
  } else if (layout.code_bits == 20) {
    ReadPacked<20, Lookup::kMemory>(*page, first, count, stride, out);
  } else {
    ReadPacked<0, Lookup::kMemory>(*page, first, count, stride, out);
  }
  if (page->mask == nullptr) return;
  for (int bit = first * layout.chunks; bit < (first + count) * layout.chunks; ++bit) {
    const uint32_t rest = static_cast<uint32_t>(page->mask[bit >> 5]) >> (bit & 31);
    if (rest == 0) {
      bit |= 31;  // no more in this word
    } else if ((rest & 1) && page->next_outlier < page->role->outlier_capacity) {
      float* chunk = out + int64_t{bit / layout.chunks - first} * stride + bit % layout.chunks * 4;
      for (int i = 0; i < 4; ++i)
        chunk[i] = FloatFromHalf(page->outliers[4 * page->next_outlier + i]);
      ++page->next_outlier;
    }
  }
}

}  // namespace HQMQ_ISA
}  // namespace hqmq
