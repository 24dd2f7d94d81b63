// The fused decode kernel: what it takes, how its work is cut, and its launchers.
//
// A *problem* is one sequence, one KV head and a block of up to 8 query rows (positions x heads of
// the group). Its coded keys are cut into *splits*, runs of tiles of 16 tokens, by one of the two
// ways of decode_cut.h: by count, which knows the sequence's own length and the number of sequences
// only, or by work, which knows all lengths and their order. Neither the order of blocks nor the
// capacity nor the GPU changes a bit of y; by count, no other sequence's length or place does. One
// thread block takes one split (an *item*) at a time and writes its part; the block that finishes
// last joins the parts in order.
#pragma once

#include <string>

#include "decode_cut.h"

namespace hqmq {
namespace cuda {

constexpr int kDecodeWarps = 16;
constexpr int kDecodeThreads = kDecodeWarps * kWarp;
constexpr int kMostDecodeTokens = 8;  // T
constexpr int kDecodeTile = 16;       // tokens of a tile: the rows of an MMA
constexpr int kDecodeRows = 8;        // query rows of a problem: the columns of an MMA
// The first tokens of a sequence that are exact lie in tile 0.
static_assert(kMaxSinkTokens <= kDecodeTile, "one tile hides them");
// Warps of the last split of a problem that take the tokens held exactly instead of coded tiles.
constexpr int kOwnWarps = 4;
static_assert(kRoundTiles == kDecodeWarps, "a tile for each warp");
constexpr int kMostStages = 4;
// Blocks of a launch at most.
constexpr int kMostDecodeBlocks = 256;

// Division of 0 … 2^30 by a number the host knows: 0 … 2^30.
struct Divider {
  uint32_t factor, shift;  // x / divisor = (x * factor) >> 32 >> shift

  __host__ static Divider Of(uint32_t divisor) {
    Divider out = {0, 0};
    while ((uint64_t{1} << out.shift) < divisor) ++out.shift;
    const uint64_t power = uint64_t{1} << (31 + out.shift);
    out.factor = static_cast<uint32_t>((power + divisor - 1) / divisor);
    return out;
  }
  __device__ __forceinline__ int operator()(int x) const {
    return static_cast<int>(__umulhi(static_cast<uint32_t>(x) << 1, factor) >> shift);
  }
};

// How a problem is cut by work.
struct alignas(16) WorkCutOf {
  int32_t skip, splits, own, part;  // as in WorkProblem (decode_work.cuh)
};

struct DecodeJob {
  AttentionJob attention;
  int32_t rows;        // T * group
  int32_t row_blocks;  // of 8 rows
  int32_t splits;      // of a problem at most, by count
  int32_t page_shift;  // a page has 2^page_shift tiles
  int32_t pair_mask;   // tile | pair_mask: last tile that may share a stage of two with it
  int32_t page_mask;   // tile | page_mask: last tile of its page
  int32_t head_bits;   // of the number of a head
  int32_t no_mean;     // 0; beyond all tiles if K has no page means
  int32_t stages;      // of tiles that each of them keeps in shared memory, at least 2
  int32_t problems;
  // By count: the first `longer_blocks` blocks take one more than `block_items` of
  // problems * splits.
  int32_t block_items, longer_blocks;
  Divider by_splits, by_batch, by_row_blocks, by_group;
  Divider by_shares;   // 4 * splits - 1: quarters of a split
  float cap, per_cap;  // of scores in base 2: softcap * log2 e, 2 / softcap; 0: none
  float* parts;        // [MostParts, PartFloats]
  float* states;       // [blocks, StateFloats], null: in shared memory
  uint32_t* counters;  // [problems], 0 when the kernel starts
  // Last, so that GPUs with memory for the usual tables read the others where they were.
  int32_t copies[2];      // of the words in K's and V's table, where the instance is compact
  uint32_t shared_bytes;  // dynamic shared memory
  // By work.
  int32_t pieces;                       // 0: the call is cut by count
  int32_t always;                       // 1: it is cut by work even where that takes longer
  int32_t most_items;                   // of a block of kDecodeBlocks, by count
  int32_t block_pieces, longer_pieces;  // as block_items, longer_blocks
  WorkCutOf* cuts;  // [problems], each written by the blocks that have some of it
};

// What an instance of the kernel keeps in the shared memory of a block.
struct DecodeMemory {
  int32_t stages;     // of each warp that takes coded tiles, 0: there is too little memory
  int32_t copies[2];  // of the words in K's and V's table
  int32_t bytes;      // of dynamic shared memory, all in all
};

// Rows that the kernel's accumulators hold: 4 or 8.
__host__ __device__ constexpr int DecodeColumns(int rows) { return rows <= 4 ? 4 : 8; }

// A part: outputs [columns, D], maxima [8], sums [8].
__host__ __device__ constexpr int PartFloats(int columns, int head_dim) {
  return columns * head_dim + 2 * kDecodeRows;
}

// Parts of a problem at most: of each split; one more, whose outputs are empty, if the exact tokens
// do not go with the last split; and behind them that of the exact tokens.
__host__ __device__ constexpr int PartsOf(int splits) { return splits + 2; }
constexpr int kMostParts = PartsOf(kMostSplits);
// By work those of a problem begin with this one. piece: that has its first split. Two problems may
// share a piece, so that the next one begins behind PartsOf(splits) of this one.
constexpr int kPartsBeside = 3;
__host__ __device__ constexpr int FirstPartByWork(int problem, int piece) {
  return problem * kPartsBeside + piece;
}

// What the warps of a block hold of one item: outputs.
__host__ __device__ constexpr int StateFloats(int columns, int head_dim) {
  return kDecodeWarps * columns * head_dim;
}

// Whether the fused kernel takes a call; if not, `why` says what it lacks. Sizes and schemes only.
bool DecodeTakesScheme(const AttentionJob& job, std::string* why);
// The same, with the tensors' types and addresses and the current GPU.
bool FastDecodeSupports(const AttentionJob& job, std::string* why);

// What would run on a GPU that gives a block `shared_limit` bytes of shared memory. Asks no GPU.
bool PlanDecodeMemory(const AttentionJob& job, int shared_limit, hqmq_cuda_decode_memory* plan,
                      std::string* why);
// Blocks take at most so many bytes from now on, 0: what the GPU gives.
void LimitDecodeMemory(int bytes);
// Workspace: counters (of each sequence and head, and the bytes of all), and parts with what else
// blocks keep there.
int DecodeCounters(const AttentionJob& job);
size_t DecodeCounterBytes(const AttentionJob& job);
// most: enough for calls of fewer sequences, too, and for all that MakeBatchInvariant may say.
size_t DecodePartBytes(const AttentionJob& job, bool most);

// Enqueues the kernel, which may start while the kernel before it still runs and waits for it where
// it must; that one has set the counters to 0.
Status Decode(const AttentionJob& job, uint32_t* counters, float* parts, cudaStream_t stream);

}  // namespace cuda
}  // namespace hqmq
