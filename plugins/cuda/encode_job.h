// The two kernels that code pages: what each takes, and what the fast one shares with its launcher.
#pragma once

#include "kernels.h"

namespace hqmq {
namespace cuda {

// A call with how its rows may be read and its pages are cut.
struct EncodeJob {
  AppendJob append;
  int32_t role, roles;     // the launch codes roles role … role + roles - 1
  bool vector[2];          // HasVectors of each role
  bool fast[2];            // EncodeFast codes the role, and counts what is not finite in its pages
  int32_t most;            // pages of a sequence that this call can fill
  int32_t fewest, pieces;  // EncodeFast: blocks that share a page, at least and at most
};

inline int MostPages(int tokens, int page_size) { return (page_size - 1 + tokens) / page_size; }

constexpr int kEncodeThreads = 256;

// From how many secondaries on the fast kernel asks the tensor cores which ones can win.
constexpr int kFilterSecondaries = 48;

__host__ __device__ inline bool Filtered(const RoleParams& role) {
  return role.secondaries >= kFilterSecondaries;
}

// Chunks of a page that a thread of the fast kernel may keep.
constexpr int kMostSlots = 16;

// Any scheme, head_dim and alignment: a block a page (encode_general.cu).
size_t GeneralScratch(const RoleParams& role, int64_t lanes, int tokens);
Status EncodeGeneral(const EncodeJob& job, const Gpu& gpu, cudaStream_t stream);

// head_dim 64, 128, 256, no outliers (encode.cu).
bool FastEncodeTakes(const RoleView& view, int shared_limit);
Status EncodeFast(const EncodeJob& job, const Gpu& gpu, cudaStream_t stream);

}  // namespace cuda
}  // namespace hqmq
