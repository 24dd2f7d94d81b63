// What each block of the fused decode kernel takes of a call, from the kernel's own code.
#include <algorithm>
#include <vector>

#include "decode_share.cuh"
#include "host/status.h"

namespace hqmq {
namespace cuda {
namespace {

// Of int32 each: block, problem, split, whether it is the last one of its problem, first tile and
// tiles, 1 if the exact tokens go with it (0: they do not, 2: they have a part of their own),
// number of its part in the workspace.
constexpr int kFields = 8;

struct CutJob {
  DecodeJob decode;
  int32_t* splits;  // [most, kFields]
  int32_t* count;
  int32_t* piece;  // rounds; 0: by count
  int32_t most;
};

// A block finds its share as DecodeItems does, if with fewer warps, and one thread goes through it.
template <int kWarps, bool kByWork>
__global__ void ListSplits(const __grid_constant__ CutJob job) {
  HQMQ_DYNAMIC_SHARED(memory);
  const int block = static_cast<int>(blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const DecodeJob& decode = job.decode;
  Share share = {ItemsByCount<kByWork>(decode, block), 0};
  if constexpr (kByWork) {
    if (decode.pieces > 0) {
      share = ShareOf<kWarps>(decode, share.items, reinterpret_cast<ShareScratch*>(memory), block,
                              warp, lane);
    }
  }
  if (threadIdx.x > 0) return;
  *job.piece = share.piece / kRoundTiles;
  for (int item = share.items.begin; item < share.items.end; ++item) {
    const Item numbers = ItemAt<kByWork>(decode, item);
    const int index = numbers.problem, split = numbers.split;
    const ProblemType<kByWork> p = ProblemOf<kByWork>(decode, index, share.piece);
    const bool last = split + 1 >= p.splits;
    if (split < p.splits || (split == 0 && p.rows == 0)) {
      const Tiles first = TilesOf<kDecodeWarps>(p, split, 0);
      // A last split without coded tiles may begin behind all of them.
      const int begin = std::min(first.begin, p.tile + p.tiles);
      int end = begin;
      for (int of = 0; of < kDecodeWarps; ++of)
        if (const Tiles tiles = TilesOf<kDecodeWarps>(p, split, of); tiles.begin < tiles.end)
          end = std::max(end, tiles.end);
      const int32_t fields[kFields] = {block,
                                       index,
                                       split,
                                       last,
                                       begin,
                                       end - begin,
                                       p.rows == 0 || !last ? 0
                                       : p.own == split     ? 1
                                                            : 2,
                                       FirstPartOf(decode, p, index) + split};
      if (*job.count < job.most)
        std::copy(fields, fields + kFields, job.splits + kFields * *job.count);
      ++*job.count;
    }
    if (kByWork && last) item = ItemOf(index + 1, 0) - 1;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace hqmq

using namespace hqmq;
using namespace hqmq::cuda;

extern "C" {

// The splits of a call on a GPU of so many multiprocessors, [most, 8] as in cut.cu, and their
// number; *piece: rounds of a piece, 0: it is cut by count; *parts: those that the workspace holds.
// warps: of a block that looks for its share, 1 or kDecodeWarps. either: 1: the code of instances
// that cut either way, 0: that of those by count only where the call cannot be cut by work. Returns
// an hqmq_status.
HQMQ_API int hqmq_emulation_cut(int32_t batch, int32_t heads, int32_t group, int32_t tokens,
                                int32_t page_size, int32_t num_pages, int32_t window,
                                const int32_t* past_length, const int32_t* new_length,
                                int32_t multiprocessors, int32_t warps, int32_t either,
                                int32_t most, int32_t* splits, int32_t* count, int32_t* piece,
                                int64_t* parts) {
  return Guard([&]() -> Status {
    CutJob job = {};
    AttentionJob& attention = job.decode.attention;
    attention.call = {batch, heads, tokens, num_pages, past_length, new_length, {}};
    attention.key.role.page_size = attention.value.role.page_size = page_size;
    attention.group = group;
    attention.window = window;
    const Cut cut = CutOf(attention);
    const int blocks = static_cast<int>(std::min<int64_t>(MostBlocks(cut), multiprocessors));
    SetCut(cut, blocks, &job.decode);
    job.decode.by_group = Divider::Of(static_cast<uint32_t>(group));
    std::vector<WorkCutOf> cuts(cut.problems, WorkCutOf{-1, -1, -1, -1});
    job.decode.cuts = cuts.data();
    job.splits = splits;
    job.count = count;
    job.piece = piece;
    job.most = most;
    *count = *piece = 0;
    *parts = MostParts(cut);
    const bool by_count = cut.pieces == 0 && !either;
    void (*list)(CutJob) = warps == 1 ? (by_count ? ListSplits<1, false> : ListSplits<1, true>)
                           : by_count ? ListSplits<kDecodeWarps, false>
                                      : ListSplits<kDecodeWarps, true>;
    return Launch(list, dim3(static_cast<unsigned>(blocks)), warps * kWarp, sizeof(ShareScratch),
                  nullptr, job);
  });
}

}  // extern "C"
