// The kernels' launchers, called by cuda_api.cu. Arguments were checked.
#pragma once

#include "launch.h"
#include "views.cuh"

namespace hqmq {
namespace cuda {

// Codes the pages that fill and then writes tails, for one role or two of one call. Between the two
// halves the caches hold the new codes and the old tails, which is what attention reads.
struct AppendJob {
  RoleView view[2];
  float* scratch[2];  // AppendScratch() bytes each
  int32_t roles;
  Call call;
  hqmq_cuda_status* status;  // or null
  // Set to 0 by EncodePages, for the attention after it: so many of each lane (sequence and head).
  uint32_t* counters;
  int32_t lane_counters;
};

size_t AppendScratch(const RoleParams& role, int64_t lanes, int tokens);
// A single token takes no rows of a tail that anybody reads in the same call: EncodePages writes
// them, and WriteTails does nothing. The exact row of one of the first sink_tokens is read by
// queries of later pages only, and the token's own query is of page 0.
Status EncodePages(const AppendJob& job, cudaStream_t stream);
Status WriteTails(const AppendJob& job, cudaStream_t stream);

struct LoadJob {
  RoleView view;  // x is written
  Call call;      // of no new tokens: past_length are the lengths
};

Status Load(const LoadJob& job, cudaStream_t stream);

// Keys one split of the coded cache takes. A constant: bytes of y must not depend on the machine.
constexpr int kSplitTokens = 512;

struct AttentionJob {
  RoleView key, value;
  Call call;
  Rows q, y;
  const float* sinks;  // [H*group] or null
  float scale, softcap;
  int32_t window, group;
  // How rows are cut (CutRows): a block takes `positions` x `heads` of a group's query heads.
  int32_t positions, heads, row_blocks, head_blocks;
  int32_t parts;  // splits of the coded cache, and the own page
  float* states;  // [B*H*group*T, parts, D+2], or null: blocks walk through the parts themselves
};

// Query rows a block takes for a call with `rows` of them for each KV head.
int BlockRows(int64_t rows, int head_dim);
void CutRows(AttentionJob* job, int block_rows);
size_t AttentionStates(const AttentionJob& job);  // bytes, 0: none wanted
// At least AttentionStates of any batch, tokens and pages up to those of `job`.
size_t MostAttentionStates(const AttentionJob& job);
Status Attend(const AttentionJob& job, int block_rows, cudaStream_t stream);

}  // namespace cuda
}  // namespace hqmq
