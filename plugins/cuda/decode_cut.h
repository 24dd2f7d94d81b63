// The rule by which a call's problems are cut: by count or by work.
//
// By count, every problem has as many splits as the host chose for this many problems, and blocks
// take as many items each. Where lengths differ, the longest sequence decides how long that takes.
//
// By work, the problems of a call lie one behind the other on a line, each as long as the time it
// takes: what a part costs its block, the rounds of its coded tiles, and what its exact tokens
// cost. The line is cut into pieces of one length, a piece is what a block takes, and a split is
// what a piece holds of a problem. Pieces end at a problem's border where less than a round of it
// would come before theirs, or no more than one after. So a piece takes at most kMostBeyond rounds
// longer than its length: a part more, as a border cuts a problem in two (kPartRounds); a round
// that the next piece leaves to it; and the exact tokens behind that.
//
// Lengths lie on the device, which cuts by count where they are even (kEvenShift), and else chooses
// by what either takes at most. Only the lengths and the call's shape decide, neither the capacity
// nor the GPU.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace hqmq {
namespace cuda {

constexpr int kMostSplits = 63;
// Blocks that a call is cut for by count: the multiprocessors of an H100. A constant, as the order
// of sums depends on it.
constexpr int kDecodeBlocks = 132;
// By work: fewer, so that GPUs of 128 multiprocessors do not take two pieces one after the other.
constexpr int kDecodePieces = 128;

// An *item* is a split of a problem: its number is that of the problem times 2^kItemBits plus that
// of the split. Where a problem has fewer splits, the numbers behind them are no items. Instances
// that only cut by count number them by problem * splits + split.
constexpr int kItemBits = 6;
static_assert(kMostSplits < 1 << kItemBits, "every split has a number, and one is left");
// Problems of a call at most: numbers of items and of parts are int32.
constexpr int kMostProblems = 1 << 24;

// A round: a tile for each warp. The times of the line are in rounds.
constexpr int kRoundTiles = 16;
// What a part costs: the states of 16 warps are summed, the part is written, read and joined. As
// long as a block takes for so many tiles; on the line whole rounds.
constexpr int kPartTiles = 26;
constexpr int kPartRounds = 2;
// Tiles of a problem's last split from which on the exact tokens have a part of their own.
constexpr int kApartTiles = 96;
constexpr int kLeastPiece = 8;
constexpr int kMostBeyond = kPartRounds + 3;
// Lengths are even where the shortest one is less than the longest one by no more than a part in
// 2^kEvenShift.
constexpr int kEvenShift = 3;
// What by work costs beside: a block looks for its piece, and its problems begin amid others.
constexpr int kSearchRounds = 2;
// No longer line is cut: 2^32 tokens of all heads. Its numbers are exact in 32 bits.
constexpr int kMostLine = 1 << 24;

__host__ __device__ constexpr int RoundsOf(int tiles) {
  return (tiles + kRoundTiles - 1) / kRoundTiles;
}

// Exact tokens take a quarter of the warps of the last split, or a part of their own.
__host__ __device__ constexpr int OwnRounds(int rounds) { return rounds > 3 ? kPartRounds : 1; }

// Length of a problem on the line; one without a token only has rows of zeros to write.
__host__ __device__ constexpr int LineRounds(bool empty, int rounds) {
  return empty ? 1 : kPartRounds + rounds + OwnRounds(rounds);
}

// Length of the pieces of a line. most: rounds of the longest problem, whose splits are at most
// kMostSplits.
__host__ __device__ constexpr int PieceRounds(int line, int most, int pieces) {
  const int even = (line + pieces - 1) / pieces,
            least = (most + kMostSplits - 2) / (kMostSplits - 1);
  const int of_both = even > least ? even : least;
  return of_both > kLeastPiece ? of_both : kLeastPiece;
}

// The splits of a problem that begins at `line`.
struct WorkSplits {
  int first;  // piece that has the first one
  int skip;   // rounds of it before the problem's tiles
  int splits;
};
__host__ __device__ constexpr WorkSplits SplitsByWork(int line, bool empty, int rounds, int piece) {
  const int begin = empty ? line : line + kPartRounds;
  const int first = begin / piece, skip = begin - first * piece;
  // Borders with a round of the problem before them and two behind.
  const int borders = rounds < 2 ? 0 : (skip + rounds - 2) / piece;
  return {first, skip, empty ? 0 : 1 + borders};
}

// Last piece that has a split of the problem, or writes its zeros; at most the piece of the place
// before the problem's end.
__host__ __device__ constexpr int LastPiece(const WorkSplits& of) {
  return of.splits > 1 ? of.first + of.splits - 1 : of.first;
}

// What a call takes, in tiles of a block: by work at most, and by count if it has sequences of the
// longest one's length only, whose splits are of `tiles` and of which a block has so many. apart:
// the exact tokens of each problem are a part more.
__host__ __device__ constexpr int TimeByWork(int piece) {
  return kRoundTiles * (piece + kMostBeyond + kSearchRounds);
}
__host__ __device__ constexpr int64_t TimeByCount(int tiles, bool apart, int items, int splits) {
  return static_cast<int64_t>(items) * (tiles + kPartTiles) +
         (apart ? kPartTiles * ((items + splits - 1) / splits) : 0);
}

struct DecodeJob;

// How the host cuts a call: its shape decides, but for the capacity.
struct Cut {
  int row_blocks, splits;
  int pieces;  // by work, 0: it must not
  int64_t problems;

  int64_t items() const { return problems * splits; }
};

Cut CutOf(const AttentionJob& job);
// Blocks of a launch on a GPU of any size.
int64_t MostBlocks(const Cut& cut);
// Parts in the workspace that any lengths can take.
int64_t MostParts(const Cut& cut);

// Room in the workspace for calls with these params, whatever hqmq_cuda_cut_by_work says. most: of
// fewer sequences, too, and whatever MakeBatchInvariant says.
struct Room {
  int64_t parts, blocks, problems;
};
Room RoomOf(const AttentionJob& job, bool most);
// Fills in what the kernel knows of its cut for `blocks` blocks.
void SetCut(const Cut& cut, int blocks, DecodeJob* job);

// hqmq_cuda_cut_by_work.
enum class WorkCut { kNever, kWhereFaster, kAlways };
void CutByWork(WorkCut when);
// Whether y has the same bits whatever the number and lengths of the other sequences.
void MakeBatchInvariant(bool on);

}  // namespace cuda
}  // namespace hqmq
