// The fused decode kernel on the host: what it takes, its workspace, and which instance runs.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "arguments.h"
#include "decode_cosets.cuh"
#include "decode_kernel.cuh"

namespace hqmq {
namespace cuda {
namespace {

struct Instance {
  int code_bits[2], index_bits[2], words[2];  // of K, V; different words of their tables
  int head_dim, columns;
  Gain gain;        // of both roles: so wide are their scales
  bool page_means;  // it takes K with page means, too
  bool outliers;    // both roles have them, or none
  bool compact, shared_states;
  int rings, stage_tiles;
  DecodeMemory (*memory)(uint32_t limit);
  using Run = Status (*)(const DecodeJob& job, int blocks, const Gpu& gpu, cudaStream_t stream);
  Run run;  // null: this library was built without it
  // Calls that cannot be cut by work. Null: `run` takes them.
  Run run_by_count;
};

// HQMQ_DECODE_NO_LARGE, HQMQ_DECODE_COMPACT: CMakeLists.txt.
#ifdef HQMQ_DECODE_NO_LARGE
constexpr bool kLargeBuilt = false;
#else
constexpr bool kLargeBuilt = true;
#endif
#ifdef HQMQ_DECODE_COMPACT
constexpr bool kCompactBuilt = true;
#else
constexpr bool kCompactBuilt = false;
#endif

// Which instances have one beside them that only cuts by count (hqmq_has_count_instance of
// cmake/DecodeInstances.cmake).
template <class Key, int D>
constexpr bool kCountBuilt = kLargeBuilt && !Key::kCompact && D <= 128;

template <class Key, class Value, int D, int kColumns>
constexpr Instance Make() {
  using I = DecodeInstance<Key, Value, D, kColumns>;
  Instance out = {{Key::kCodeBits, Value::kCodeBits},
                  {Key::kIndexBits, Value::kIndexBits},
                  {Key::kWords / Key::kTableLevels, Value::kWords / Value::kTableLevels},
                  D,
                  kColumns,
                  Key::kGain,
                  Key::kPageMeans,
                  Key::kOutliers,
                  Key::kCompact,
                  I::kSharedStates,
                  I::Memory::kRings,
                  Stage<Key, Value, D>::kTiles,
                  I::Memory::MemoryOf,
                  nullptr,
                  nullptr};
  if constexpr (Key::kCompact ? kCompactBuilt : kLargeBuilt) out.run = I::Run;
  if constexpr (kCountBuilt<Key, D>)
    out.run_by_count = DecodeInstance<Key, Value, D, kColumns, false>::Run;
  return out;
}

// The usual instance and the compact one, which takes its place where memory is short.
struct Pair {
  Instance large, compact;
};

template <class Key, class Value, int D, int kColumns>
constexpr Pair Both() {
  return {Make<Key, Value, D, kColumns>(),
          Make<CompactOf<Key, D>, CompactOf<Value, D>, D, kColumns>()};
}

// The first one that fits runs.
constexpr Pair kInstances[] = {
    Both<SmallCodec16<8, false>, SmallCodec16<8, false>, 64, 4>(),
    Both<SmallCodec16<8, false>, SmallCodec16<8, false>, 64, 8>(),
    Both<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 4>(),
    Both<SmallCodec16<8, false>, SmallCodec16<8, false>, 128, 8>(),
    Both<SmallCodec16<2, false>, SmallCodec16<2, false>, 256, 4>(),
    Both<SmallCodec16<2, false>, SmallCodec16<2, false>, 256, 8>(),
    Both<SmallCodec16<8, true>, SmallCodec16<8, true>, 64, 4>(),
    Both<SmallCodec16<8, true>, SmallCodec16<8, true>, 64, 8>(),
    Both<SmallCodec16<8, true>, SmallCodec16<8, true>, 128, 4>(),
    Both<SmallCodec16<8, true>, SmallCodec16<8, true>, 128, 8>(),
    Both<SmallCodec16<2, true>, SmallCodec16<2, true>, 256, 4>(),
    Both<SmallCodec16<2, true>, SmallCodec16<2, true>, 256, 8>(),
    Both<Codec12, Codec12, 64, 4>(),
    Both<Codec12, Codec12, 64, 8>(),
    Both<Codec12, Codec12, 128, 4>(),
    Both<Codec12, Codec12, 128, 8>(),
    Both<Codec12, Codec12, 256, 4>(),
    Both<Codec12, Codec12, 256, 8>(),
    Both<Codec14<16>, Codec14<16>, 64, 4>(),
    Both<Codec14<16>, Codec14<16>, 64, 8>(),
    Both<Codec14<16>, Codec14<16>, 128, 4>(),
    Both<Codec14<16>, Codec14<16>, 128, 8>(),
    Both<Codec14<8>, Codec14<8>, 256, 4>(),
    Both<Codec14<8>, Codec14<8>, 256, 8>(),
    Both<Codec20, Codec20, 64, 4>(),
    Both<Codec20, Codec20, 64, 8>(),
    Both<Codec20, Codec20, 128, 4>(),
    Both<Codec20, Codec20, 128, 8>(),
    Both<Codec20, Codec20, 256, 4>(),
    Both<Codec20, Codec20, 256, 8>(),
    Both<Codec16<8>, Codec16<8>, 64, 4>(),
    Both<Codec16<8>, Codec16<8>, 64, 8>(),
    Both<Codec16<8>, Codec16<8>, 128, 4>(),
    Both<Codec16<8>, Codec16<8>, 128, 8>(),
    Both<Codec16<2>, Codec16<2>, 256, 4>(),
    Both<Codec16<2>, Codec16<2>, 256, 8>(),
    Both<Codec16<4>, Codec12, 128, 4>(),
    Both<Codec16<4>, Codec12, 128, 8>(),
    Both<Codec16<4>, Codec14<8>, 64, 4>(),
    Both<Codec16<4>, Codec14<8>, 64, 8>(),
    Both<Codec16<4>, Codec14<8>, 128, 4>(),
    Both<Codec16<4>, Codec14<8>, 128, 8>(),
    Both<Codec16<2>, Codec14<8>, 256, 4>(),
    Both<Codec16<2>, Codec14<8>, 256, 8>(),
    Both<Codec14<8>, Codec12, 128, 4>(),
    Both<Codec14<8>, Codec12, 128, 8>(),
    Both<Codec12, Codec10, 64, 4>(),
    Both<Codec12, Codec10, 64, 8>(),
    Both<Codec12, Codec10, 128, 4>(),
    Both<Codec12, Codec10, 128, 8>(),
    Both<Codec14<8>, Codec10, 64, 4>(),
    Both<Codec14<8>, Codec10, 64, 8>(),
    Both<Codec14<8>, Codec10, 128, 4>(),
    Both<Codec14<8>, Codec10, 128, 8>(),
};

const Pair* FindPair(const AttentionJob& job) {
  const Layout key = MakeLayout(job.key.role), value = MakeLayout(job.value.role);
  const int columns = DecodeColumns(job.group * job.call.tokens);
  for (const Pair& pair : kInstances) {
    const Instance& instance = pair.large;
    bool fits = instance.head_dim == job.key.role.head_dim && instance.columns == columns &&
                instance.outliers == (job.key.role.outlier_capacity > 0) &&
                (instance.page_means || !job.key.role.page_mean);
    for (int i = 0; i < 2; ++i) {
      const Layout& layout = i ? value : key;
      const RoleParams& role = i ? job.value.role : job.key.role;
      fits = fits && role.gain == instance.gain && layout.code_bits == instance.code_bits[i] &&
             layout.index_bits == instance.index_bits[i] &&
             12 * role.secondaries <= instance.words[i];
    }
    if (fits) return &pair;
  }
  return nullptr;
}

// What runs where a block may have `limit` bytes of shared memory; stages 0: nothing.
struct Choice {
  const Instance* instance;
  DecodeMemory memory;
};
Choice Choose(const Pair& pair, int limit) {
  const DecodeMemory memory = pair.large.memory(static_cast<uint32_t>(limit));
  if (memory.stages) return {&pair.large, memory};
  return {&pair.compact, pair.compact.memory(static_cast<uint32_t>(limit))};
}

std::atomic<int> memory_limit{0};  // 0: none

int SharedLimit(const Gpu& gpu) {
  const int limit = memory_limit;
  return limit > 0 ? std::min(limit, gpu.shared_limit) : gpu.shared_limit;
}

bool Refuse(std::string* why, const char* text) {
  if (why) *why = text;
  return false;
}

constexpr char kTooLittleMemory[] = "the GPU gives a block too little shared memory";
constexpr char kNotBuilt[] =
    "this library holds no kernel for GPUs with this much shared memory: build it for this one's "
    "architecture";

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
  if (cut.problems > kMostProblems) return Refuse(why, "the batch is too large");
  if (!FindPair(job))
    return Refuse(
        why, job.key.role.outlier_capacity > 0
                 ? "there is no instance with Med3x outliers for this head_dim and these codes"
                 : "there is no instance for this head_dim, gain, layout of codes and radius bits");
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
      if (Misaligned(tensor, 16))
        return Refuse(why, "a cache tensor is not at a multiple of 16 bytes");
    }
    if (Misaligned(view->cache.outlier_value, 8))
      return Refuse(why, "outlier_value is not at a multiple of 8 bytes");
  }
  Gpu gpu;
  if (!CurrentGpu(&gpu).ok()) return Refuse(why, "there is no GPU");
  const Choice choice = Choose(*FindPair(job), SharedLimit(gpu));
  if (!choice.memory.stages) return Refuse(why, kTooLittleMemory);
  if (!choice.instance->run) return Refuse(why, kNotBuilt);
  if (choice.instance->compact && !kCompactEverywhere &&
      gpu.shared_limit >= static_cast<int>(kMostShared))
    return Refuse(why, kNotBuilt);
  return true;
}

bool PlanDecodeMemory(const AttentionJob& job, int shared_limit, hqmq_cuda_decode_memory* plan,
                      std::string* why) {
  *plan = {};
  if (!DecodeTakesScheme(job, why)) return false;
  const Choice choice = Choose(*FindPair(job), shared_limit);
  if (!choice.memory.stages) return Refuse(why, kTooLittleMemory);
  const Instance& instance = *choice.instance;
  plan->head_dim = instance.head_dim;
  plan->columns = instance.columns;
  plan->compact = instance.compact;
  plan->built = !instance.run ? 0 : instance.compact && !kCompactEverywhere ? 1 : 2;
  for (int i = 0; i < 2; ++i) {
    plan->code_bits[i] = instance.code_bits[i];
    plan->copies[i] = choice.memory.copies[i];
  }
  plan->rings = instance.rings;
  plan->stages = choice.memory.stages;
  plan->stage_tiles = instance.stage_tiles;
  plan->shared_states = instance.shared_states;
  plan->shared_bytes = choice.memory.bytes;
  return true;
}

void LimitDecodeMemory(int bytes) { memory_limit = bytes; }

int DecodeCounters(const AttentionJob& job) { return CutOf(job).row_blocks; }

size_t DecodeCounterBytes(const AttentionJob& job) {
  return sizeof(uint32_t) * CutOf(job).problems;
}

namespace {

size_t PartBytes(const AttentionJob& job, int64_t parts) {
  return sizeof(float) * parts *
         PartFloats(DecodeColumns(job.group * job.call.tokens), job.key.role.head_dim);
}

}  // namespace

size_t DecodePartBytes(const AttentionJob& job, bool most) {
  const Room room = RoomOf(job, most);
  const Instance& instance = FindPair(job)->large;
  // Before the GPU is known: for either instance, if there may be two.
  const size_t states =
      instance.shared_states && !kCompactBuilt
          ? 0
          : sizeof(float) * room.blocks * StateFloats(instance.columns, instance.head_dim);
  return PartBytes(job, room.parts) + sizeof(WorkCutOf) * room.problems + states;
}

Status Decode(const AttentionJob& attention, uint32_t* counters, float* parts,
              cudaStream_t stream) {
  Gpu gpu;
  if (Status status = CurrentGpu(&gpu); !status.ok()) return status;
  const Choice choice = Choose(*FindPair(attention), SharedLimit(gpu));
  const Instance& instance = *choice.instance;
  if (!choice.memory.stages || !instance.run) return {HQMQ_CUDA_FAILED, kTooLittleMemory};
  const Cut cut = CutOf(attention);
  DecodeJob job = {};
  job.attention = attention;
  job.rows = attention.group * attention.call.tokens;
  job.page_shift = 0;
  while (kDecodeTile << job.page_shift < attention.key.role.page_size) ++job.page_shift;
  job.page_mask = (1 << job.page_shift) - 1;
  job.pair_mask = job.page_mask & 1;
  job.head_bits = 0;
  while (1 << job.head_bits < attention.call.heads) ++job.head_bits;
  job.no_mean = attention.key.role.page_mean ? 0 : 1 << 30;
  job.stages = choice.memory.stages;
  for (int i = 0; i < 2; ++i) job.copies[i] = choice.memory.copies[i];
  job.shared_bytes = static_cast<uint32_t>(choice.memory.bytes);
  const int blocks = static_cast<int>(std::min<int64_t>(MostBlocks(cut), gpu.multiprocessors));
  SetCut(cut, blocks, &job);
  job.by_group = Divider::Of(static_cast<uint32_t>(attention.group));
  const float softcap = attention.softcap;
  job.cap = softcap > 0.0f ? softcap * 1.44269504f : 0.0f;
  job.per_cap = softcap > 0.0f ? 2.0f / softcap : 0.0f;
  job.parts = parts;
  // Behind the parts, whose bytes are a multiple of 16.
  char* at = reinterpret_cast<char*>(parts) + PartBytes(attention, MostParts(cut));
  if (cut.pieces > 0) {
    job.cuts = reinterpret_cast<WorkCutOf*>(at);
    at += sizeof(WorkCutOf) * cut.problems;
  }
  job.states = instance.shared_states ? nullptr : reinterpret_cast<float*>(at);
  job.counters = counters;
  const bool by_count = cut.pieces == 0 && instance.run_by_count;
  return (by_count ? instance.run_by_count : instance.run)(job, blocks, gpu, stream);
}

}  // namespace cuda
}  // namespace hqmq
