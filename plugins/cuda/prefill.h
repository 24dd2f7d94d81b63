// Attention of many new tokens on tensor cores: what it takes, its workspace, and its launchers.
//
// Coded tokens that some query sees are decoded once per sequence and KV head into fp16 tiles, K
// and V rotated back, so that codes and exact tokens meet the same queries and outputs. A kernel in
// the manner of FlashAttention then reads these tiles, and the tokens of the queries' own pages
// from the tail and the call's inputs. Sequences and heads whose tiles fit the workspace together
// run at a time (a *wave*). A row's sums run over the keys in their order, tile by tile from
// multiples of the tile: neither the batch nor the capacity nor the wave changes a bit of y.
#pragma once

#include <string>

#include "kernels.h"

namespace hqmq {
namespace cuda {

constexpr int kPrefillTile = 64;  // tokens of a tile in the workspace
constexpr int kLeastPrefillTokens = 9;
constexpr size_t kMostPrefillBytes = size_t{256} << 20;
// What a call's splits of the keys should fill: two blocks on each multiprocessor of an H100. A
// constant, as the order of sums depends on it.
constexpr int kPrefillBlocks = 264;
constexpr int kMostPrefillSplits = 32;
constexpr int kLeastSplitTiles = 4;

struct PrefillJob {
  AttentionJob attention;
  // [lanes of a wave, 2 (K, V), lane_tiles, padded head_dim / 64, 64 tokens, 64 elements]; the
  // 16-byte units of a token's 128 bytes are stored at unit ^ (token & 7).
  uint16_t* tiles;
  // [lanes of a wave * blocks, splits, rows of a block, padded head_dim + 2]; null for one split
  float* parts;
  int64_t first_lane;  // of the wave
  int32_t lanes;
  int32_t lane_tiles;
  int32_t splits;
  bool wide_tail[2], wide_x[2], wide_y;  // 16-byte loads, 4-byte stores are possible
};

// head_dim of an instance: 64, 128 or 256. Missing elements are 0.
__host__ __device__ constexpr int PaddedDim(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// Whether the kernels take a call; if not, `why` says what they lack. Sizes only.
bool PrefillTakesSizes(const AttentionJob& job, std::string* why);
// The same, with the tensors' types and the current GPU.
bool PrefillSupports(const AttentionJob& job, std::string* why);
// Bytes of workspace, 0: it does not take these sizes.
size_t PrefillBytes(const AttentionJob& job);
// At least PrefillBytes of any batch, tokens and pages up to those of `job`.
size_t MostPrefillBytes(const AttentionJob& job);
Status Prefill(const AttentionJob& job, void* workspace, cudaStream_t stream);

// For comparisons: whether the kernel for sm_90a runs where it can (as at first), or that for
// sm_80.
void AllowSm90Prefill(bool on);

// Of one wave. Defined in prefill_decode.cu, prefill_d*.cu and prefill_sm90_d*.cu.
Status DecodeTiles(const PrefillJob& job, cudaStream_t stream);
template <int D>
Status LaunchPrefill(const PrefillJob& job, cudaStream_t stream);
template <int D>
Status LaunchSm90(const PrefillJob& job, cudaStream_t stream);

}  // namespace cuda
}  // namespace hqmq
