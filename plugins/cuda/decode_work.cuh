// Which keys an item of the decode kernel takes: a function of the sequence's own length.
#pragma once

#include "decode_job.h"
#include "ptx.cuh"

namespace hqmq {
namespace cuda {

struct Problem {
  int b, h, row;  // sequence, KV head, first of its query rows
  int rows;       // of them with a token, 0: none
  Span span;
  int first_time, last_time;  // positions of the first and last of these rows
  int tile, tiles;            // coded tiles that some row sees
  int per_split;              // tiles of a split; the last one takes 3/4 as many
  int splits;                 // that have something to do
};

// Position of row `row` of the call (rows are ordered by token, then head).
__device__ __forceinline__ int RowTime(const AttentionJob& job, const Problem& p, int row) {
  const int time = p.span.past + row / job.group;
  return time < p.last_time ? time : p.last_time;
}

__device__ __forceinline__ int OldestKey(int time, int window) {
  return window > 0 && time >= window ? time - window + 1 : 0;
}

// Problem number `index` = (h * row_blocks + row block) * batch + b.
__device__ __forceinline__ Problem ProblemOf(const DecodeJob& job, int index) {
  const AttentionJob& a = job.attention;
  const int page_size = a.key.role.page_size;
  Problem p;
  const int block = index / a.call.batch;
  p.b = index - block * a.call.batch;
  p.h = block / job.row_blocks;
  p.row = (block - p.h * job.row_blocks) * kDecodeRows;
  p.span = SpanOf(a.call, page_size, p.b);
  const int valid = (p.span.end - p.span.past) * a.group - p.row;
  p.rows = valid < 0 ? 0 : valid < kDecodeRows ? valid : kDecodeRows;
  p.first_time = p.span.past + p.row / a.group;
  p.last_time = p.span.past + (p.row + p.rows - 1) / a.group;
  const int end = (p.last_time & ~(page_size - 1)) / kDecodeTile;
  const int begin = OldestKey(p.first_time, a.window) / kDecodeTile;
  p.tile = begin < end ? begin : end;
  p.tiles = p.rows > 0 ? end - p.tile : 0;
  const int shares = 4 * job.splits - 1;  // quarters of a split
  const int least = kDecodeWarps, share = (4 * p.tiles + shares - 1) / shares;
  p.per_split = share > least ? share : least;
  p.splits = p.rows > 0 ? (4 * p.tiles + p.per_split + 4 * p.per_split - 1) / (4 * p.per_split) : 0;
  return p;
}

struct Tiles {
  int begin, end;
};

// Coded tiles of one warp of a split.
__device__ __forceinline__ Tiles TilesOf(const DecodeJob& job, const Problem& p, int split,
                                         int warp) {
  const int offset = split * p.per_split, rest = p.tiles - offset;
  const int count = rest < 0 ? 0 : rest < p.per_split ? rest : p.per_split;
  constexpr int kLastWarps = kDecodeWarps - kOwnWarps;
  const int warps = split == p.splits - 1 && job.rings > kLastWarps ? kLastWarps : job.rings;
  const int begin = p.tile + offset;
  if (split >= p.splits || warp >= warps) return {begin, begin};
  return {begin + warp * count / warps, begin + (warp + 1) * count / warps};
}

}  // namespace cuda
}  // namespace hqmq
