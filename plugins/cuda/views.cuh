// What kernels know of a role, a call and a sequence, and the row helpers they share.
#pragma once

#include <cstdint>

#include "codec/encode.h"
#include "codec/layout.h"
#include "hqmq_cuda.h"

namespace hqmq {
namespace cuda {

constexpr int kMaxHeadDim = 256;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Activations [B, H, T, D] with D contiguous; strides in elements.
struct Rows {
  void* data;
  int32_t dtype;
  int64_t batch, head, token;
};

// One role of one call, as kernels get it.
struct RoleView {
  RoleParams role;
  Layout layout;
  int32_t mask_words;
  float hadamard_scale;
  RoleCache cache;
  const float* secondaries;  // [H, S, 4]
  const float* levels;       // [2^r]
  Rows x;                    // new tokens
};

// Which pages of a pool sequences have (hqmq_cuda_pages); all 0: pages lie sequence after sequence.
struct PageTable {
  const int32_t* entries;  // [B, num_pages]
  int32_t pool_pages;
};

struct Call {
  int32_t batch, heads, tokens, num_pages;
  const int32_t *past_length, *new_length;  // [B]
  PageTable pages;
};

// Tokens of one sequence: held before the call, held after it, and those that found no page.
struct Span {
  int past, end, lost;
};

__device__ __forceinline__ int Clamp(int64_t x, int64_t low, int64_t high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

__device__ __forceinline__ Span SpanOf(const Call& call, int page_size, int b) {
  const int64_t capacity = static_cast<int64_t>(call.num_pages) * page_size;
  const int past = Clamp(call.past_length[b], 0, capacity);
  const int added = Clamp(call.new_length[b], 0, call.tokens);
  const int end = Clamp(static_cast<int64_t>(past) + added, 0, capacity);
  return {past, end, past + added - end};
}

// A page that no entry of the table names.
constexpr int kNoPage = -1;

// Where page m of a sequence and head lies in the page tensors, in pages of one head: all of their
// addresses are multiples of it. kNoPage: the table's entry lies outside the pool. Asked only for
// pages that are full, or fill: other entries, and those beyond num_pages, are not to be read. The
// numbers fit: cuda_api.cu checks it.
__device__ __forceinline__ int PageIndex(const Call& call, int b, int h, int m) {
  if (call.pages.pool_pages == 0) return (b * call.heads + h) * call.num_pages + m;
  const int entry = call.pages.entries[b * call.num_pages + m];
  if (static_cast<uint32_t>(entry) >= static_cast<uint32_t>(call.pages.pool_pages)) return kNoPage;
  return entry * call.heads + h;
}

__device__ __forceinline__ float LoadFloat(const Rows& x, int64_t element) {
  if (x.dtype == HQMQ_FLOAT32) return static_cast<const float*>(x.data)[element];
  const uint16_t bits = static_cast<const uint16_t*>(x.data)[element];
  return x.dtype == HQMQ_FLOAT16 ? FloatFromHalf(bits) : FloatFromBf16(bits);
}

__device__ __forceinline__ uint16_t LoadHalf(const Rows& x, int64_t element) {
  if (x.dtype == HQMQ_FLOAT16) return static_cast<const uint16_t*>(x.data)[element];
  return HalfFromFloat(LoadFloat(x, element));
}

__device__ __forceinline__ void StoreFloat(const Rows& x, int64_t element, float value) {
  if (x.dtype == HQMQ_FLOAT32) {
    static_cast<float*>(x.data)[element] = value;
  } else {
    static_cast<uint16_t*>(x.data)[element] =
        x.dtype == HQMQ_FLOAT16 ? HalfFromFloat(value) : Bf16FromFloat(value);
  }
}

__device__ __forceinline__ int64_t RowStart(const Rows& x, int64_t b, int64_t h, int64_t t) {
  return b * x.batch + h * x.head + t * x.token;
}

// A row that holds a token exactly: of the call's new tokens (`fresh`), or of the lane's tail.
struct ExactRow {
  int row;
  bool fresh;
};

// Where token t of a sequence is read exactly, the tail being as it was before the call. `own`: by
// queries of the token's own page, and to code that page. Else t is one of the first sink_tokens
// and read by queries of later pages. Rows t mod P of the tail may then hold younger tokens.
__device__ __forceinline__ ExactRow ExactRowOf(const RoleParams& role, const Span& span, int t,
                                               bool own) {
  if (t >= span.past) return {t - span.past, true};
  return {own ? t & (role.page_size - 1) : role.page_size + t, false};
}

// First element of row `row` of the tail of a lane (sequence and head).
__device__ __forceinline__ int64_t TailStart(const RoleParams& role, int64_t lane, int row) {
  return (lane * TailRows(role) + row) * role.head_dim;
}

// Element of token t as fp16, from where ExactRowOf says.
__device__ __forceinline__ uint16_t TokenHalf(const RoleView& view, const Span& span, int64_t b,
                                              int64_t h, int64_t lane, int t, int element,
                                              bool own) {
  const ExactRow exact = ExactRowOf(view.role, span, t, own);
  if (exact.fresh) return LoadHalf(view.x, RowStart(view.x, b, h, exact.row) + element);
  return view.cache.tail[TailStart(view.role, lane, exact.row) + element];
}

// Hadamard (codec/hadamard.h) of one row by one warp, in place. The row must be visible to the warp
// before; it is after.
__device__ __forceinline__ void WarpHadamard(float* row, int size, float scale, int lane) {
  for (int stride = 1; stride < size; stride *= 2) {
    for (int i = lane; i < size / 2; i += kWarp) {
      const int offset = i & (stride - 1), at = 2 * (i - offset) + offset;
      const float low = row[at], high = row[at + stride];
      row[at] = Add(low, high);
      row[at + stride] = Sub(low, high);
    }
    __syncwarp();
  }
  for (int i = lane; i < size; i += kWarp) row[i] = Mul(row[i], scale);
  __syncwarp();
}

__device__ __forceinline__ float WarpSum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = Add(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

__device__ __forceinline__ float WarpMax(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

__device__ __forceinline__ int WarpSum(int x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

}  // namespace cuda
}  // namespace hqmq
