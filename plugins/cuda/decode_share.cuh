// What a block of the decode kernel takes, from the lengths on the device.
#pragma once

#include "decode_work.cuh"

namespace hqmq {
namespace cuda {

// What the threads of a block tell each other to find its share.
struct ShareScratch {
  int32_t rounds[kDecodeWarps], tiles[kDecodeWarps], sums[kDecodeWarps];
  Items items;
  int32_t line;  // where the problem of the first one begins
};

// Of things that blocks share evenly, those of one block. The first `longer` ones have one more
// than `each`.
struct EvenShare {
  int begin, end;
};
__device__ __forceinline__ EvenShare EvenShareOf(int each, int longer, int block) {
  const int begin = block * each + min(block, longer);
  return {begin, begin + each + (block < longer)};
}

// Items of a block of a call that is cut by count.
template <bool kByWork>
__device__ __forceinline__ Items ItemsByCount(const DecodeJob& job, int block) {
  const EvenShare share = EvenShareOf(job.block_items, job.longer_blocks, block);
  if constexpr (!kByWork) return {share.begin, share.end};
  const auto item = [&](int number) {
    const Item of = ItemAt<false>(job, number);
    return ItemOf(of.problem, of.split);
  };
  return {item(share.begin), item(share.end)};
}

// Whether lengths are so even (kEvenShift) that a call is cut by count without looking further:
// few instructions, as all calls of several sequences pay for them. All lanes.
__device__ __forceinline__ bool AreEven(const DecodeJob& job, int lane) {
  const Call& call = job.attention.call;
  const int window = job.attention.window;
  uint32_t longest = 0, shortest = 0x7FFFFFFFu;
#pragma unroll 4
  for (int b = lane; b < call.batch; b += kWarp) {
    const int past = call.past_length[b];
    uint32_t length = call.new_length[b] > 0 ? max(past, 0) : 0;
    if (window > 0) length = min(length, static_cast<uint32_t>(window));
    longest = max(longest, length);
    shortest = min(shortest, length);
  }
  longest = __reduce_max_sync(kAllLanes, longest);
  shortest = __reduce_min_sync(kAllLanes, shortest);
  return longest - shortest <= longest >> kEvenShift;
}

// Length of a problem on the line.
__device__ __forceinline__ int LineOf(const Problem& p) {
  return LineRounds(p.rows == 0, RoundsOf(p.tiles));
}

// The problems of one head, which every other one has, too: their line's length, at most kMostLine,
// and the most tiles of one.
struct HeadLine {
  int rounds, tiles;
};

__device__ __forceinline__ int LargestOfWarp(int x) {
  return static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<uint32_t>(x)));
}

// All threads, of kWarps warps. Synchronises them only if a warp cannot look at all at once.
template <int kWarps>
__device__ __forceinline__ HeadLine HeadLineOf(const DecodeJob& job, ShareScratch* scratch,
                                               int warp, int lane) {
  const int count = job.row_blocks * job.attention.call.batch;
  const bool few = count <= kWarp;
  HeadLine line = {0, 0};
#pragma unroll 1
  for (int index = few ? lane : static_cast<int>(threadIdx.x); index < count;
       index += kWarps * kWarp) {
    const Problem p = KeysOf(job, index);
    line.rounds = min(line.rounds + LineOf(p), kMostLine);
    line.tiles = max(line.tiles, p.tiles);
  }
  line = {min(__reduce_add_sync(kAllLanes, line.rounds), kMostLine), LargestOfWarp(line.tiles)};
  if (few) return line;
  if (lane == 0) {
    scratch->rounds[warp] = line.rounds;
    scratch->tiles[warp] = line.tiles;
  }
  __syncthreads();
  const bool has = lane < kWarps;
  return {min(__reduce_add_sync(kAllLanes, has ? scratch->rounds[lane] : 0), kMostLine),
          LargestOfWarp(has ? scratch->tiles[lane] : 0)};
}

// Rounds of a piece, 0: the call is cut by count, as that takes no longer.
__device__ __forceinline__ int PieceOf(const DecodeJob& job, const HeadLine& line) {
  const int64_t rounds = static_cast<int64_t>(line.rounds) * job.attention.call.heads;
  if (rounds >= kMostLine) return 0;
  const int piece = PieceRounds(static_cast<int>(rounds), RoundsOf(line.tiles), job.pieces);
  const CountSplits of = SplitsByCount(job, line.tiles);
  const bool faster =
      TimeByWork(piece) < TimeByCount(of.per_split, of.apart, job.most_items, job.splits);
  return faster || job.always ? piece : 0;
}

// Sum over the lanes up to this one.
__device__ __forceinline__ int SumUpTo(int x, int lane) {
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, offset);
    if (lane >= offset) x += other;
  }
  return x;
}

// Sum over the threads before this one; *all: over all of them. All threads.
template <int kWarps>
__device__ __forceinline__ int SumBefore(int x, ShareScratch* scratch, int warp, int lane,
                                         int* all) {
  const int up_to = SumUpTo(x, lane);
  __syncthreads();  // those of the call before are read
  if (lane == kWarp - 1) scratch->sums[warp] = up_to;
  __syncthreads();
  const int of_warps = SumUpTo(lane < kWarps ? scratch->sums[lane] : 0, lane);
  *all = __shfl_sync(kAllLanes, of_warps, kWarps - 1);
  const int before = __shfl_sync(kAllLanes, of_warps, max(warp - 1, 0));
  return (warp > 0 ? before : 0) + up_to - x;
}

// Items of the block of a call that is cut by work into pieces of so many rounds, and how their
// problems are cut, into job.cuts. All threads, which are synchronised.
template <int kWarps>
__device__ __forceinline__ Items ItemsByWork(const DecodeJob& job, const HeadLine& of_head,
                                             int piece, ShareScratch* scratch, int block, int warp,
                                             int lane) {
  const int count = job.row_blocks * job.attention.call.batch;
  const EvenShare share = EvenShareOf(job.block_pieces, job.longer_pieces, block);
  const int pieces[2] = {share.begin, share.end};
  int head[2], place[2];  // where they begin on the line of which head
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    head[i] = pieces[i] * piece / of_head.rounds;
    place[i] = pieces[i] * piece - head[i] * of_head.rounds;
  }
  if (threadIdx.x == 0) scratch->items = {ItemOf(job.problems, 0), ItemOf(job.problems, 0)};
#pragma unroll 1
  for (int base = 0, line = 0; base < count; base += kWarps * kWarp) {
    const int index = base + static_cast<int>(threadIdx.x);
    int length = 0, all;
    Problem p = {};
    if (index < count) {
      p = KeysOf(job, index);
      length = LineOf(p);
    }
    const int begin = line + SumBefore<kWarps>(length, scratch, warp, lane, &all);
    line += all;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (head[i] >= job.attention.call.heads || begin > place[i] || begin + length <= place[i])
        continue;
      // The first problem that ends behind the piece's beginning. The piece before may have all
      // splits of it.
      int problem = head[i] * count + index, at = head[i] * of_head.rounds + begin;
      const WorkSplits of = SplitsByWork(at, p.rows == 0, RoundsOf(p.tiles), piece);
      int split = max(pieces[i] - of.first, 0);
      if (LastPiece(of) < pieces[i]) {
        ++problem;
        at += length;
        split = 0;
      }
      if (i == 0) {
        scratch->items.begin = ItemOf(problem, split);
        scratch->line = at;
      } else {
        scratch->items.end = ItemOf(problem, split);
      }
    }
  }
  __syncthreads();
  const Items items = scratch->items;
  const int end = items.begin < items.end ? ProblemOfItem(items.end - 1) + 1 : 0;
#pragma unroll 1
  for (int base = ProblemOfItem(items.begin), line = scratch->line; base < end;
       base += kWarps * kWarp) {
    const int index = base + static_cast<int>(threadIdx.x);
    int length = 0, all;
    Problem p = {};
    if (index < end) {
      p = KeysOf(job, index);
      length = LineOf(p);
    }
    const int begin = line + SumBefore<kWarps>(length, scratch, warp, lane, &all);
    line += all;
    if (index >= end) continue;
    const WorkSplits of = SplitsByWork(begin, p.rows == 0, RoundsOf(p.tiles), piece);
    const int skip = of.skip * kRoundTiles;
    const int before = of.splits > 1 ? (of.splits - 1) * piece * kRoundTiles - skip : 0;
    const int own = of.splits - (p.tiles - before <= kApartTiles);
    job.cuts[index] = {skip, of.splits, own, FirstPartByWork(index, of.first)};
  }
  __syncthreads();
  return items;
}

// What a block takes.
struct Share {
  Items items;
  int piece;  // as in WorkProblem
};

// The block's share of a call that may be cut by work; by_count: its items where it is not. All
// threads.
template <int kWarps>
__device__ __forceinline__ Share ShareOf(const DecodeJob& job, const Items& by_count,
                                         ShareScratch* scratch, int block, int warp, int lane) {
  if (!job.always && AreEven(job, lane)) return {by_count, 0};
  const HeadLine line = HeadLineOf<kWarps>(job, scratch, warp, lane);
  const int piece = PieceOf(job, line);
  if (piece == 0) return {by_count, 0};
  return {ItemsByWork<kWarps>(job, line, piece, scratch, block, warp, lane), piece * kRoundTiles};
}

}  // namespace cuda
}  // namespace hqmq
