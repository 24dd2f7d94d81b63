// Coding pages of head_dim 64, 128 and 256 without outliers: bytes of docs/format.md. Blocks share
// the rows of a page, a row stays in the registers of a few lanes, and with a page mean each block
// rotates all rows of the page to have it.
#include <algorithm>

#include "encode_rows.cuh"
#include "encode_search.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kMostFastPage = 256;
constexpr int kBlocksAnSm = 2;

// Offsets into shared memory, in bytes.
struct EncodeShared {
  int filter, stage, middles, mean, sums, rows, bytes;
};

__host__ __device__ inline bool Filtered(const RoleParams& role) {
  return role.secondaries >= kFilterSecondaries;
}

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
  out.mean = out.middles + (4 << role.radius_bits);
  out.mean = (out.mean + 15) / 16 * 16;
  const int groups = kEncodeThreads / (role.head_dim > 128 ? kWarp : role.head_dim / 4);
  out.sums = out.mean + (role.page_mean ? role.head_dim * 4 : 0);
  out.rows = out.sums + (role.page_mean ? Batches(role) * groups * role.head_dim * 4 : 0);
  out.bytes = out.rows + slots * kEncodeThreads * 16;
  return out;
}

// What a block codes: every `pieces`-th row of a group, from `piece` on, of one page of one head.
struct Piece {
  int role, b, h, part, piece, pieces;
};

// One row (head_dim 64: two) of each warp after another, `kSlots` chunks of a lane at a time.
template <int D>
struct PieceRows {
  using Shape = RowShape<D>;
  const RoleView& view;
  FilterTables tables;
  const float* middles;
  const float4* rows;  // [slots][threads], rotated
  float mean[Shape::kPer][4];
  int32_t* codes;    // of the page
  uint16_t* scales;  // of the page
  int piece, pieces;

  // Row of the page in slot i * kPer.
  __device__ int Row(int i) const {
    return threadIdx.x / Shape::kLanes + Shape::kGroups * (piece + pieces * i);
  }

  template <int kSlots, bool kFilter>
  __device__ __forceinline__ void Encode(int slot) const {
    constexpr int kRows = kSlots / Shape::kPer;
    const RoleParams& role = view.role;
    const int lane = threadIdx.x % kWarp, chunk = threadIdx.x % Shape::kLanes;
    float x[kSlots][4], norm2[kSlots], scale[kRows];
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
      scale[i] = FloatFromHalf(half);
      if (chunk == 0) scales[Row(slot / Shape::kPer + i)] = finite ? half : kHalfNan;
    }
    Best best[kSlots];
    if constexpr (kFilter) {
#pragma unroll
      for (int i = 0; i < kSlots; ++i)
        best[i] = SearchFiltered(x[i], scale[i / Shape::kPer] > 0.0f, tables, lane);
    } else {
      SearchAll(x, tables.secondaries, tables.count, best);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float4 q = tables.secondaries[best[i].which];
      const Nearest<float> near =
          WordOf(x[i], q.x, q.y, q.z, q.w, static_cast<float>(best[i].which), best[i].score);
      const float code = CodeOf(role, view.layout, near, norm2[i], scale[i / Shape::kPer], middles);
      StoreCode<D>(view.layout, chunk + i % Shape::kPer * kWarp, static_cast<uint32_t>(code),
                   codes + Row((slot + i) / Shape::kPer) * view.layout.words);
    }
  }
};

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
  for (int i = threadIdx.x; i + 1 < 1 << role.radius_bits; i += kEncodeThreads)
    reinterpret_cast<float*>(shared + at.middles)[i] = LevelMiddle(view.levels, i);
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

template <int D>
__device__ __forceinline__ void EncodePiece(const EncodeJob& job, const Piece& piece,
                                            const Span& span, char* shared) {
  using Shape = RowShape<D>;
  const RoleView& view = job.append.view[piece.role];
  const RoleParams& role = view.role;
  const Call& call = job.append.call;
  const int p = role.page_size, at = span.past / p + piece.part;
  const int64_t lane = static_cast<int64_t>(piece.b) * call.heads + piece.h;
  const int64_t page = lane * call.num_pages + at;
  const int group = threadIdx.x / Shape::kLanes, chunk = threadIdx.x % Shape::kLanes;
  const int group_rows = GroupRows(role), own = group_rows / piece.pieces;
  const EncodeShared places = SharedOf(role, 0);
  const PageRows from = {view, view.cache.tail + lane * p * D,
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
    return i < own ? piece.piece + piece.pieces * i : -1;
  };
  bool usable = true;
#pragma unroll 1
  for (int batch = 0; batch < count; ++batch) {
    uint2 raw[Shape::kBatch][Shape::kPer];
#pragma unroll
    for (int k = 0; k < Shape::kBatch; ++k) {
      const int row = row_of(batch, k);
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
        raw[k][j] = make_uint2(0x80008000u, 0x80008000u);  // -0 leaves any sum as it is
        if (row >= 0) raw[k][j] = from.Load(group + Shape::kGroups * row, 4 * (chunk + j * kWarp));
      }
    }
    if (batch == 0) usable = FillTables(view, piece.h, places, shared);
    float x[Shape::kBatch][Shape::kPer][4];
#pragma unroll
    for (int k = 0; k < Shape::kBatch; ++k) {
      const int row = row_of(batch, k);
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) Unpack(raw[k][j], x[k][j]);
      if (row < 0) continue;
      if (role.hadamard) RotateRow<D>(x[k], view.hadamard_scale, threadIdx.x);
      if (row % piece.pieces != piece.piece) continue;
#pragma unroll
      for (int j = 0; j < Shape::kPer; ++j) {
        rows[(row / piece.pieces * Shape::kPer + j) * kEncodeThreads + threadIdx.x] =
            make_float4(x[k][j][0], x[k][j][1], x[k][j][2], x[k][j][3]);
      }
    }
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

  PieceRows<D> encoder = {view, {}, reinterpret_cast<const float*>(shared + places.middles), rows};
  encoder.tables = {reinterpret_cast<const float4*>(shared),
                    ptx::SharedAddress(shared + places.filter),
                    ptx::SharedAddress(shared + places.stage) + threadIdx.x / kWarp * 512,
                    role.secondaries, usable};
  encoder.codes = view.cache.codes + page * p * view.layout.words;
  encoder.scales = view.cache.scales + page * p;
  encoder.piece = piece.piece;
  encoder.pieces = piece.pieces;
  if (role.page_mean) {
    float* mean = reinterpret_cast<float*>(shared + places.mean);
    FinishMean<D>(view, sums, batches * Shape::kGroups, mean,
                  piece.piece == 0 ? view.cache.mean + page * D : nullptr);
#pragma unroll
    for (int j = 0; j < Shape::kPer; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) encoder.mean[j][k] = mean[4 * (chunk + j * kWarp) + k];
    }
  }
  const int slots = own * Shape::kPer;
  int slot = 0;
  if (Filtered(role)) {
#pragma unroll 1
    for (; slot < slots; slot += Shape::kPer) encoder.template Encode<Shape::kPer, true>(slot);
    return;
  }
#pragma unroll 1
  for (; slot + 2 <= slots; slot += 2) encoder.template Encode<2, false>(slot);
  if constexpr (Shape::kPer == 1) {
    if (slot < slots) encoder.template Encode<1, false>(slot);
  }
}

__device__ __forceinline__ bool Fills(const EncodeJob& job, int page_size, int b) {
  if (b >= job.append.call.batch) return false;
  const Span span = SpanOf(job.append.call, page_size, b);
  return span.end / page_size > span.past / page_size;
}

// One new token: the piece that is item `item` of the pages that fill, or none. Every lane of a
// warp gets it; blocks share a page while there are few.
__device__ __forceinline__ bool FillingPiece(const EncodeJob& job, int item, Piece* piece) {
  const Call& call = job.append.call;
  const int p = job.append.view[job.role].role.page_size, lane = threadIdx.x % kWarp;
  int filling = 0;
  for (int b = 0; b < call.batch; b += kWarp)
    filling += __popc(__ballot_sync(kAllLanes, Fills(job, p, b + lane)));
  const int64_t pages = static_cast<int64_t>(filling) * call.heads * job.roles;
  int pieces = job.pieces;
  while (pieces > job.fewest && pages * pieces > gridDim.x) pieces /= 2;
  if (item >= pages * pieces) return false;
  int index = item / pieces / job.roles / call.heads;
  piece->piece = item % pieces;
  piece->pieces = pieces;
  piece->part = 0;
  piece->role = job.role + item / pieces % job.roles;
  piece->h = item / pieces / job.roles % call.heads;
  for (int b = 0;; b += kWarp) {
    uint32_t fills = __ballot_sync(kAllLanes, Fills(job, p, b + lane));
    if (index >= __popc(fills)) {
      index -= __popc(fills);
      continue;
    }
    for (; index > 0; --index) fills &= fills - 1;
    piece->b = b + __ffs(static_cast<int>(fills)) - 1;
    return true;
  }
}

template <int D>
__global__ void __launch_bounds__(kEncodeThreads, kBlocksAnSm)
    EncodeKernel(const __grid_constant__ EncodeJob job) {
  extern __shared__ float4 dynamic[];
  char* shared = reinterpret_cast<char*>(dynamic);
  ptx::GridTrigger();
  StartAppend(job, blockIdx.x, gridDim.x, kEncodeThreads);
  const Call& call = job.append.call;
  Piece piece;
  if (call.tokens > 1) {
    int64_t item = blockIdx.x;
    piece.piece = static_cast<int>(item % job.pieces);
    piece.pieces = job.pieces;
    item /= job.pieces;
    piece.role = job.role + static_cast<int>(item % job.roles);
    item /= job.roles;
    piece.part = static_cast<int>(item % job.most);
    item /= job.most;
    piece.b = static_cast<int>(item / call.heads);
    piece.h = static_cast<int>(item % call.heads);
    const int p = job.append.view[piece.role].role.page_size;
    const Span span = SpanOf(call, p, piece.b);
    if (span.past / p + piece.part < span.end / p) EncodePiece<D>(job, piece, span, shared);
    return;
  }
  for (int item = blockIdx.x; FillingPiece(job, item, &piece); item += gridDim.x) {
    if (item != static_cast<int>(blockIdx.x)) __syncthreads();
    const Span span = SpanOf(call, job.append.view[piece.role].role.page_size, piece.b);
    EncodePiece<D>(job, piece, span, shared);
  }
}

int LaneGroups(const RoleParams& role) {
  return kEncodeThreads / std::min(role.head_dim / 4, kWarp);
}

int Slots(const RoleParams& role) { return role.page_size * role.head_dim / 4 / kEncodeThreads; }

int FewestPieces(const RoleParams& role) { return std::max(1, Slots(role) / kMostSlots); }

int FewestShared(const RoleParams& role) {
  return SharedOf(role, Slots(role) / FewestPieces(role)).bytes;
}

template <int D>
Status Run(const EncodeJob& job, int64_t blocks, int shared, cudaStream_t stream) {
  return Launch(EncodeKernel<D>, dim3(static_cast<unsigned>(blocks)), kEncodeThreads, shared,
                stream, job);
}

}  // namespace

bool FastEncodeTakes(const RoleView& view, int shared_limit) {
  const RoleParams& role = view.role;
  const int d = role.head_dim;
  return role.storage == Storage::kHqmq && role.outlier_capacity == 0 &&
         (d == 64 || d == 128 || d == 256) && role.page_size >= LaneGroups(role) &&
         role.page_size <= kMostFastPage && FewestShared(role) <= shared_limit;
}

Status EncodeFast(const EncodeJob& whole, const Gpu& gpu, cudaStream_t stream) {
  EncodeJob job = whole;
  const RoleParams& role = job.append.view[job.role].role;
  const Call& call = job.append.call;
  const int64_t pages = static_cast<int64_t>(call.batch) * call.heads * job.roles * job.most;
  const int64_t wanted = static_cast<int64_t>(kBlocksAnSm) * gpu.multiprocessors;
  job.fewest = FewestPieces(role);
  job.pieces = GroupRows(role);
  if (call.tokens > 1) {
    while (job.pieces > job.fewest && pages * job.pieces > wanted) job.pieces /= 2;
  }
  int shared = 0;
  for (int i = job.role; i < job.role + job.roles; ++i)
    shared = std::max(shared, FewestShared(job.append.view[i].role));
  const int64_t items = pages * job.pieces;
  const int64_t blocks = call.tokens > 1 ? items : std::min(items, wanted);
  if (role.head_dim == 64) return Run<64>(job, blocks, shared, stream);
  if (role.head_dim == 128) return Run<128>(job, blocks, shared, stream);
  return Run<256>(job, blocks, shared, stream);
}

}  // namespace cuda
}  // namespace hqmq
