// HqmqAttention and HqmqDequantize on the CPU.
#pragma once

#include "append.h"
#include "attention_kernels.h"
#include "word_table.h"

namespace hqmq {

// One role's part of HqmqAttention.
struct AttentionRole {
  RoleParams role;
  hqmq_rows x;                        // new k or v [B, H, T, D]
  const float *secondaries, *levels;  // null for storage fp16
  RoleCache cache;                    // in place
  const Words* words;
};

struct AttentionRequest {
  AttentionRole key, value;
  hqmq_rows q;  // [B, H*group, T, D]
  Rows y;       // likewise
  int32_t batch, heads, group, tokens, num_pages;
  const int32_t *past_length, *new_length;  // [B]
  const float* sinks;                       // [H*group] or null
  float scale, softcap;
  int32_t window;
};

// What is wrong with a request, before anything is written: CheckAppend of both roles, or arguments
// that do not fit together.
Status CheckAttention(const AttentionRequest& request, const Threads& threads);

// Appends k and v to the caches, then attends; adds outliers that found no slot to `dropped`.
// CheckAttention must have passed.
void RunAttention(const AttentionRequest& request, const Threads& threads, int64_t* dropped);

// Cache → x. Fails before anything is written.
Status DequantizeCache(DequantizeJob job, const Threads& threads);

}  // namespace hqmq
