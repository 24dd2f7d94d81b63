// Codes of whole pages into the fp16 tiles of prefill attention: page mean added, rotated back; but
// the first tokens of a sequence (sink_tokens) as they are.
#include "decode_tile.cuh"
#include "prefill.h"
#include "prefill_work.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// A finite value as a finite fp16: a decoded value may pass what the coded one was below. NaN, and
// infinity that storage fp16 holds, stay.
__device__ __forceinline__ uint16_t FiniteHalf(float x) {
  if (isinf(x)) return HalfFromFloat(x);
  return HalfFromFloat(x > kHalfMax ? kHalfMax : x < -kHalfMax ? -kHalfMax : x);
}

// Hadamard of codec/hadamard.h over rows of `chunks` chunks, a chunk a lane (and 32 lanes further).
template <int N>
__device__ __forceinline__ void LaneHadamard(float (&x)[N][4], int chunks, float scale, int lane) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float a = x[n][0] + x[n][1], b = x[n][0] - x[n][1];
    const float c = x[n][2] + x[n][3], d = x[n][2] - x[n][3];
    x[n][0] = (a + c) * scale;
    x[n][1] = (b + d) * scale;
    x[n][2] = (a - c) * scale;
    x[n][3] = (b - d) * scale;
  }
  for (int stride = 1; stride < chunks && stride < kWarp; stride *= 2) {
    const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        x[n][k] = Fma(sign, x[n][k], __shfl_xor_sync(kAllLanes, x[n][k], stride));
  }
  if constexpr (N == 2) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float low = x[0][k], high = x[1][k];
      x[0][k] = low + high;
      x[1][k] = low - high;
    }
  }
}

// Chunk c of token t of a page (PageIndex), page mean added, still rotated. `bit`: of the chunk in
// `outliers`.
__device__ __forceinline__ void LoadChunk(const RoleView& view, int64_t page, int h, int t, int c,
                                          int bit, const OutlierScratch& outliers, float out[4]) {
  const RoleParams& role = view.role;
  const Layout& layout = view.layout;
  const int64_t row = page * role.page_size + t;
  const int32_t* words = view.cache.codes + row * layout.words;
  if (role.storage == Storage::kFp16) {
    for (int k = 0; k < 2; ++k) {
      const uint32_t word = static_cast<uint32_t>(words[2 * c + k]);
      out[2 * k] = FloatFromHalf(static_cast<uint16_t>(word));
      out[2 * k + 1] = FloatFromHalf(static_cast<uint16_t>(word >> 16));
    }
    return;
  }
  if (role.outlier_capacity > 0 && (outliers.mask[bit >> 5] >> (bit & 31) & 1)) {
    const uint32_t below = outliers.mask[bit >> 5] & ((1u << (bit & 31)) - 1);
    const int slot = min(outliers.before[bit >> 5] + __popc(below), role.outlier_capacity - 1);
    const uint16_t* value = view.cache.outlier_value + (page * role.outlier_capacity + slot) * 4;
    for (int k = 0; k < 4; ++k) out[k] = FloatFromHalf(value[k]);
  } else {
    const uint32_t code =
        WithinCodebook(layout, UnpackCode(layout, c, words), 12u * role.secondaries - 1);
    const uint32_t index = code & ((1u << layout.index_bits) - 1);
    const uint32_t level = code >> layout.index_bits & ((1u << layout.radius_bits) - 1);
    const float size =
        Mul(view.levels[level], FloatFromHalf(ReadScale(role.gain, view.cache.scales, row)));
    const float radius = code >> (layout.index_bits + layout.radius_bits) ? -size : size;
    const float* secondaries = view.secondaries + static_cast<int64_t>(h) * role.secondaries * 4;
    const float4 q = reinterpret_cast<const float4*>(secondaries)[index / 12];
    CodewordInFloat(static_cast<int>(index % 12), q, out);
    for (int k = 0; k < 4; ++k) out[k] = Mul(out[k], radius);
  }
  if (role.page_mean) {
    const uint16_t* mean = view.cache.mean + page * role.head_dim + 4 * c;
    for (int k = 0; k < 4; ++k) out[k] = Add(out[k], FloatFromHalf(mean[k]));
  }
}

// The first tokens of a sequence, exactly, over their rows of tile 0. All threads. Apart, so that
// the loop that decodes keeps its registers.
__device__ __noinline__ void StoreSinks(const AttentionJob& a, const RoleView& view, int64_t lane,
                                        uint16_t* to) {
  const int b = static_cast<int>(lane / a.call.heads), h = static_cast<int>(lane % a.call.heads);
  const Span span = SpanOf(a.call, view.role.page_size, b);
  const int d = view.role.head_dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < view.role.sink_tokens * d; i += kThreads) {
    const int t = i / d, element = i - t * d;
    to[8 * TileUnit<kPrefillTile>(t, element / 8) + element % 8] =
        TokenHalf(view, span, b, h, lane, t, element, false);
  }
}

// Beside kNoPage: tokens that no row sees.
constexpr int kUnseen = -2;

// A tile of one lane of the wave and role: x = tile + lane_tiles * lane, y = role.
template <int D>
__global__ void __launch_bounds__(kThreads, D > 128 ? 10 : 12)
    DecodeTilesKernel(const __grid_constant__ PrefillJob job) {
  __shared__ OutlierScratch outliers;
  constexpr int N = D > 128 ? 2 : 1;       // chunks of a lane
  constexpr int kWidth = D / (4 * N);      // lanes of a token
  constexpr int kTokens = kWarp / kWidth;  // tokens of a warp at a time
  const AttentionJob& a = job.attention;
  const RoleView& view = blockIdx.y ? a.value : a.key;
  const RoleParams& role = view.role;
  const int p = role.page_size, chunks = role.head_dim / 4;
  const int in_wave = blockIdx.x / job.lane_tiles;
  const int first = (blockIdx.x - in_wave * job.lane_tiles) * kPrefillTile;
  const int64_t lane = job.first_lane + in_wave;
  const int b = static_cast<int>(lane / a.call.heads), h = static_cast<int>(lane % a.call.heads);
  const Span span = SpanOf(a.call, p, b);
  if (span.end == span.past) return;
  const int end = (span.end - 1) & ~(p - 1);  // what the newest row sees as codes
  const int oldest = OldestSeen(span.past, a.window);
  if (first >= end || first + kPrefillTile <= oldest) return;

  uint16_t* to =
      job.tiles +
      (static_cast<int64_t>(in_wave) * 2 + blockIdx.y) * job.lane_tiles * (kPrefillTile * D) +
      static_cast<int64_t>(first) * D;
  const int warp = threadIdx.x / kWarp, warp_lane = threadIdx.x % kWarp;
  const int token_of_lane = warp_lane / kWidth, chunk_of_lane = warp_lane % kWidth;
  const int count = TileTokens(p);
  for (int start = 0; start < kPrefillTile; start += count) {
    // Tokens that no row sees are zeros: their page may be back in the pool.
    const bool seen = first + start < end && first + start + count > oldest;
    const int page = seen ? PageIndex(a.call, b, h, (first + start) / p) : kUnseen;
    const int in_page = (first + start) & (p - 1);
    if (page >= 0 && role.outlier_capacity > 0) {
      __syncthreads();
      if (warp == 0) {
        LoadOutlierMask(view.cache.outlier_mask + static_cast<int64_t>(page) * view.mask_words,
                        in_page, count, chunks, &outliers);
      }
      __syncthreads();
    }
    for (int base = warp * kTokens; base < count; base += kWarps * kTokens) {
      const int t = base + token_of_lane;
      float x[N][4];
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int c = chunk_of_lane + n * kWarp;
#pragma unroll
        for (int k = 0; k < 4; ++k) x[n][k] = page == kNoPage ? BitCast<float>(0x7FC00000u) : 0.0f;
        if (page >= 0 && t < count && c < chunks)
          LoadChunk(view, page, h, in_page + t, c, t * chunks + c, outliers, x[n]);
      }
      if (role.hadamard) LaneHadamard(x, chunks, view.hadamard_scale, warp_lane);
      if (t >= count) continue;
      const int row = start + t;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int c = chunk_of_lane + n * kWarp;
        const uint32_t low = FiniteHalf(x[n][0]) | static_cast<uint32_t>(FiniteHalf(x[n][1])) << 16;
        const uint32_t high = FiniteHalf(x[n][2]) | static_cast<uint32_t>(FiniteHalf(x[n][3]))
                                                        << 16;
        const int unit = TileUnit<kPrefillTile>(row, c / 2);
        *reinterpret_cast<uint2*>(to + unit * 8 + (c & 1) * 4) = make_uint2(low, high);
      }
    }
  }
  if (first == 0 && role.sink_tokens > 0) {
    __syncthreads();
    StoreSinks(a, view, lane, to);
  }
}

template <int D>
Status LaunchDecode(const PrefillJob& job, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(job.lanes) * job.lane_tiles, 2);
  return Launch(DecodeTilesKernel<D>, grid, kThreads, 0, stream, job);
}

}  // namespace

Status DecodeTiles(const PrefillJob& job, cudaStream_t stream) {
  if (job.lane_tiles == 0) return {};
  switch (PaddedDim(job.attention.key.role.head_dim)) {
    case 64:
      return LaunchDecode<64>(job, stream);
    case 128:
      return LaunchDecode<128>(job, stream);
    default:
      return LaunchDecode<256>(job, stream);
  }
}

}  // namespace cuda
}  // namespace hqmq
