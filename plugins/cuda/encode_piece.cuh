// One block's share of a page: rows of a few lanes each, rotated, less the page's mean, searched
// and packed.
#pragma once

#include <type_traits>

#include "encode_rows.cuh"
#include "encode_search.cuh"

namespace hqmq {
namespace cuda {

// Offsets into shared memory, in bytes.
struct EncodeShared {
  int filter, stage, middles, mean, sums, rows, bytes;
};

// Rows of a page of which one group of lanes takes every one.
__host__ __device__ inline int GroupRows(const RoleParams& role) {
  return role.page_size * role.head_dim / 4 / kEncodeThreads / (role.head_dim > 128 ? 2 : 1);
}

__host__ __device__ inline int Batches(const RoleParams& role) {
  const int batch = role.head_dim > 128 ? 4 : 8, rows = GroupRows(role);
  return rows > batch ? rows / batch : 1;
}

// slots: chunks that a thread keeps. The table of secondaries lies at 0.
__host__ __device__ inline EncodeShared SharedOf(const RoleParams& role, int slots) {
  const int padded = FilterGroups(role.secondaries) * kGroupSecondaries;
  const bool filtered = Filtered(role);
  EncodeShared out;
  out.filter = padded * 16;
  out.stage = out.filter + (filtered ? padded * 64 : 0);
  out.middles = out.stage + (filtered ? kEncodeThreads * 16 : 0);
  out.mean = out.middles + (8 << role.radius_bits);  // levels lie behind the middles
  out.mean = (out.mean + 15) / 16 * 16;
  const int groups = kEncodeThreads / (role.head_dim > 128 ? kWarp : role.head_dim / 4);
  out.sums = out.mean + (role.page_mean ? role.head_dim * 4 : 0);
  out.rows = out.sums + (role.page_mean ? Batches(role) * groups * role.head_dim * 4 : 0);
  out.bytes = out.rows + slots * kEncodeThreads * 16;
  return out;
}

// What a block codes: of page `part` of those that fill in one head, every 2^shift-th row of a
// group of lanes from row `first` on.
struct Piece {
  int role, b, h, part, first, shift;
};

// What the compiler is told of codes: nothing, or those of a preset, for less code in the loop.
struct AnyCode {
  __host__ __device__ static bool Fits(const RoleView&) { return true; }
  __device__ static const RoleParams& Role(const RoleParams& role) { return role; }
  __device__ static const Layout& Codes(const Layout& layout) { return layout; }
};

template <int kIndexBits, int kRadiusBits>
struct PresetCode {
  __host__ __device__ static bool Fits(const RoleView& view) {
    return view.role.gain == Gain::kRms && view.layout.index_bits == kIndexBits &&
           view.role.radius_bits == kRadiusBits;
  }
  __device__ static RoleParams Role(RoleParams role) {
    role.gain = Gain::kRms;
    role.radius_bits = kRadiusBits;
    return role;
  }
  __device__ static Layout Codes(Layout layout) {
    layout.index_bits = kIndexBits;
    layout.radius_bits = kRadiusBits;
    layout.code_bits = kIndexBits + kRadiusBits + 1;
    return layout;
  }
};

// One row (head_dim 64: two) of each warp after another, `kSlots` chunks of a lane at a time.
template <int D, class Shown>
struct PieceRows {
  using Shape = RowShape<D>;
  const RoleView& view;
  FilterTables tables;
  const float* middles;  // and levels
  const float4* rows;    // [slots][threads], rotated
  float mean[Shape::kPer][4];
  int32_t* codes;    // of the page
  int32_t* scales;   // of the page
  int first, shift;  // of the piece

  // Row of the page in slot i * kPer.
  __device__ int Row(int i) const {
    return threadIdx.x / Shape::kLanes + Shape::kGroups * (first + (i << shift));
  }

  template <int kSlots, bool kFilter>
  __device__ __forceinline__ void Encode(int slot) const {
    constexpr int kRows = kSlots / Shape::kPer;
    const RoleParams role = Shown::Role(view.role);
    const Layout layout = Shown::Codes(view.layout);
    const int lane = threadIdx.x % kWarp, chunk = threadIdx.x % Shape::kLanes;
    const bool rms = role.gain == Gain::kRms;
    float x[kSlots][4], norm2[kSlots];
    uint32_t scale[kRows];  // fp16, or the nearest short one; of rows that are not finite 0
    uint32_t not_finite = 0;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float4 from = rows[(slot + i) * kEncodeThreads + threadIdx.x];
      x[i][0] = from.x;
      x[i][1] = from.y;
      x[i][2] = from.z;
      x[i][3] = from.w;
      if (role.page_mean) {
#pragma unroll
        for (int k = 0; k < 4; ++k) x[i][k] = Sub(x[i][k], mean[i % Shape::kPer][k]);
      }
      norm2[i] = SquaredNorm(x[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float own[Shape::kPer];
      bool finite = true;
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) finite = finite && IsFinite(norm2[i * Shape::kPer + j]);
      const uint32_t mine = Shape::kLanes == kWarp ? kAllLanes : 0xFFFFu << (lane & 16);
      finite = !(__ballot_sync(kAllLanes, !finite) & mine);
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
        own[j] = finite ? norm2[i * Shape::kPer + j] : 0.0f;
        norm2[i * Shape::kPer + j] = own[j];
      }
      const uint16_t half = RowScale<D>(role, own);
      scale[i] = rms ? ShortScale(half) : half;
      not_finite |= static_cast<uint32_t>(!finite) << i;
    }
    Best best[kSlots];
    if constexpr (kFilter) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        best[i] = SearchFiltered(x[i], scale[i / Shape::kPer] > 0, tables, lane);
    } else {
      SearchAll(x, tables.secondaries, tables.count, best);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = Row(slot / Shape::kPer + i);
      int level[Shape::kPer];
      if (rms) {
        float projection[Shape::kPer];
#pragma unroll
        for (int j = 0; j < Shape::kPer; ++j) projection[j] = best[i * Shape::kPer + j].score;
        scale[i] = ChooseByLanes(
            role.radius_bits, scale[i], projection, middles, middles + (1 << role.radius_bits),
            [](const float (&error)[Shape::kPer]) { return RowSum<D>(error); }, level);
      }
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
        const int k = i * Shape::kPer + j;
        const float4 q = tables.secondaries[best[k].which];
        const Nearest<float> near =
            WordOf(x[k], q.x, q.y, q.z, q.w, static_cast<float>(best[k].which), best[k].score);
        uint32_t code;
        if (rms) {
          code = scale[i] ? MakeCode(layout, static_cast<uint32_t>(near.word), level[j],
                                     near.negative > 0.0f)
                          : 0;
        } else {
          const float step = FloatFromHalf(static_cast<uint16_t>(scale[i]));
          code = static_cast<uint32_t>(CodeOf(role, layout, near, norm2[k], step, middles));
        }
        StoreCode<D>(layout.code_bits, chunk + j * kWarp, code, codes + row * view.layout.words);
      }
      if (chunk == 0) {
        const uint32_t half = rms ? scale[i] << 7 : scale[i];
        WriteScale(role.gain, not_finite >> i & 1 ? kHalfNan : static_cast<uint16_t>(half), row,
                   scales);
      }
    }
  }
};

// Counts the rows of a batch that are new and not finite. A rotated row is so in all of its lanes,
// and 0 times what is not finite is NaN.
template <int D, class IsNew>
__device__ __forceinline__ void CountNotFinite(
    bool rotated, const float (&x)[RowShape<D>::kBatch][RowShape<D>::kPer][4], IsNew is_new,
    hqmq_cuda_status* status) {
  using Shape = RowShape<D>;
  const auto probe = [&](int k, float sum, int count) {
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
#pragma unroll
      for (int i = 0; i < count; ++i) sum = Fma(x[k][j][i], 0.0f, sum);
    }
    return sum;
  };
  float all = 0.0f;
#pragma unroll
  for (int k = 0; k < Shape::kBatch; ++k) all = Fma(x[k][0][0], 0.0f, all);
  if (!rotated) {
#pragma unroll
    for (int k = 0; k < Shape::kBatch; ++k) all = probe(k, all, 4);
  }
  if (!__any_sync(kAllLanes, !(all == 0.0f))) return;
  const int lane = threadIdx.x % kWarp;
  const uint32_t mine = Shape::kLanes == kWarp ? kAllLanes : 0xFFFFu << (lane & 16);
#pragma unroll
  for (int k = 0; k < Shape::kBatch; ++k) {
    const bool bad = __ballot_sync(kAllLanes, !(probe(k, 0.0f, 4) == 0.0f)) & mine;
    if (bad && lane % Shape::kLanes == 0 && is_new(k)) atomicAdd(&status->not_finite, 1);
  }
}

// Fills the tables of a role and head; whether the filter may be used for them.
__device__ __forceinline__ bool FillTables(const RoleView& view, int h, const EncodeShared& at,
                                           char* shared) {
  const RoleParams& role = view.role;
  const float4* from = reinterpret_cast<const float4*>(view.secondaries) +
                       static_cast<int64_t>(h) * role.secondaries;
  bool usable = true;
  for (int s = threadIdx.x; s < at.filter / 16; s += kEncodeThreads) {
    const float4 q = s < role.secondaries ? from[s] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    reinterpret_cast<float4*>(shared)[s] = q;
    if (Filtered(role)) FillFilter(reinterpret_cast<uint4*>(shared + at.filter), s, q);
    const float values[4] = {q.x, q.y, q.z, q.w};
    usable = usable && SquaredNorm(values) <= kFilterNorm;
  }
  const int levels = 1 << role.radius_bits;
  float* middles = reinterpret_cast<float*>(shared + at.middles);
  for (int i = threadIdx.x; i < levels; i += kEncodeThreads) {
    middles[levels + i] = view.levels[i];
    if (i + 1 < levels) middles[i] = LevelMiddle(view.levels, i);
  }
  return usable;
}

// The mean of a page from `count` rows of sums, in the order of a tree sum; whole blocks.
template <int D>
__device__ __forceinline__ void FinishMean(const RoleView& view, float* sums, int count,
                                           float* mean, uint16_t* stored) {
  for (; count > 8; count /= 2) {
    for (int i = threadIdx.x; i < count / 2 * D; i += kEncodeThreads)
      sums[i] = Add(sums[i], sums[i + count / 2 * D]);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < D; i += kEncodeThreads) {
    float x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = sums[k * D + i];
    const float sum = TreeSum(x, 8);
    const uint16_t half = HalfFromFloat(Mul(sum, 1.0f / static_cast<float>(view.role.page_size)));
    mean[i] = FloatFromHalf(half);
    if (stored) stored[i] = half;
  }
  __syncthreads();
}

template <int D, bool kFilter, class Shown>
__device__ __forceinline__ void EncodePiece(const EncodeJob& job, const Piece& piece,
                                            char* shared) {
  using Shape = RowShape<D>;
  const RoleView& view = job.append.view[piece.role];
  const RoleParams& role = view.role;
  const Call& call = job.append.call;
  const int p = role.page_size;
  const Span span = SpanOf(call, p, piece.b);
  const int at = span.past / p + piece.part;
  const int64_t lane = static_cast<int64_t>(piece.b) * call.heads + piece.h;
  const int64_t page = PageIndex(call, piece.b, piece.h, at);
  const int group = threadIdx.x / Shape::kLanes, chunk = threadIdx.x % Shape::kLanes;
  const int group_rows = GroupRows(role), own = group_rows >> piece.shift;
  const EncodeShared places = SharedOf(role, 0);
  const int tail_row = static_cast<int>(lane) * TailRows(role);  // fits: cuda_api.cu, CheckSizes
  const PageRows from = {view, view.cache.tail + static_cast<int64_t>(tail_row) * D,
                         RowStart(view.x, piece.b, piece.h, 0), at * p, span.past};
  float4* rows = reinterpret_cast<float4*>(shared + places.rows);
  float* sums = reinterpret_cast<float*>(shared + places.sums);

  // With a mean, batch c has the group's rows c, c + batches, …, which a tree sum adds first;
  // without one, the piece's own rows in order. -1: none.
  const int batches = Batches(role);
  const int count = role.page_mean ? batches : (own + Shape::kBatch - 1) / Shape::kBatch;
  const auto row_of = [&](int batch, int k) {
    if (role.page_mean) return batches * k + batch < group_rows ? batches * k + batch : -1;
    const int i = Shape::kBatch * batch + k;
    return i < own ? piece.first + (i << piece.shift) : -1;
  };
  const bool counts = job.append.status && call.tokens > 1 && (!role.page_mean || piece.first == 0);
  const auto is_new = [&](int row) {
    return row >= 0 && at * p + group + Shape::kGroups * row >= span.past;
  };
  bool usable = true;
#pragma unroll 1
  for (int batch = 0; batch < count; ++batch) {
    uint2 raw[Shape::kBatch][Shape::kPer];
    const auto load = [&](auto wide) {
#pragma unroll
      for (int k = 0; k < Shape::kBatch; ++k) {
        const int row = row_of(batch, k);
#pragma unroll
        for (int j = 0; j < Shape::kPer; ++j) {
          raw[k][j] = make_uint2(0, 0);
          if (row >= 0) {
            raw[k][j] = from.template Load<decltype(wide)::value>(group + Shape::kGroups * row,
                                                                  4 * (chunk + j * kWarp));
          }
        }
      }
    };
    if (view.x.dtype == HQMQ_FLOAT32) {
      load(std::true_type());
    } else {
      load(std::false_type());
    }
    if (batch == 0) usable = FillTables(view, piece.h, places, shared);
    if (view.x.dtype == HQMQ_BFLOAT16) {
#pragma unroll
      for (int k = 0; k < Shape::kBatch; ++k) {
#pragma unroll
        for (int j = 0; j < Shape::kPer; ++j)
          raw[k][j] = from.Converted(group + Shape::kGroups * row_of(batch, k), raw[k][j]);
      }
    }
    float x[Shape::kBatch][Shape::kPer][4];
#pragma unroll
    for (int k = 0; k < Shape::kBatch; ++k) {
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) Unpack(raw[k][j], x[k][j]);
    }
    if (role.hadamard) {
#pragma unroll
      for (int k = 0; k < Shape::kBatch; ++k) RotateRow<D>(x[k], view.hadamard_scale, threadIdx.x);
    }
#pragma unroll
    for (int k = 0; k < Shape::kBatch; ++k) {
      const int row = row_of(batch, k);
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[k][j][i] = row < 0 ? -0.0f : x[k][j][i];  // kept out of sums
      }
      const int i = row >> piece.shift;
      if (row < 0 || row != piece.first + (i << piece.shift)) continue;
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
        rows[(i * Shape::kPer + j) * kEncodeThreads + threadIdx.x] =
            make_float4(x[k][j][0], x[k][j][1], x[k][j][2], x[k][j][3]);
      }
    }
    if (counts)
      CountNotFinite<D>(
          role.hadamard, x, [&](int k) { return is_new(row_of(batch, k)); }, job.append.status);
    if (!role.page_mean) continue;
#pragma unroll
    for (int half = Shape::kBatch / 2; half > 0; half /= 2) {
#pragma unroll
      for (int k = 0; k < half; ++k) {
#pragma unroll
        for (int j = 0; j < Shape::kPer; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[k][j][i] = Add(x[k][j][i], x[k + half][j][i]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
      *reinterpret_cast<float4*>(sums + (batch * Shape::kGroups + group) * D +
                                 4 * (chunk + j * kWarp)) =
          make_float4(x[0][j][0], x[0][j][1], x[0][j][2], x[0][j][3]);
    }
  }
  usable = !__syncthreads_or(!usable);
  if (page == kNoPage) {  // all that is left to do is to count
    if (piece.role == 0 && piece.h == 0 && piece.first == 0 && threadIdx.x == 0)
      CountNoPage(job.append, p);
    return;
  }

  PieceRows<D, Shown> encoder = {
      view, {}, reinterpret_cast<const float*>(shared + places.middles), rows};
  encoder.tables = {reinterpret_cast<const float4*>(shared),
                    ptx::SharedAddress(shared + places.filter),
                    ptx::SharedAddress(shared + places.stage) + threadIdx.x / kWarp * 512,
                    role.secondaries, usable};
  encoder.codes = view.cache.codes + page * p * view.layout.words;
  encoder.scales = view.cache.scales + page * ScaleWords(role);
  encoder.first = piece.first;
  encoder.shift = piece.shift;
  if (role.page_mean) {
    float* mean = reinterpret_cast<float*>(shared + places.mean);
    FinishMean<D>(view, sums, batches * Shape::kGroups, mean,
                  piece.first == 0 ? view.cache.mean + page * D : nullptr);
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) encoder.mean[j][k] = mean[4 * (chunk + j * kWarp) + k];
    }
  }
  const int slots = own * Shape::kPer;
  int slot = 0;
  constexpr int kSlots = kFilter ? Shape::kPer : 2;
#pragma unroll 1
  for (; slot + kSlots <= slots; slot += kSlots) encoder.template Encode<kSlots, kFilter>(slot);
  if constexpr (kSlots > Shape::kPer) {
    if (slot < slots) encoder.template Encode<Shape::kPer, kFilter>(slot);
  }
}

}  // namespace cuda
}  // namespace hqmq
