// Coding pages of head_dim 64, 128 and 256 without outliers: bytes of docs/format.md. Blocks share
// the rows of a page, a row stays in the registers of a few lanes, and with a page mean each block
// rotates all rows of the page to have it.
#include <algorithm>

#include "encode_piece.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kMostFastPage = 256;
// Warps to hide latencies by, as registers allow.
constexpr int BlocksAnSm(int head_dim) { return head_dim > 128 ? 2 : 3; }

__device__ __forceinline__ bool Fills(const EncodeJob& job, int page_size, int b) {
  if (b >= job.append.call.batch) return false;
  const Span span = SpanOf(job.append.call, page_size, b);
  return span.end / page_size > span.past / page_size;
}

__device__ __forceinline__ int Log2(int power) { return 31 - __clz(power); }

// More new tokens: the pieces of all pages that could fill, one a block.
__device__ __forceinline__ bool AnyPiece(const EncodeJob& job, Piece* piece) {
  const Call& call = job.append.call;
  const int p = job.append.view[job.role].role.page_size;
  piece->shift = Log2(job.pieces);
  piece->first = blockIdx.x & (job.pieces - 1);
  const int item = static_cast<int>(blockIdx.x >> piece->shift), page = item / job.roles;
  piece->role = job.role + item % job.roles;
  piece->part = page % job.most;
  piece->b = page / job.most / call.heads;
  piece->h = page / job.most % call.heads;
  const Span span = SpanOf(call, p, piece->b);
  return span.past / p + piece->part < span.end / p;
}

// One new token: piece `item` of the pages that fill, or none. Every lane of a warp gets it; blocks
// share a page while there are few.
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
  piece->shift = Log2(pieces);
  piece->first = item & (pieces - 1);
  piece->part = 0;
  item >>= piece->shift;
  piece->role = job.role + item % job.roles;
  piece->h = item / job.roles % call.heads;
  int index = item / job.roles / call.heads;
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

template <int D, bool kFilter, class Shown>
__global__ void __launch_bounds__(kEncodeThreads, BlocksAnSm(D))
    EncodeKernel(const __grid_constant__ EncodeJob job) {
  HQMQ_DYNAMIC_SHARED(dynamic);
  // The next kernel reads the call's inputs without waiting: they are complete once this one has
  // waited for the kernels before.
  ptx::GridWait();
  ptx::GridTrigger();
  StartAppend(job, blockIdx.x, gridDim.x, kEncodeThreads);
  const bool one = job.append.call.tokens == 1;
  Piece piece;
#pragma unroll 1
  for (int item = blockIdx.x; one ? FillingPiece(job, item, &piece) : AnyPiece(job, &piece);
       item += gridDim.x) {
    EncodePiece<D, kFilter, Shown>(job, piece, reinterpret_cast<char*>(dynamic));
    if (!one) return;
    __syncthreads();
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

using Hq3 = PresetCode<8, 3>;
using Hq4 = PresetCode<11, 4>;

template <class Shown>
bool AllFit(const EncodeJob& job) {
  bool fit = true;
  for (int i = job.role; i < job.role + job.roles; ++i)
    fit = fit && Shown::Fits(job.append.view[i]);
  return fit;
}

template <int D>
Status Run(const EncodeJob& job, bool filter, int64_t blocks, int shared, const Gpu& gpu,
           cudaStream_t stream) {
  void (*kernel)(EncodeJob) =
      filter ? EncodeKernel<D, true, AnyCode> : EncodeKernel<D, false, AnyCode>;
  if constexpr (D == 128) {
    if (filter && AllFit<Hq4>(job)) kernel = EncodeKernel<D, true, Hq4>;
    if (!filter && AllFit<Hq3>(job)) kernel = EncodeKernel<D, false, Hq3>;
  }
  return LaunchEarly(kernel, dim3(static_cast<unsigned>(blocks)), kEncodeThreads, shared, stream,
                     job, gpu);
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
  const bool filter = Filtered(role);
  const int64_t wanted = static_cast<int64_t>(BlocksAnSm(role.head_dim)) * gpu.multiprocessors;
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
  if (role.head_dim == 64) return Run<64>(job, filter, blocks, shared, gpu, stream);
  if (role.head_dim == 128) return Run<128>(job, filter, blocks, shared, gpu, stream);
  return Run<256>(job, filter, blocks, shared, gpu, stream);
}

}  // namespace cuda
}  // namespace hqmq
