// Which rows and keys a block of prefill attention takes, and where they lie in a tile.
#pragma once

#include "prefill.h"

namespace hqmq {
namespace cuda {

__device__ __forceinline__ int OldestSeen(int time, int window) {
  return window > 0 && time >= window ? time - window + 1 : 0;
}

// 16-byte unit of a tile [D/64, kTokens, 64] that holds elements 8*unit… of a token: eight tokens'
// units lie in different banks.
template <int kTokens>
__device__ __forceinline__ int TileUnit(int token, int unit) {
  return (unit >> 3) * (kTokens * 8) + token * 8 + ((unit ^ token) & 7);
}

// Keys [first, end).
struct KeyRange {
  int first, end;
};

// Keys that a row sees in one way: as codes, or exactly.
__device__ __forceinline__ KeyRange SeenKeys(int time, bool exact, int page_size, int window) {
  const int page = time & ~(page_size - 1), oldest = OldestSeen(time, window);
  if (!exact) return {oldest, page};
  return {oldest > page ? oldest : page, time + 1};
}

// The rows of a block (positions x heads of a group) and the tiles that they see: coded ones, then
// exact ones.
struct PrefillBlock {
  int b, h;
  int64_t lane;
  int in_wave;  // lane - first_lane
  int first_row, first_head;
  Span span;
  int first_time, last_time;  // of rows with a token; first > last: none
  int coded, coded_tiles;     // first coded tile, how many
  int exact, exact_tiles;
  int exact_begin;  // first exact token that some row sees
  int page_size, window;

  __device__ int tiles() const { return coded_tiles + exact_tiles; }
};

// kKeys: tokens of a tile. index = (row block from the last on * lanes + lane) * head_blocks + head
// block: blocks with much to do start first.
template <int kKeys>
__device__ __forceinline__ PrefillBlock BlockOf(const PrefillJob& job, int index) {
  const AttentionJob& a = job.attention;
  PrefillBlock out;
  const int head_block = index % a.head_blocks, rest = index / a.head_blocks;
  out.in_wave = rest % job.lanes;
  const int row_block = a.row_blocks - 1 - rest / job.lanes;
  out.lane = job.first_lane + out.in_wave;
  out.b = static_cast<int>(out.lane / a.call.heads);
  out.h = static_cast<int>(out.lane % a.call.heads);
  out.first_row = row_block * a.positions;
  out.first_head = head_block * a.heads;
  out.page_size = a.key.role.page_size;
  out.window = a.window;
  out.span = SpanOf(a.call, out.page_size, out.b);
  out.first_time = out.span.past + out.first_row;
  const int last = out.first_time + a.positions - 1;
  out.last_time = last < out.span.end ? last : out.span.end - 1;
  out.coded = out.coded_tiles = out.exact = out.exact_tiles = out.exact_begin = 0;
  if (out.first_time > out.last_time) return out;
  const int oldest = OldestSeen(out.first_time, a.window);
  const int coded_end = out.last_time & ~(out.page_size - 1);
  out.coded = oldest / kKeys;
  const int coded_tiles = (coded_end + kKeys - 1) / kKeys - out.coded;
  out.coded_tiles = coded_tiles > 0 ? coded_tiles : 0;
  const int page = out.first_time & ~(out.page_size - 1);
  out.exact_begin = oldest > page ? oldest : page;
  out.exact = out.exact_begin / kKeys;
  out.exact_tiles = out.last_time / kKeys + 1 - out.exact;
  return out;
}

// Tile number `i` of a block.
struct TileOf {
  int first;  // token
  bool exact;
};

template <int kKeys>
__device__ __forceinline__ TileOf TileNumber(const PrefillBlock& block, int i) {
  const bool exact = i >= block.coded_tiles;
  const int tile = exact ? block.exact + i - block.coded_tiles : block.coded + i;
  return {tile * kKeys, exact};
}

// How rows of positions first_time … last_time see keys first … first + count - 1: 0 none of them
// any, 1 in part, 2 all of them all.
__device__ __forceinline__ int Sight(int first_time, int last_time, const TileOf& tile, int count,
                                     int page_size, int window) {
  if (first_time > last_time) return 0;
  const KeyRange old = SeenKeys(first_time, tile.exact, page_size, window);
  const KeyRange young = SeenKeys(last_time, tile.exact, page_size, window);
  if (old.first >= tile.first + count || young.end <= tile.first) return 0;
  return young.first <= tile.first && old.end >= tile.first + count ? 2 : 1;
}

// Tiles [begin, end) of a split.
__device__ __forceinline__ KeyRange SplitTiles(int tiles, int splits, int split) {
  const int share = (tiles + splits - 1) / splits;
  const int each = share > kLeastSplitTiles ? share : kLeastSplitTiles;
  const int begin = split * each, end = begin + each;
  return {begin < tiles ? begin : tiles, end < tiles ? end : tiles};
}

}  // namespace cuda
}  // namespace hqmq
