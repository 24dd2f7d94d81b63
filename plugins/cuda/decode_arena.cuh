// Where everything lies in the decode kernel's shared memory, and how much of it an instance needs.
#pragma once

#include "decode_shared.cuh"

namespace hqmq {
namespace cuda {

// Compact instances are compiled for GPUs with less memory than an H100, or for all, so that an
// H100 can test them.
#ifdef HQMQ_DECODE_COMPACT_EVERYWHERE
constexpr bool kCompactEverywhere = true;
#else
constexpr bool kCompactEverywhere = false;
#endif

// Dynamic shared memory: [rings of the first warps] [tables, aligned] [rings of the others]
// [states, if they fit] [DecodeShared] [chunks of queries, if there are outliers]. `start`: address
// of its beginning, at most kMostStart.
constexpr uint32_t kMostStart = 1024;
// What a block may have on an H100.
constexpr uint32_t kMostShared = 227 * 1024;

template <class Key, class Value, int D, int kColumns>
struct Arena {
  static constexpr uint32_t kStageBytes = Stage<Key, Value, D>::kBytes;
  static constexpr uint32_t kStateBytes = sizeof(float) * StateFloats(kColumns, D);
  uint32_t table, first_rings, ring_bytes, rings_before, second_rings, states, shared;

  __host__ __device__ constexpr Arena(uint32_t start, uint32_t stages, uint32_t rings,
                                      bool with_states)
      : table(Aligned(start, Tables<Key, Value>::kAlignment)),
        first_rings(Aligned(start, 16)),
        ring_bytes(stages * kStageBytes),
        rings_before(Least((table - first_rings) / ring_bytes, rings)),
        second_rings(table + Tables<Key, Value>::kBytes),
        states(Aligned(second_rings + (rings - rings_before) * ring_bytes, kLevelBytes)),
        shared(states + (with_states ? kStateBytes : 0)) {}
  __host__ __device__ constexpr uint32_t QueryChunks() const {
    return shared + sizeof(DecodeShared<D>);
  }
  __host__ __device__ constexpr uint32_t End() const {
    return QueryChunks() + (Key::kOutliers ? QueryChunkBytes(D, kColumns) : 0);
  }
  __host__ __device__ uint32_t Ring(uint32_t warp) const {
    return warp < rings_before ? first_rings + warp * ring_bytes
                               : second_rings + (warp - rings_before) * ring_bytes;
  }
  __host__ __device__ uint32_t Table(int role) const {
    return table + (role ? Tables<Key, Value>::kValue : Tables<Key, Value>::kKey);
  }

  // Bytes to ask for.
  static __host__ __device__ constexpr uint32_t Bytes(uint32_t stages, uint32_t rings,
                                                      bool with_states) {
    return Arena(kMostStart, stages, rings, with_states).End() - kMostStart;
  }
  // Warps that take coded tiles: as many as an H100 has memory for. A constant, as the order of
  // sums depends on it.
  static constexpr __host__ __device__ int Rings() {
    int rings = kDecodeWarps;
    while (rings > 4 && Bytes(2, rings, false) > kMostShared) rings -= 4;
    return rings;
  }
  static constexpr int kRings = Rings();
  static constexpr bool kSharedStates = Bytes(2, kRings, true) <= kMostShared;
  static __host__ __device__ constexpr uint32_t Bytes(uint32_t stages) {
    return Bytes(stages, kRings, kSharedStates);
  }
  static __device__ __forceinline__ Arena Of(const DecodeJob& job, uint32_t start) {
    return Arena(start, job.stages, kRings, kSharedStates);
  }
  // The most stages, but at least two, that fit into `limit` bytes.
  static constexpr DecodeMemory MemoryOf(uint32_t limit) {
    int stages = kMostStages;
    while (stages > 1 && Bytes(stages) > limit) --stages;
    if (stages == 1) return {};
    return {stages, {Key::kCopies, Value::kCopies}, static_cast<int32_t>(Bytes(stages))};
  }

 private:
  static __host__ __device__ constexpr uint32_t Aligned(uint32_t x, uint32_t to) {
    return (x + to - 1) & ~(to - 1);
  }
  static __host__ __device__ constexpr uint32_t Least(uint32_t x, uint32_t y) {
    return x < y ? x : y;
  }
};

// The same where the tables have as many copies as there is memory for (decode_compact.cuh), states
// lie in the workspace and a stage, of one tile, is filled anew as soon as its codes are in
// registers: [table of K or of both] [table of V] [rings] [DecodeShared] [chunks of queries].
template <class Key, class Value, int D, int kColumns>
struct CompactArena {
  static_assert(Key::kCompact && Value::kCompact, "both roles are compact");
  static constexpr bool kOneTable = Tables<Key, Value>::kTurned && Key::kOneTable;
  static constexpr bool kSharedStates = false;
  // As many as there are where memory is larger: the order of sums depends on it.
  static constexpr int kRings =
      Arena<typename Key::Large, typename Value::Large, D, kColumns>::kRings;
  uint32_t tables[2], ring_bytes, rings, shared;
  static constexpr uint32_t states = 0;

  __host__ __device__ constexpr CompactArena(uint32_t start, uint32_t stages, uint32_t key_copies,
                                             uint32_t value_copies)
      : tables{Aligned(start, 128),
               Aligned(start, 128) + (kOneTable ? 0 : Key::TableBytes(key_copies))},
        ring_bytes(stages * Stage<Key, Value, D>::kBytes),
        rings(tables[1] + Value::TableBytes(value_copies)),
        shared(Aligned(rings + kRings * ring_bytes, kLevelBytes)) {}
  static __device__ __forceinline__ CompactArena Of(const DecodeJob& job, uint32_t start) {
    return CompactArena(start, job.stages, job.copies[0], job.copies[1]);
  }
  __host__ __device__ constexpr uint32_t QueryChunks() const {
    return shared + sizeof(DecodeShared<D>);
  }
  __host__ __device__ uint32_t Ring(uint32_t warp) const { return rings + warp * ring_bytes; }
  __host__ __device__ uint32_t Table(int role) const { return tables[role]; }

  // Bytes to ask for. A code beyond the codebook, in a damaged cache, reads what lies behind a
  // table: this much must be the block's.
  static __host__ __device__ constexpr uint32_t Bytes(uint32_t stages, uint32_t key_copies,
                                                      uint32_t value_copies) {
    const CompactArena arena(kMostStart, stages, key_copies, value_copies);
    const uint32_t end = arena.QueryChunks() + (Key::kOutliers ? QueryChunkBytes(D, kColumns) : 0);
    const uint32_t key_end = arena.tables[0] + Key::ReachBytes(key_copies);
    const uint32_t value_end = arena.tables[1] + Value::ReachBytes(value_copies);
    const uint32_t reach = key_end > value_end ? key_end : value_end;
    return (end > reach ? end : reach) - kMostStart;
  }
  static __host__ __device__ constexpr uint32_t LeastBytes() {
    return Bytes(1, Key::kLeastCopies, Value::kLeastCopies);
  }
  // As many copies and then as many stages as fit into `limit` bytes. With outliers, whose records
  // keep a stage until its tile is done, a second stage comes first: it lets copies run ahead.
  static constexpr DecodeMemory MemoryOf(uint32_t limit) {
    uint32_t stages = 1, copies[2] = {Key::kLeastCopies, Value::kLeastCopies};
    if (LeastBytes() > limit) return {};
    if (Key::kOutliers && Bytes(2, copies[0], copies[1]) <= limit) stages = 2;
    for (bool more = true; more;) {
      more = false;
      for (int n = 0; n < 2 && !more; ++n) {
        const int role = copies[0] > copies[1] ? 1 - n : n;
        const uint32_t next[2] = {copies[0] << (kOneTable || role == 0),
                                  copies[1] << (kOneTable || role == 1)};
        more = next[0] <= Key::kMostCopies && next[1] <= Value::kMostCopies &&
               Bytes(stages, next[0], next[1]) <= limit;
        if (more) copies[0] = next[0], copies[1] = next[1];
      }
    }
    while (stages < kMostStages && Bytes(stages + 1, copies[0], copies[1]) <= limit) ++stages;
    return {static_cast<int32_t>(stages),
            {static_cast<int32_t>(copies[0]), static_cast<int32_t>(copies[1])},
            static_cast<int32_t>(Bytes(stages, copies[0], copies[1]))};
  }

 private:
  static __host__ __device__ constexpr uint32_t Aligned(uint32_t x, uint32_t to) {
    return (x + to - 1) & ~(to - 1);
  }
};

// Where an instance's parts lie.
template <class Key, class Value, int D, int kColumns, bool kCompact = Key::kCompact>
struct MemoryLayout {
  using Type = Arena<Key, Value, D, kColumns>;
};
template <class Key, class Value, int D, int kColumns>
struct MemoryLayout<Key, Value, D, kColumns, true> {
  using Type = CompactArena<Key, Value, D, kColumns>;
};

}  // namespace cuda
}  // namespace hqmq
