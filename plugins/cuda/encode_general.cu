// Coding pages of any scheme and shape, a block a page: bytes of docs/format.md, by the codec
// headers that the host runs.
#include "encode_job.h"
#include "encode_scale.cuh"
#include "ptx.cuh"
#include "tails.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr size_t kSharedLimit = 96 * 1024;  // what every GPU from sm_80 on gives a block
constexpr int kMostLevels = 256;

// Shared memory of EncodePages, before the page's floats.
struct PageScratch {
  float middles[kMostLevels];
  float mean[kMaxHeadDim];
  int32_t bins[256];
  int32_t chosen_bin, rank, above, larger;
};

__host__ __device__ size_t FixedShared(const RoleParams& role) {
  return sizeof(PageScratch) + sizeof(float) * (4 * role.secondaries + 2 * role.page_size);
}

// The page's values and norms: in shared memory where they fit, else in the workspace.
__host__ __device__ size_t PageFloats(const RoleParams& role) {
  return static_cast<size_t>(role.page_size) * (role.head_dim + role.head_dim / 4);
}

__host__ __device__ bool FitsShared(const RoleParams& role) {
  return FixedShared(role) + sizeof(float) * PageFloats(role) <= kSharedLimit;
}

// TreeSum of hadamard.h over count (a power of two, at most 1024) values a stride apart: pairs
// that lie half the count apart are summed first, so that in bit-reversed order partial sums can be
// added as soon as two of one size are there.
__device__ float ColumnSum(const float* x, int count, int stride) {
  float partial[10] = {}, sum = 0.0f;
  const int bits = 31 - __clz(count);
  for (int n = 0; n < count; ++n) {
    const int t = static_cast<int>(__brev(static_cast<unsigned>(n)) >> (32 - bits));
    sum = x[static_cast<int64_t>(t) * stride];
    bool carry = true;
#pragma unroll
    for (int k = 0; k < 10; ++k) {
      if (!carry) continue;
      if (n >> k & 1) {
        sum = Add(partial[k], sum);
      } else {
        partial[k] = sum;
        carry = false;
      }
    }
  }
  return sum;
}

// KthSmallest of encode.h by a whole block.
__device__ float BlockKthSmallest(const float* norm2, int n, int k, PageScratch* scratch) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) scratch->bins[i] = 0;
    __syncthreads();
    const uint32_t above = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t bits = BitCast<uint32_t>(norm2[i]);
      if ((bits & above) == prefix) atomicAdd(&scratch->bins[bits >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      int own = 0;
      for (int i = 0; i < 8; ++i) own += scratch->bins[8 * lane + i];
      int through = own;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int left = __shfl_up_sync(kAllLanes, through, offset);
        if (lane >= offset) through += left;
      }
      int rank = k - (through - own);
      if (rank >= 0 && rank < own) {
        int bin = 8 * lane;
        while (rank >= scratch->bins[bin]) rank -= scratch->bins[bin++];
        scratch->chosen_bin = bin;
        scratch->rank = rank;
      }
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(scratch->chosen_bin) << shift;
    k = scratch->rank;
  }
  __syncthreads();
  return BitCast<float>(prefix);
}

__device__ int CountAbove(const float* norm2, int n, float bound, int32_t* counter) {
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  int own = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) own += Less(bound, norm2[i]);
  atomicAdd(counter, own);
  __syncthreads();
  return *counter;
}

// ChooseOutliers of encode.h by a whole block: mask and values of a page, kOutlierMark in norm2.
__device__ int StoreOutliers(const RoleView& view, int64_t page, const float* x, float* norm2,
                             PageScratch* scratch) {
  const RoleParams& role = view.role;
  const int n = role.page_size * (role.head_dim / 4), capacity = role.outlier_capacity;
  int32_t* mask = view.cache.outlier_mask + page * view.mask_words;
  uint2* values = reinterpret_cast<uint2*>(view.cache.outlier_value) + page * capacity;
  const float bound = Mul(kOutlierFactorSquared, BlockKthSmallest(norm2, n, (n - 1) / 2, scratch));
  const int above = CountAbove(norm2, n, bound, &scratch->above);
  const bool full = above > capacity;
  float least = bound;
  int ties = 0;
  if (full) {
    least = BlockKthSmallest(norm2, n, n - capacity, scratch);
    ties = capacity - CountAbove(norm2, n, least, &scratch->larger);
  }
  if (threadIdx.x < kWarp) {  // in order, by one warp
    const int lane = threadIdx.x;
    const uint32_t below = (1u << lane) - 1;
    int slot = 0;
    for (int word = 0; word < view.mask_words - 1; ++word) {
      const int i = 32 * word + lane;
      const float norm = i < n ? norm2[i] : 0.0f;
      const bool tie = full && i < n && norm == least;
      const uint32_t tied = __ballot_sync(kAllLanes, tie);
      const bool wins = i < n && (Less(least, norm) || (tie && __popc(tied & below) < ties));
      ties = ties > __popc(tied) ? ties - __popc(tied) : 0;
      const uint32_t chosen = __ballot_sync(kAllLanes, wins);
      if (wins) {
        uint32_t half[4];
        for (int k = 0; k < 4; ++k)
          half[k] = HalfFromFloat(Max(-kHalfMax, Min(x[4 * i + k], kHalfMax)));
        values[slot + __popc(chosen & below)] =
            make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
        norm2[i] = kOutlierMark;
      }
      if (lane == 0) mask[word] = static_cast<int32_t>(chosen);
      slot += __popc(chosen);
    }
    for (int i = slot + lane; i < capacity; i += kWarp) values[i] = make_uint2(0, 0);
    if (lane == 0) mask[view.mask_words - 1] = full ? above - capacity : 0;
  }
  __syncthreads();
  return full ? above - capacity : 0;
}

// TokenScale of encode.h by a warp. norm2: of the token's chunks, at most 64.
__device__ float WarpTokenScale(const RoleParams& role, const float* norm2, int chunks, int lane) {
  const float first = lane < chunks ? norm2[lane] : 0.0f;
  const float second = lane + kWarp < chunks ? norm2[lane + kWarp] : 0.0f;
  if (role.gain == Gain::kMax) {
    const float largest = WarpMax(Max(Max(first, 0.0f), second));
    return Min(Div(Sqrt(largest), static_cast<float>((1 << role.radius_bits) - 1)), kHalfMax);
  }
  const int kept =
      WarpSum((lane < chunks && first >= 0.0f) + (lane + kWarp < chunks && second >= 0.0f));
  // Padding with zeros to 64 leaves a tree sum as it is.
  const float sum = WarpSum(Add(Max(first, 0.0f), Max(second, 0.0f)));
  const float elements = Mul(4.0f, Max(static_cast<float>(kept), 1.0f));
  return Min(Sqrt(Div(sum, elements)), kHalfMax);
}

// Chunks of a token that a lane has: lane and lane + 32.
constexpr int kLaneChunks = kMaxHeadDim / 4 / kWarp;

// Chooses a token's short scale, which it returns, and makes its codes by a warp. near: projection,
// word and sign of each chunk, four floats apart. norm2: kOutlierMark where there is an outlier;
// gets the codes.
__device__ uint32_t WarpTokenCodes(const RoleView& view, uint32_t nearest, const float* near,
                                   const float* middles, float* norm2, int lane) {
  const int chunks = view.role.head_dim / 4;
  float projection[kLaneChunks];
  bool counted[kLaneChunks];
  int level[kLaneChunks];
#pragma unroll
  for (int i = 0; i < kLaneChunks; ++i) {
    const int c = lane + i * kWarp;
    counted[i] = c < chunks && norm2[c] >= 0.0f;
    projection[i] = counted[i] ? near[4 * c] : 0.0f;
  }
  const uint32_t scale = ChooseByLanes(
      view.role.radius_bits, nearest, projection, middles, view.levels,
      [&](const float (&error)[kLaneChunks]) {
        // Padding with zeros to 64 leaves a tree sum as it is.
        static_assert(kLaneChunks == 2, "64 chunks");
        return WarpSum(Add(counted[0] ? error[0] : 0.0f, counted[1] ? error[1] : 0.0f));
      },
      level);
#pragma unroll
  for (int i = 0; i < kLaneChunks; ++i) {
    const int c = lane + i * kWarp;
    if (c >= chunks) continue;
    const uint32_t code = counted[i] && scale
                              ? MakeCode(view.layout, static_cast<uint32_t>(near[4 * c + 1]),
                                         level[i], near[4 * c + 2] > 0.0f)
                              : 0;
    norm2[c] = BitCast<float>(code);
  }
  return scale;
}

// Word w of a token from its codes (codec/layout.h). Fields do not cross words.
__device__ uint32_t PackedWord(const Layout& layout, const float* codes, int w) {
  uint32_t word = 0;
  for (int i = 0; i < layout.num_planes; ++i) {
    const Plane& plane = layout.planes[i];
    const int begin = 32 * w - plane.offset, end = begin + 32;
    if (end <= 0) continue;
    const int last = end / plane.width < layout.chunks ? end / plane.width : layout.chunks;
    for (int c = begin > 0 ? begin / plane.width : 0; c < last; ++c) {
      const uint32_t code = static_cast<uint32_t>(BitCast<int32_t>(codes[c]));
      const uint32_t field = code >> plane.shift & ((1u << plane.width) - 1);
      word |= field << (c * plane.width - begin);
    }
  }
  return word;
}

// A page of storage fp16: two elements a word.
__device__ void CopyPage(const RoleView& view, const Span& span, int b, int h, int64_t lane,
                         int first, int32_t* codes) {
  const int half_dim = view.role.head_dim / 2;
  for (int i = threadIdx.x; i < view.role.page_size * half_dim; i += kThreads) {
    const int t = first + i / half_dim, element = 2 * (i % half_dim);
    const uint32_t low = TokenHalf(view, span, b, h, lane, t, element, true);
    const uint32_t high = TokenHalf(view, span, b, h, lane, t, element + 1, true);
    codes[i] = static_cast<int32_t>(low | high << 16);
  }
}

// One page that fills in this call, of one head: blockIdx.x = lane * most + i; role blockIdx.y.
__global__ void __launch_bounds__(kThreads, 2)
    EncodeGeneralKernel(const __grid_constant__ EncodeJob whole) {
  HQMQ_DYNAMIC_SHARED(shared);
  ptx::GridWait();
  ptx::GridTrigger();  // as EncodeKernel
  const AppendJob& job = whole.append;
  const int which = whole.role + blockIdx.y;
  const RoleView& view = job.view[which];
  const RoleParams& role = view.role;
  const int p = role.page_size, d = role.head_dim, chunks = d / 4, n = p * chunks;
  const int64_t lane = blockIdx.x / whole.most;
  const int b = static_cast<int>(lane / job.call.heads),
            h = static_cast<int>(lane % job.call.heads);
  StartAppend(whole, static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x,
              static_cast<int64_t>(gridDim.x) * gridDim.y, kThreads);
  const Span span = SpanOf(job.call, p, b);
  const int part = static_cast<int>(blockIdx.x % whole.most);
  const int at = span.past / p + part, first = at * p;
  if (at >= span.end / p) return;
  const int64_t page = PageIndex(job.call, b, h, at);
  if (page == kNoPage) {
    if (which == 0 && h == 0 && threadIdx.x == 0) CountNoPage(job, p);
    return;
  }
  int32_t* codes = view.cache.codes + page * p * view.layout.words;
  if (role.storage == Storage::kFp16) return CopyPage(view, span, b, h, lane, first, codes);

  float* secondaries = reinterpret_cast<float*>(shared);
  PageScratch* scratch = reinterpret_cast<PageScratch*>(secondaries + 4 * role.secondaries);
  float* scales = reinterpret_cast<float*>(scratch + 1);
  int32_t* finite = reinterpret_cast<int32_t*>(scales + p);
  float* x = FitsShared(role) ? reinterpret_cast<float*>(finite + p)
                              : job.scratch[which] + blockIdx.x * PageFloats(role);
  float* norm2 = x + p * d;
  const int warp = threadIdx.x / kWarp, warp_lane = threadIdx.x % kWarp;
  constexpr int kWarps = kThreads / kWarp;

  for (int i = threadIdx.x; i < 4 * role.secondaries; i += kThreads)
    secondaries[i] = view.secondaries[static_cast<int64_t>(h) * role.secondaries * 4 + i];
  for (int i = threadIdx.x; i + 1 < 1 << role.radius_bits; i += kThreads)
    scratch->middles[i] = LevelMiddle(view.levels, i);
  for (int t = warp; t < p; t += kWarps) {
    float* row = x + t * d;
    for (int i = warp_lane; i < d; i += kWarp)
      row[i] = FloatFromHalf(TokenHalf(view, span, b, h, lane, first + t, i, true));
    __syncwarp();
    if (role.hadamard) WarpHadamard(row, d, view.hadamard_scale, warp_lane);
    if (warp_lane == 0) finite[t] = 1;
  }
  __syncthreads();

  if (role.page_mean) {
    for (int i = threadIdx.x; i < d; i += kThreads) {
      const uint16_t mean =
          HalfFromFloat(Mul(ColumnSum(x + i, p, d), 1.0f / static_cast<float>(p)));
      view.cache.mean[page * d + i] = mean;
      scratch->mean[i] = FloatFromHalf(mean);
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < n; i += kThreads) {
    float* chunk = x + 4 * i;
    const float* mean = scratch->mean + 4 * (i % chunks);
    for (int k = 0; k < 4 && role.page_mean; ++k) chunk[k] = Sub(chunk[k], mean[k]);
    norm2[i] = SquaredNorm(chunk);
    if (!IsFinite(norm2[i])) atomicAnd(&finite[i / chunks], 0);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (!finite[i / chunks]) norm2[i] = 0.0f;
  }
  __syncthreads();
  if (role.outlier_capacity > 0) {
    const int dropped = StoreOutliers(view, page, x, norm2, scratch);
    if (dropped && job.status && threadIdx.x == 0) atomicAdd(&job.status->dropped, dropped);
  }

  int32_t* stored = view.cache.scales + page * ScaleWords(role);
  if (role.gain == Gain::kRms) {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float chunk[4] = {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
      const Nearest<float> near = NearestWord(chunk, secondaries, role.secondaries);
      x[4 * i] = near.projection;  // the chunk is used up
      x[4 * i + 1] = near.word;
      x[4 * i + 2] = near.negative;
    }
    __syncthreads();
    for (int t = warp; t < p; t += kWarps) {
      float* own = norm2 + t * chunks;
      const uint32_t nearest =
          ShortScale(HalfFromFloat(WarpTokenScale(role, own, chunks, warp_lane)));
      const uint32_t scale =
          WarpTokenCodes(view, nearest, x + t * d, scratch->middles, own, warp_lane);
      const uint16_t half = finite[t] ? static_cast<uint16_t>(scale << 7) : kHalfNan;
      if (warp_lane == 0) WriteScale(role.gain, half, t, stored);
    }
  } else {
    for (int t = warp; t < p; t += kWarps) {
      const uint16_t scale =
          HalfFromFloat(WarpTokenScale(role, norm2 + t * chunks, chunks, warp_lane));
      if (warp_lane == 0) {
        scales[t] = FloatFromHalf(scale);
        WriteScale(role.gain, finite[t] ? scale : kHalfNan, t, stored);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const float chunk[4] = {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
      const float code = ChunkCode(role, view.layout, chunk, norm2[i], scales[i / chunks],
                                   secondaries, scratch->middles);
      norm2[i] = BitCast<float>(static_cast<int32_t>(code));  // the norms are used up
    }
  }
  __syncthreads();
  const int words = view.layout.words;
  for (int i = threadIdx.x; i < p * words; i += kThreads) {
    codes[i] = static_cast<int32_t>(PackedWord(view.layout, norm2 + i / words * chunks, i % words));
  }
}

}  // namespace

size_t GeneralScratch(const RoleParams& role, int64_t lanes, int tokens) {
  if (role.storage == Storage::kFp16 || FitsShared(role)) return 0;
  return sizeof(float) * PageFloats(role) * lanes * MostPages(tokens, role.page_size);
}

Status EncodeGeneral(const EncodeJob& job, const Gpu& gpu, cudaStream_t stream) {
  size_t shared = 0;
  for (int i = 0; i < job.roles; ++i) {
    const RoleParams& role = job.append.view[job.role + i].role;
    if (role.storage == Storage::kFp16) continue;
    const size_t own =
        FixedShared(role) + (FitsShared(role) ? sizeof(float) * PageFloats(role) : 0);
    shared = own > shared ? own : shared;
  }
  const Call& call = job.append.call;
  const int64_t blocks = static_cast<int64_t>(call.batch) * call.heads * job.most;
  return LaunchEarly(EncodeGeneralKernel, dim3(static_cast<unsigned>(blocks), job.roles), kThreads,
                     shared, stream, job, gpu);
}

}  // namespace cuda
}  // namespace hqmq
