// How the host cuts a call of the fused decode kernel, and the memory for all that the device may
// make of it.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "decode_cut.h"
#include "decode_job.h"

namespace hqmq {
namespace cuda {
namespace {

std::atomic<bool> batch_invariant{std::getenv("HQMQ_BATCH_INVARIANT") != nullptr};

WorkCut WantedAtFirst() {
  const char* set = std::getenv("HQMQ_CUT_BY_WORK");
  return set && *set == '0' ? WorkCut::kNever : WorkCut::kWhereFaster;
}
std::atomic<WorkCut> work_cut{WantedAtFirst()};

// Splits of each of so many problems: enough for all blocks, but as few as that takes, as every one
// costs as long as a twentieth of a problem of usual length (its warps' states and parts are
// joined).
int SplitsFor(int64_t problems) {
  // A call asks several times, and the next layer for as many again.
  thread_local int64_t last_problems = 0;
  thread_local int best = 1;
  if (problems == last_problems) return best;
  last_problems = problems;
  best = 1;
  double least = 0.0;
  for (int splits = 1; splits <= kMostSplits; ++splits) {
    const int64_t of_block = (problems * splits + kDecodeBlocks - 1) / kDecodeBlocks;
    const double time = static_cast<double>(of_block) * (20.0 / splits + 1.0);
    if (splits == 1 || time < least) least = time, best = splits;
  }
  return best;
}

// From so many problems on SplitsFor says 1: with x = problems / kDecodeBlocks, n splits take at
// least x (20 + n), a single one less than 21 (x + 1).
constexpr int64_t kMostSplitProblems = 21 * kDecodeBlocks;

Cut MakeCut(const AttentionJob& job, bool invariant) {
  const int rows = job.group * job.call.tokens;
  Cut cut = {};
  cut.row_blocks = (rows + kDecodeRows - 1) / kDecodeRows;
  const int64_t blocks = static_cast<int64_t>(job.call.heads) * cut.row_blocks;
  cut.problems = blocks * job.call.batch;
  cut.splits = SplitsFor(invariant ? blocks : cut.problems);
  // A single sequence has problems of one length.
  if (!invariant && job.call.batch > 1) cut.pieces = kDecodePieces;
  return cut;
}

}  // namespace

Cut CutOf(const AttentionJob& job) {
  Cut cut = MakeCut(job, batch_invariant);
  if (work_cut == WorkCut::kNever) cut.pieces = 0;
  return cut;
}

int64_t MostBlocks(const Cut& cut) {
  return std::min<int64_t>(std::max<int64_t>(cut.items(), cut.pieces), kMostDecodeBlocks);
}

int64_t MostParts(const Cut& cut) {
  return std::max(cut.problems * PartsOf(cut.splits),
                  cut.pieces > 0 ? cut.problems * kPartsBeside + cut.pieces : 0);
}

Room RoomOf(const AttentionJob& job, bool most) {
  Room room = {};
  const auto add = [&](const Cut& cut) {
    room.parts = std::max(room.parts, MostParts(cut));
    room.blocks = std::max(room.blocks, MostBlocks(cut));
    if (cut.pieces > 0) room.problems = std::max(room.problems, cut.problems);
  };
  if (!most) {
    add(MakeCut(job, batch_invariant));
    return room;
  }
  AttentionJob fewer = job;
  add(MakeCut(job, false));
  add(MakeCut(job, true));
  for (fewer.call.batch = 1; fewer.call.batch < job.call.batch; ++fewer.call.batch) {
    const Cut cut = MakeCut(fewer, false);
    if (cut.problems >= kMostSplitProblems) break;  // from here on more have more parts
    add(cut);
  }
  return room;
}

void SetCut(const Cut& cut, int blocks, DecodeJob* job) {
  const auto divider = [](int64_t divisor) { return Divider::Of(static_cast<uint32_t>(divisor)); };
  job->row_blocks = cut.row_blocks;
  job->splits = cut.splits;
  job->problems = static_cast<int>(cut.problems);
  const int items = static_cast<int>(cut.items());
  job->block_items = items / blocks;
  job->longer_blocks = items % blocks;
  job->most_items = (items + kDecodeBlocks - 1) / kDecodeBlocks;
  job->pieces = cut.pieces;
  job->always = work_cut == WorkCut::kAlways;
  job->block_pieces = cut.pieces / blocks;
  job->longer_pieces = cut.pieces % blocks;
  job->by_splits = divider(cut.splits);
  job->by_shares = divider(4 * cut.splits - 1);
  job->by_batch = divider(job->attention.call.batch);
  job->by_row_blocks = divider(cut.row_blocks);
}

void CutByWork(WorkCut when) { work_cut = when; }

void MakeBatchInvariant(bool on) { batch_invariant = on; }

}  // namespace cuda
}  // namespace hqmq
