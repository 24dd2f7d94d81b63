// Which keys an item of the decode kernel takes, by count or by work (decode_cut.h).
#pragma once

#include <type_traits>

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
  int per_split;              // tiles of a split; by count, one with exact tokens takes 3/4 as many
  int splits;                 // that have something to do
  int own;  // number of the part with the exact tokens: the last split's or one more
  static constexpr int piece = 0;  // as in WorkProblem
};

// A problem of a call that may be cut by work.
struct WorkProblem : Problem {
  int piece;  // tiles of a piece, 0: the call is cut by count
  int skip;   // tiles that the first split has less
  int part;   // in the workspace: the first one
};

// kByWork: of an instance that takes calls cut either way, else by count only.
template <bool kByWork>
using ProblemType = std::conditional_t<kByWork, WorkProblem, Problem>;

// Position of row `row` of the call (rows are ordered by token, then head).
__device__ __forceinline__ int RowTime(const DecodeJob& job, const Problem& p, int row) {
  const int time = p.span.past + job.by_group(row);
  return time < p.last_time ? time : p.last_time;
}

__device__ __forceinline__ int OldestKey(int time, int window) {
  return window > 0 && time >= window ? time - window + 1 : 0;
}

// ceil(x / y) for quotients up to 64.
__device__ __forceinline__ int FewOf(int x, int y) {
  int n = static_cast<int>(__fdividef(static_cast<float>(x), static_cast<float>(y)));
  n -= n * y >= x;
  return n + (n * y < x);
}

// Problem number `index` = (h * row_blocks + row block) * batch + b, but for how it is cut.
template <class P = Problem>
__device__ __forceinline__ P KeysOf(const DecodeJob& job, int index) {
  const AttentionJob& a = job.attention;
  const int page_size = a.key.role.page_size;
  P p;
  const int block = job.by_batch(index);
  p.b = index - block * a.call.batch;
  p.h = job.by_row_blocks(block);
  p.row = (block - p.h * job.row_blocks) * kDecodeRows;
  p.span = SpanOf(a.call, page_size, p.b);
  const int valid = (p.span.end - p.span.past) * a.group - p.row;
  p.rows = valid < 0 ? 0 : valid < kDecodeRows ? valid : kDecodeRows;
  p.first_time = p.span.past + job.by_group(p.row);
  p.last_time = p.rows > 0 ? p.span.past + job.by_group(p.row + p.rows - 1) : p.first_time;
  const int end = (p.last_time & ~(page_size - 1)) / kDecodeTile;
  const int begin = OldestKey(p.first_time, a.window) / kDecodeTile;
  p.tile = begin < end ? begin : end;
  p.tiles = p.rows > 0 ? end - p.tile : 0;
  return p;
}

// Splits by count of a problem of so many tiles.
struct CountSplits {
  int per_split;
  bool apart;  // the exact tokens have a part of their own
};
__device__ __forceinline__ CountSplits SplitsByCount(const DecodeJob& job, int tiles) {
  // The exact tokens take a quarter of the last split's warps, or, where all of its warps have
  // enough to do without them, a part of their own: to join one takes as long as 100 tiles.
  const bool apart = tiles > kApartTiles * job.splits * job.splits;
  const int quarters = 4 * tiles, shares = 4 * job.splits - (apart ? 0 : 1);
  const int share =
      apart ? job.by_splits(tiles + job.splits - 1) : job.by_shares(quarters + shares - 1);
  // As many for each warp: a single one more takes them all as long.
  return {max((share + kDecodeWarps - 1) & -kDecodeWarps, kDecodeWarps), apart};
}

// Number in the workspace of the first part of problem number `index`.
__device__ __forceinline__ int FirstPartOf(const DecodeJob& job, const Problem&, int index) {
  return index * PartsOf(job.splits);
}
__device__ __forceinline__ int FirstPartOf(const DecodeJob&, const WorkProblem& p, int) {
  return p.part;
}

// Problem number `index`. piece: as in WorkProblem.
template <bool kByWork>
__device__ __forceinline__ ProblemType<kByWork> ProblemOf(const DecodeJob& job, int index,
                                                          int piece) {
  ProblemType<kByWork> p = KeysOf<ProblemType<kByWork>>(job, index);
  if constexpr (kByWork) {
    p.piece = piece;
    if (piece > 0) {
      const WorkCutOf of = job.cuts[index];
      p.per_split = piece;
      p.skip = of.skip;
      p.splits = of.splits;
      p.own = of.own;
      p.part = of.part;
      return p;
    }
  }
  const CountSplits of = SplitsByCount(job, p.tiles);
  p.per_split = of.per_split;
  p.splits = 0;
  if (p.rows > 0) p.splits = FewOf(4 * p.tiles + (of.apart ? 0 : p.per_split), 4 * p.per_split);
  p.own = p.splits - !of.apart;
  if constexpr (kByWork) {
    p.skip = 0;
    p.part = index * PartsOf(job.splits);
  }
  return p;
}

// Where a sequence and head has its pages: the number of the first one, or, with a page table, what
// PageOf looks up.
__device__ __forceinline__ int PagesOf(const DecodeJob& job, int b, int h) {
  const Call& call = job.attention.call;
  return call.pages.pool_pages > 0 ? b << job.head_bits | h : (b * call.heads + h) * call.num_pages;
}

// PageIndex of page m of a sequence and head. pages: its PagesOf.
__device__ __forceinline__ int PageOf(const DecodeJob& job, int pages, int m) {
  const Call& call = job.attention.call;
  if (call.pages.pool_pages == 0) return pages + m;
  const int b = pages >> job.head_bits;
  return PageIndex(call, b, pages - (b << job.head_bits), m);
}

struct Tiles {
  int begin, end;
};

// Coded tiles of a split: how many, and the first one, which means nothing where there are none.
// Clamping it costs hq3 12 bytes of spills.
__device__ __forceinline__ int TilesOfSplit(const Problem& p, int split, int* offset) {
  *offset = split * p.per_split;
  const int rest = p.tiles - *offset;
  return rest < 0 ? 0 : rest < p.per_split ? rest : p.per_split;
}
__device__ __forceinline__ int TilesOfSplit(const WorkProblem& p, int split, int* offset) {
  const int border = split * p.per_split - p.skip;
  *offset = min(max(border, 0), p.tiles);
  // By work the last one may have a round more than others.
  const int to = split + 1 < p.splits ? min(border + p.per_split, p.tiles) : p.tiles;
  return to - *offset;
}

// Coded tiles of one warp of a split; kRings: warps that take such tiles. None in a part beyond the
// splits.
template <int kRings, class P>
__device__ __forceinline__ Tiles TilesOf(const P& p, int split, int warp) {
  int offset;
  const int count = TilesOfSplit(p, split, &offset);
  constexpr int kOthers = kDecodeWarps - kOwnWarps,
                kLastRings = kRings < kOthers ? kRings : kOthers;
  const bool last = split == p.own;
  const int begin = p.tile + offset;
  if (split >= p.splits || warp >= (last ? kLastRings : kRings)) return {begin, begin};
  if (last) return {begin + warp * count / kLastRings, begin + (warp + 1) * count / kLastRings};
  return {begin + warp * count / kRings, begin + (warp + 1) * count / kRings};
}

// Items of a block: those with the numbers [begin, end) that are some (decode_cut.h).
struct Items {
  int begin, end;
};

// The number of an item of a call that may be cut by work.
__device__ __forceinline__ int ItemOf(int problem, int split) {
  return problem << kItemBits | split;
}
__device__ __forceinline__ int ProblemOfItem(int item) { return item >> kItemBits; }
__device__ __forceinline__ int SplitOfItem(int item) { return item & ((1 << kItemBits) - 1); }

struct Item {
  int problem, split;
};
// The item of a number.
template <bool kByWork>
__device__ __forceinline__ Item ItemAt(const DecodeJob& job, int number) {
  if constexpr (kByWork) return {ProblemOfItem(number), SplitOfItem(number)};
  const int problem = job.by_splits(number);
  return {problem, number - problem * job.splits};
}

}  // namespace cuda
}  // namespace hqmq
