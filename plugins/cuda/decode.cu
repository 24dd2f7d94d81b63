// The fused decode kernel on the host: what it takes, its workspace, and which instance runs.
#include <algorithm>
#include <cstdint>

#include "decode_codec12.cuh"
#include "decode_codec14.cuh"
#include "decode_codec16.cuh"
#include "decode_codec20.cuh"
#include "decode_kernel.cuh"

namespace hqmq {
namespace cuda {
namespace {

struct Instance {
  int code_bits[2], index_bits[2], words[2];  // of K, V; words of their tables
  int head_dim, columns;
  bool page_means;  // it takes K with page means, too
  bool outliers;    // both roles have them, or none
  bool shared_states;
  int (*stages)(int shared_limit);
  Status (*run)(const DecodeJob& job, int blocks, const Gpu& gpu, cudaStream_t stream);
};

template <class Key, class Value, int D, int kColumns>
constexpr Instance Make() {
  using I = DecodeInstance<Key, Value, D, kColumns>;
  return {{Key::kCodeBits, Value::kCodeBits},
          {Key::kIndexBits, Value::kIndexBits},
          {Key::kWords, Value::kWords},
          D,
          kColumns,
          Key::kPageMeans,
          Key::kOutliers,
          I::kSharedStates,
          I::Stages,
          I::Run};
}

// The first one that fits runs.
constexpr Instance kInstances[] = {
    Make<SmallCodec16<8, false>, SmallCodec16<8, false>, 64, 4>(),
    Make<SmallCodec16<8, false>, SmallCodec16<8, false>, 64, 8>(),
    Make<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 4>(),
    Make<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 8>(),
    Make<SmallCodec16<2, false>, SmallCodec16<2, false>, 256, 4>(),
    Make<SmallCodec16<2, false>, SmallCodec16<2, false>, 256, 8>(),
    Make<SmallCodec16<8, true>, SmallCodec16<8, true>, 64, 4>(),
    Make<SmallCodec16<8, true>, SmallCodec16<8, true>, 64, 8>(),
    Make<SmallCodec16<8, true>, SmallCodec16<8, true>, 128, 4>(),
    Make<SmallCodec16<8, true>, SmallCodec16<8, true>, 128, 8>(),
    Make<SmallCodec16<2, true>, SmallCodec16<2, true>, 256, 4>(),
    Make<SmallCodec16<2, true>, SmallCodec16<2, true>, 256, 8>(),
    Make<Codec12, Codec12, 64, 4>(),
    Make<Codec12, Codec12, 64, 8>(),
    Make<Codec12, Codec12, 128, 4>(),
    Make<Codec12, Codec12, 128, 8>(),
    Make<Codec12, Codec12, 256, 4>(),
    Make<Codec12, Codec12, 256, 8>(),
    Make<Codec14<16>, Codec14<16>, 64, 4>(),
    Make<Codec14<16>, Codec14<16>, 64, 8>(),
    Make<Codec14<16>, Codec14<16>, 128, 4>(),
    Make<Codec14<16>, Codec14<16>, 128, 8>(),
    Make<Codec14<8>, Codec14<8>, 256, 4>(),
    Make<Codec14<8>, Codec14<8>, 256, 8>(),
    Make<Codec20, Codec20, 64, 4>(),
    Make<Codec20, Codec20, 64, 8>(),
    Make<Codec20, Codec20, 128, 4>(),
    Make<Codec20, Codec20, 128, 8>(),
    Make<Codec20, Codec20, 256, 4>(),
    Make<Codec20, Codec20, 256, 8>(),
    Make<Codec16<8>, Codec16<8>, 64, 4>(),
    Make<Codec16<8>, Codec16<8>, 64, 8>(),
    Make<Codec16<8>, Codec16<8>, 128, 4>(),
    Make<Codec16<8>, Codec16<8>, 128, 8>(),
    Make<Codec16<2>, Codec16<2>, 256, 4>(),
    Make<Codec16<2>, Codec16<2>, 256, 8>(),
    Make<Codec16<4>, Codec12, 128, 4>(),
    Make<Codec16<4>, Codec12, 128, 8>(),
    Make<Codec16<4>, Codec14<8>, 64, 4>(),
    Make<Codec16<4>, Codec14<8>, 64, 8>(),
    Make<Codec16<4>, Codec14<8>, 128, 4>(),
    Make<Codec16<4>, Codec14<8>, 128, 8>(),
    Make<Codec16<2>, Codec14<8>, 256, 4>(),
    Make<Codec16<2>, Codec14<8>, 256, 8>(),
    Make<Codec14<8>, Codec12, 128, 4>(),
    Make<Codec14<8>, Codec12, 128, 8>(),
};

const Instance* FindInstance(const AttentionJob& job) {
  const Layout key = MakeLayout(job.key.role), value = MakeLayout(job.value.role);
  const int columns = DecodeColumns(job.group * job.call.tokens);
  for (const Instance& instance : kInstances) {
    bool fits = instance.head_dim == job.key.role.head_dim && instance.columns == columns &&
                instance.outliers == (job.key.role.outlier_capacity > 0) &&
                (instance.page_means || !job.key.role.page_mean);
    for (int i = 0; i < 2; ++i) {
      const Layout& layout = i ? value : key;
      const RoleParams& role = i ? job.value.role : job.key.role;
      fits = fits && layout.code_bits == instance.code_bits[i] &&
             layout.index_bits == instance.index_bits[i] &&
             12 * role.secondaries <= instance.words[i];
    }
    if (fits) return &instance;
  }
  return nullptr;
}

struct Cut {
  int row_blocks, splits;
  int64_t problems;
};

// Of the call's shape, but for the batch and the capacity.
Cut CutOf(const AttentionJob& job) {
  const int rows = job.group * job.call.tokens;
  Cut cut;
  cut.row_blocks = (rows + kDecodeRows - 1) / kDecodeRows;
  const int64_t blocks = static_cast<int64_t>(job.call.heads) * cut.row_blocks;
  cut.splits = static_cast<int>(
      std::max<int64_t>(1, std::min<int64_t>(kMostSplits, kDecodeBlocks / blocks)));
  cut.problems = blocks * job.call.batch;
  return cut;
}

bool Refuse(std::string* why, const char* text) {
  if (why) *why = text;
  return false;
}

bool IsAligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace

bool DecodeTakesScheme(const AttentionJob& job, std::string* why) {
  if (job.call.tokens < 1 || job.call.tokens > kMostDecodeTokens)
    return Refuse(why, "it takes calls of 1 to 8 tokens");
  for (const RoleParams* role : {&job.key.role, &job.value.role}) {
    if (role->storage != Storage::kHqmq) return Refuse(why, "storage fp16 has no codes");
    if (role->page_size < kDecodeTile) return Refuse(why, "pages have fewer than 16 tokens");
    // Their codes are 0, and only there does that mean zeros.
    if (role->outlier_capacity > 0 && role->gain != Gain::kMax)
      return Refuse(why, "Med3x outliers need gain MAX, whose level 0 is zero");
  }
  if ((job.key.role.outlier_capacity > 0) != (job.value.role.outlier_capacity > 0))
    return Refuse(why, "one role has Med3x outliers, the other has none");
  if (job.value.role.page_mean) return Refuse(why, "V has page means");
  if (job.key.role.sink_tokens != job.value.role.sink_tokens)
    return Refuse(why, "K and V keep different numbers of first tokens exact");
  const Cut cut = CutOf(job);
  if (cut.problems * cut.splits > 1 << 30) return Refuse(why, "the batch is too large");
  if (!FindInstance(job))
    return Refuse(why,
                  job.key.role.outlier_capacity > 0
                      ? "there is no instance with Med3x outliers for this head_dim and these codes"
                      : "there is no instance for this head_dim, layout of codes and radius bits");
  return true;
}

bool FastDecodeSupports(const AttentionJob& job, std::string* why) {
  if (!DecodeTakesScheme(job, why)) return false;
  for (const Rows* rows : {&job.q, &job.y, &job.key.x, &job.value.x}) {
    if (rows->dtype == HQMQ_FLOAT32) return Refuse(why, "activations are float32");
  }
  for (const RoleView* view : {&job.key, &job.value}) {
    for (const void* tensor :
         {static_cast<const void*>(view->cache.codes), static_cast<const void*>(view->cache.scales),
          static_cast<const void*>(view->cache.mean), static_cast<const void*>(view->cache.tail)}) {
      if (!IsAligned(tensor, 16))
        return Refuse(why, "a cache tensor is not at a multiple of 16 bytes");
    }
    if (!IsAligned(view->cache.outlier_value, 8))
      return Refuse(why, "outlier_value is not at a multiple of 8 bytes");
  }
  Gpu gpu;
  if (!CurrentGpu(&gpu).ok()) return Refuse(why, "there is no GPU");
  if (FindInstance(job)->stages(gpu.shared_limit) < 2)
    return Refuse(why, "the GPU gives a block too little shared memory");
  return true;
}

int DecodeCounters(const AttentionJob& job) { return CutOf(job).row_blocks; }

size_t DecodeCounterBytes(const AttentionJob& job) {
  return sizeof(uint32_t) * CutOf(job).problems;
}

namespace {

size_t PartBytes(const AttentionJob& job, const Cut& cut) {
  return sizeof(float) * cut.problems * (cut.splits + 1) *
         PartFloats(DecodeColumns(job.group * job.call.tokens), job.key.role.head_dim);
}

int64_t MostBlocks(const Cut& cut) {
  return std::min<int64_t>(cut.problems * cut.splits, kMostDecodeBlocks);
}

}  // namespace

size_t DecodePartBytes(const AttentionJob& job) {
  const Cut cut = CutOf(job);
  const Instance& instance = *FindInstance(job);
  const size_t states =
      instance.shared_states
          ? 0
          : sizeof(float) * MostBlocks(cut) * StateFloats(instance.columns, instance.head_dim);
  return PartBytes(job, cut) + states;
}

Status Decode(const AttentionJob& attention, uint32_t* counters, float* parts,
              cudaStream_t stream) {
  Gpu gpu;
  if (Status status = CurrentGpu(&gpu); !status.ok()) return status;
  const Instance& instance = *FindInstance(attention);
  const Cut cut = CutOf(attention);
  const auto divider = [](int64_t divisor) { return Divider::Of(static_cast<uint32_t>(divisor)); };
  DecodeJob job;
  job.attention = attention;
  job.rows = attention.group * attention.call.tokens;
  job.row_blocks = cut.row_blocks;
  job.splits = cut.splits;
  job.page_shift = 0;
  while (kDecodeTile << job.page_shift < attention.key.role.page_size) ++job.page_shift;
  job.page_mask = (1 << job.page_shift) - 1;
  job.pair_mask = job.page_mask & 1;
  job.head_bits = 0;
  while (1 << job.head_bits < attention.call.heads) ++job.head_bits;
  job.no_mean = attention.key.role.page_mean ? 0 : 1 << 30;
  job.stages = instance.stages(gpu.shared_limit);
  job.items = static_cast<int>(cut.problems * cut.splits);
  const int blocks = static_cast<int>(std::min<int64_t>(MostBlocks(cut), gpu.multiprocessors));
  job.block_items = job.items / blocks;
  job.longer_blocks = job.items % blocks;
  job.by_splits = divider(cut.splits);
  job.by_batch = divider(attention.call.batch);
  job.by_row_blocks = divider(cut.row_blocks);
  job.by_group = divider(attention.group);
  job.by_shares = divider(4 * cut.splits - 1);
  const float softcap = attention.softcap;
  job.cap = softcap > 0.0f ? softcap * 1.44269504f : 0.0f;
  job.per_cap = softcap > 0.0f ? 2.0f / softcap : 0.0f;
  job.parts = parts;
  job.states = instance.shared_states ? nullptr : parts + PartBytes(attention, cut) / sizeof(float);
  job.counters = counters;
  return instance.run(job, blocks, gpu, stream);
}

}  // namespace cuda
}  // namespace hqmq
