// Compiled once per instruction set (CMakeLists.txt). No function templates of the standard library
// here: the linker would keep one copy for all sets.
#include "encode_kernels.h"

#include <cstring>

#include "codec/encode.h"
#include "codec/simd.h"
#include "hqmq_host.h"

namespace hqmq {
inline namespace HQMQ_ISA {
namespace {

using L = Lanes<F32x8>;

void Search(const float* chunks, int64_t n, const float* secondaries, int32_t count, int32_t* word,
            uint8_t* negative, float* projection) {
  for (int64_t start = 0; start < n; start += 8) {
    const int filled = n - start < 8 ? static_cast<int>(n - start) : 8;
    alignas(32) float lanes[4][8] = {};
    for (int i = 0; i < filled; ++i) {
      for (int k = 0; k < 4; ++k) lanes[k][i] = chunks[4 * (start + i) + k];
    }
    const F32x8 x[4] = {L::Load(lanes[0]), L::Load(lanes[1]), L::Load(lanes[2]), L::Load(lanes[3])};
    const Nearest<F32x8> near = NearestWord(x, secondaries, count);
    for (int i = 0; i < filled; ++i) {
      word[start + i] = static_cast<int32_t>(near.word.v[i]);
      negative[start + i] = near.negative.v[i] != 0.0f;
      projection[start + i] = near.projection.v[i];
    }
  }
}

bool ToHalf(const void* from, int32_t dtype, int64_t n, uint16_t* to) {
  if (dtype == HQMQ_FLOAT16) {
    memcpy(to, from, n * sizeof(uint16_t));
  } else if (dtype == HQMQ_BFLOAT16) {
    const auto* bits = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = HalfFromFloat(FloatFromBf16(bits[i]));
  } else {
    const auto* values = static_cast<const float*>(from);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) L::StoreHalf(L::Load(values + i), to + i);
    for (; i < n; ++i) to[i] = HalfFromFloat(values[i]);
  }
  int bad = 0;
  for (int64_t i = 0; i < n; ++i)
    bad |= (to[i] & 0x7C00) + 0x400;  // carries where all five are set
  return (bad & 0x8000) == 0;
}

// Mean over the page of one element: x is [P/8] vectors of eight tokens each, token t in lane t
// mod 8.
float TokenSum(F32x8* x, int count) {
  alignas(32) float lanes[8];
  L::Store(TreeSum(x, count), lanes);
  return TreeSum(lanes, 8);
}

// Stores a page's outliers and marks them in norm2; flat is scratch for [P, C] floats.
int MarkOutliers(const PageJob& job, int chunks, F32x8* norm2, const F32x8* x, float* flat) {
  const RoleParams& role = *job.role;
  const int mask_words = MaskWords(role);
  auto* norms = reinterpret_cast<float*>(norm2);
  const auto* values = reinterpret_cast<const float*>(x);
  for (int t = 0; t < role.page_size; ++t) {
    for (int c = 0; c < chunks; ++c) {
      flat[t * chunks + c] = norms[(t / 8 * chunks + c) * 8 + t % 8];
    }
  }
  memset(job.outlier_mask, 0, mask_words * sizeof(int32_t));
  memset(job.outlier_value, 0, role.outlier_capacity * 4 * sizeof(uint16_t));
  uint16_t* slot = job.outlier_value;
  const auto mark = [&](int i) {
    const int t = i / chunks, c = i % chunks;
    const uint32_t word = static_cast<uint32_t>(job.outlier_mask[i / 32]);
    job.outlier_mask[i / 32] = static_cast<int32_t>(word | 1u << (i % 32));
    for (int k = 0; k < 4; ++k) {
      const float value = values[(t / 8 * role.head_dim + 4 * c + k) * 8 + t % 8];
      *slot++ = HalfFromFloat(Max(-kHalfMax, Min(value, kHalfMax)));
    }
    norms[(t / 8 * chunks + c) * 8 + t % 8] = kOutlierMark;
  };
  const auto at = [&](int i) { return flat[i]; };
  const int dropped = ChooseOutliers(at, role.page_size * chunks, role.outlier_capacity, mark);
  job.outlier_mask[mask_words - 1] = dropped;
  return dropped;
}

int EncodePage(const PageJob& job) {
  const RoleParams& role = *job.role;
  const Layout layout = MakeLayout(role);
  const int d = role.head_dim, chunks = d / 4, groups = role.page_size / 8;
  // Eight tokens side by side: x[group * D + element].
  auto* x = reinterpret_cast<F32x8*>(job.scratch);
  F32x8* norm2 = x + groups * d;
  F32x8* column = norm2 + groups * chunks;
  F32x8* row = column + groups;
  F32x8 *projection = row + chunks, *word = projection + chunks, *negative = word + chunks;
  auto* flat = reinterpret_cast<float*>(negative + chunks);

  const float hadamard_scale = role.hadamard ? HadamardScale(d) : 1.0f;
  for (int g = 0; g < groups; ++g) {
    auto* lanes = reinterpret_cast<float*>(x + g * d);
    for (int t = 0; t < 8; ++t) {
      const uint16_t* token = job.rows + (8 * g + t) * d;
      for (int i = 0; i < d; ++i) lanes[8 * i + t] = FloatFromHalf(token[i]);
    }
    if (role.hadamard) Hadamard(x + g * d, d, hadamard_scale);
  }

  if (role.page_mean) {
    for (int i = 0; i < d; ++i) {
      for (int g = 0; g < groups; ++g) column[g] = x[g * d + i];
      const float mean = Mul(TokenSum(column, groups), 1.0f / static_cast<float>(role.page_size));
      job.mean[i] = HalfFromFloat(mean);
      const F32x8 stored = L::Set(FloatFromHalf(job.mean[i]));
      for (int g = 0; g < groups; ++g) x[g * d + i] = Sub(x[g * d + i], stored);
    }
  }

  alignas(32) float finite[1024];  // of each token: 1 or 0
  for (int g = 0; g < groups; ++g) {
    Mask8 all = LessEqual(L::Set(0.0f), L::Set(0.0f));
    for (int c = 0; c < chunks; ++c) {
      norm2[g * chunks + c] = SquaredNorm(x + g * d + 4 * c);
      all = And(all, IsFinite(norm2[g * chunks + c]));
    }
    for (int c = 0; c < chunks; ++c) {
      norm2[g * chunks + c] = Select(all, norm2[g * chunks + c], L::Set(0.0f));
    }
    L::Store(Select(all, L::Set(1.0f), L::Set(0.0f)), finite + 8 * g);
  }

  const int dropped = role.outlier_capacity > 0 ? MarkOutliers(job, chunks, norm2, x, flat) : 0;

  memset(job.codes, 0, static_cast<size_t>(role.page_size) * layout.words * sizeof(int32_t));
  for (int g = 0; g < groups; ++g) {
    const F32x8* norms = norm2 + g * chunks;
    for (int c = 0; c < chunks; ++c) row[c] = norms[c];
    uint16_t scales[8];
    L::StoreHalf(TokenScale(role.gain, role.radius_bits, row, chunks), scales);
    for (int c = 0; c < chunks; ++c) {
      const Nearest<F32x8> near = NearestWord(x + g * d + 4 * c, job.secondaries, role.secondaries);
      word[c] = near.word;
      negative[c] = near.negative;
      projection[c] = near.projection;
    }
    if (role.gain == Gain::kRms) {
      ChooseShortScale(role.radius_bits, norms, projection, chunks, job.levels, job.middles, row,
                       scales);
    }
    const F32x8 step = L::LoadHalf(scales);
    auto* codes = reinterpret_cast<int32_t*>(row);  // what was there is used up
    for (int c = 0; c < chunks; ++c) {
      const Nearest<F32x8> near = {word[c], negative[c], projection[c]};
      L::StoreInt(CodeOf(role, layout, near, norms[c], step, job.middles), codes + 8 * c);
    }
    for (int t = 0; t < 8; ++t) {
      PackToken(layout, codes + t, 8, job.codes + (8 * g + t) * layout.words);
    }
    for (int t = 0; t < 8; ++t) {
      const uint16_t scale = finite[8 * g + t] == 0.0f ? kHalfNan : scales[t];
      WriteScale(role.gain, scale, 8 * g + t, job.scales);
    }
  }
  return dropped;
}

}  // namespace
}  // namespace HQMQ_ISA

const EncodeKernels HQMQ_ISA_NAME(kEncodeKernels) = {Search, ToHalf, EncodePage};

}  // namespace hqmq
