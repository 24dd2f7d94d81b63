// Plain data passed from the dispatcher (attention.cpp, load.cpp) to the kernels compiled for each
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/params.h"
#include "hqmq_host.h"

namespace hqmq {

// A tensor [B, H, T, D] of an hqmq_dtype with D contiguous; strides in elements.
struct Rows {
  void* data;
  int32_t dtype;
  int64_t batch;
  int64_t head;
  int64_t token;
};

inline void* RowAt(const Rows& rows, int64_t batch, int64_t head, int64_t token) {
  const int64_t element = batch * rows.batch + head * rows.head + token * rows.token;
  return static_cast<char*>(rows.data) + element * (rows.dtype == HQMQ_FLOAT32 ? 4 : 2);
}

// Decoded words of a codebook: [H, 2^index_bits, 4], words past 12*S are zero so that any code
// decodes in bounds.
struct WordTable {
  const float* words;
  const float* levels;  // [2^r]
  int64_t head_stride;  // floats
};

// Tokens one online-softmax step takes, and tokens one split of the cache takes. Constants: a
// request's bytes must not depend on the machine or on what shares its batch.
constexpr int kStepTokens = 64;
constexpr int kBlockTokens = 16;  // decoded at once, into L1
constexpr int kSplitTokens = 1024;
constexpr int kMaxHeadDim = 1024;
constexpr int kMaxBlockRows =
    128;  // query rows (positions x heads of a group) that share a decoded page

struct AttentionJob {
  RoleParams key, value;
  WordTable key_table, value_table;
  RoleCache key_cache, value_cache;         // after the append
  const uint16_t *key_tail, *value_tail;    // [B, H, P+N, D], as before the append
  Rows q, k, v, y;                          // q, y: [B, H*group, T, D]; k, v: [B, H, T, D]
  const int32_t *past_length, *new_length;  // [B]
  const float* sinks;                       // [H*group] or null
  float scale, softcap;
  int32_t window;
  int32_t batch, heads, group, num_pages;
};

// Rows [row, row + count) of one sequence and KV head; all in one page.
struct AttentionBlock {
  int32_t batch, head, row, count;
};

struct DequantizeJob {
  RoleParams role;
  WordTable table;
  RoleCache cache;
  const int32_t* length;  // [B]
  Rows x;                 // [B, H, M*P, D]
  int32_t batch, heads, num_pages;
};

inline int PaddedDim(int head_dim) { return (head_dim + 7) & ~7; }

// Online softmax of some rows: running maximum, sum and output rows.
inline int64_t StateFloats(int rows, int head_dim) {
  return int64_t{rows} * (2 + PaddedDim(head_dim));
}

// What one instruction set offers. `scratch`: AttentionScratch(job, rows) floats, 32-byte aligned.
struct AttentionKernels {
  // All of a block: y of its rows.
  void (*attend)(const AttentionJob&, const AttentionBlock&, float* scratch);
  // One split of the coded pages → state, StateFloats(count * group, D) floats.
  void (*attend_split)(const AttentionJob&, const AttentionBlock&, int split, float* state,
                       float* scratch);
  // States of splits first… (consecutive) and the block's own page → y.
  void (*combine)(const AttentionJob&, const AttentionBlock&, const float* states, int splits,
                  float* scratch);
  // One page (or the tail, or zeros) of HqmqDequantize. scratch: page_size * PaddedDim floats.
  void (*dequantize)(const DequantizeJob&, int batch, int head, int page, float* scratch);
};

inline int64_t AttentionScratch(int rows, int head_dim) {
  const int64_t dim = PaddedDim(head_dim);
  return 2 * rows * dim + 3 * StateFloats(rows, head_dim) + rows * (kStepTokens + 1) +
         (kBlockTokens + 2) * dim + 256;
}

// First split that any row of the block can see, and how many splits hold coded tokens for it.
struct SplitRange {
  int first, end;
};

inline int SplitTokens(int page_size) {
  return page_size > kSplitTokens ? page_size : kSplitTokens;
}

inline SplitRange BlockSplits(const AttentionJob& job, const AttentionBlock& block) {
  const int64_t token = int64_t{job.past_length[block.batch]} + block.row;
  const int64_t coded = token / job.key.page_size * job.key.page_size;
  const int64_t split = SplitTokens(job.key.page_size);
  const int64_t oldest = job.window > 0 && token - job.window + 1 > 0 ? token - job.window + 1 : 0;
  const int64_t end = (coded + split - 1) / split;
  const int64_t first = oldest / split;
  return {static_cast<int>(first < end ? first : end), static_cast<int>(end)};
}

extern const AttentionKernels kAttentionKernelsBaseline;
extern const AttentionKernels kAttentionKernelsX86V3;

const AttentionKernels& BestAttentionKernels();

}  // namespace hqmq
