#include "attention.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"

namespace hqmq {
namespace {

// Up to so many new rows, the splits of the cache are tasks of their own: a single row must use
// every thread.
constexpr int kSplitRows = 16;

struct alignas(32) Lane8 {
  float x[8];
};

// A buffer each thread keeps.
float* ThreadScratch(int64_t floats) {
  thread_local std::vector<Lane8> buffer;
  const size_t lanes = static_cast<size_t>(floats + 7) / 8;
  if (buffer.size() < lanes) buffer.resize(lanes);
  return buffer.data()->x;
}

RoleParams Normalised(RoleParams role) {
  if (role.storage == Storage::kFp16) role.hadamard = role.page_mean = role.outlier_capacity = 0;
  return role;
}

Status CheckRequest(const AttentionRequest& request) {
  const RoleParams &key = request.key.role, &value = request.value.role;
  if (key.head_dim != value.head_dim || key.page_size != value.page_size) {
    return Invalid("K and V differ in head_dim or page size");
  }
  if (key.head_dim > kMaxHeadDim) {
    return Invalid("head_dim " + std::to_string(key.head_dim) + " is above " +
                   std::to_string(kMaxHeadDim));
  }
  if (request.group < 1)
    return Invalid("the number of query heads is not a multiple of the KV heads");
  if (request.window < 0) return Invalid("window is negative: use 0 for none");
  if (!(request.softcap >= 0)) return Invalid("softcap is negative: use 0 for none");
  if (request.q.dtype < HQMQ_FLOAT32 || request.q.dtype > HQMQ_BFLOAT16 ||
      request.y.dtype < HQMQ_FLOAT32 || request.y.dtype > HQMQ_BFLOAT16) {
    return Invalid("unknown dtype of q or y");
  }
  const bool empty = !request.batch || !request.heads || !request.tokens;
  if (!empty && (!request.q.data || !request.y.data)) return Invalid("q or y is missing");
  for (const AttentionRole* role : {&request.key, &request.value}) {
    if (!role->words || !role->words->Matches(role->role, request.heads)) {
      return Invalid("the word table was made for another codebook");
    }
  }
  return {};
}

AppendJob AppendOf(const AttentionRequest& request, const AttentionRole& role) {
  return {role.role,         request.batch, request.heads,       request.tokens,
          request.num_pages, role.x,        request.past_length, request.new_length,
          role.secondaries,  role.levels,   role.cache};
}

// Whether the append overwrites tail rows that queries of this call still see exactly.
bool OverwritesTail(const AttentionRequest& request) {
  const int page = request.key.role.page_size;
  for (int b = 0; b < request.batch; ++b) {
    const int64_t past = request.past_length[b];
    if (past % page && past + request.new_length[b] > past / page * page + page) return true;
  }
  return false;
}

Rows RowsOf(const hqmq_rows& x) {
  return {const_cast<void*>(x.data), x.dtype, x.batch_stride, x.head_stride, x.token_stride};
}

std::vector<AttentionBlock> CutBlocks(const AttentionRequest& request) {
  std::vector<AttentionBlock> blocks;
  const int page = request.key.role.page_size, most = std::max(kMaxBlockRows / request.group, 1);
  for (int b = 0; b < request.batch; ++b) {
    for (int row = 0; row < request.new_length[b];) {
      const int64_t token = int64_t{request.past_length[b]} + row;
      const int to_page_end = static_cast<int>(page - token % page);
      const int count = std::min({most, to_page_end, request.new_length[b] - row});
      for (int h = 0; h < request.heads; ++h) blocks.push_back({b, h, row, count});
      row += count;
    }
  }
  std::reverse(blocks.begin(), blocks.end());  // the longest first
  return blocks;
}

void ZeroPadding(const AttentionRequest& request) {
  const size_t size =
      static_cast<size_t>(request.key.role.head_dim) * (request.y.dtype == HQMQ_FLOAT32 ? 4 : 2);
  for (int b = 0; b < request.batch; ++b) {
    for (int h = 0; h < request.heads * request.group; ++h) {
      for (int t = request.new_length[b]; t < request.tokens; ++t)
        memset(RowAt(request.y, b, h, t), 0, size);
    }
  }
}

void RunSplits(const AttentionJob& job, const std::vector<AttentionBlock>& blocks,
               const Threads& threads) {
  struct Task {
    int block, split;
    int64_t state;
  };
  const AttentionKernels& kernels = BestAttentionKernels();
  const int dim = job.key.head_dim;
  std::vector<Task> tasks;
  std::vector<int64_t> states;  // of each block's first split
  int64_t floats = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    states.push_back(floats);
    const SplitRange splits = BlockSplits(job, blocks[i]);
    for (int split = splits.first; split < splits.end; ++split) {
      tasks.push_back({static_cast<int>(i), split, floats});
      floats += StateFloats(blocks[i].count * job.group, dim);
    }
  }
  std::vector<float> state(static_cast<size_t>(floats));
  threads.For(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const AttentionBlock& block = blocks[tasks[i].block];
    kernels.attend_split(job, block, tasks[i].split, state.data() + tasks[i].state,
                         ThreadScratch(AttentionScratch(block.count * job.group, dim)));
  });
  threads.For(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    const SplitRange splits = BlockSplits(job, blocks[i]);
    kernels.combine(job, blocks[i], state.data() + states[i], splits.end - splits.first,
                    ThreadScratch(AttentionScratch(blocks[i].count * job.group, dim)));
  });
}

}  // namespace

const AttentionKernels& BestAttentionKernels() {
#ifdef HQMQ_HAVE_X86_V3
  if (UseX86V3()) return kAttentionKernelsX86V3;
#endif
  return kAttentionKernelsBaseline;
}

Status CheckAttention(const AttentionRequest& request, const Threads& threads) {
  for (const AttentionRole* role : {&request.key, &request.value}) {
    if (Status status = CheckAppend(AppendOf(request, *role), threads); !status.ok()) return status;
  }
  return CheckRequest(request);
}

void RunAttention(const AttentionRequest& request, const Threads& threads, int64_t* dropped) {
  AttentionJob job = {};
  job.key = Normalised(request.key.role);
  job.value = Normalised(request.value.role);
  job.key_table = request.key.words->table();
  job.value_table = request.value.words->table();
  job.key_cache = request.key.cache;
  job.value_cache = request.value.cache;
  job.q = RowsOf(request.q);
  job.k = RowsOf(request.key.x);
  job.v = RowsOf(request.value.x);
  job.y = request.y;
  job.past_length = request.past_length;
  job.new_length = request.new_length;
  job.sinks = request.sinks;
  job.scale = request.scale;
  job.softcap = request.softcap;
  job.window = request.window;
  job.batch = request.batch;
  job.heads = request.heads;
  job.group = request.group;
  job.num_pages = request.num_pages;

  std::vector<uint16_t> tails;
  job.key_tail = request.key.cache.tail;
  job.value_tail = request.value.cache.tail;
  if (OverwritesTail(request)) {
    const size_t row = static_cast<size_t>(request.batch) * request.heads * job.key.head_dim;
    const size_t key = row * TailRows(job.key), value = row * TailRows(job.value);
    tails.resize(key + value);
    memcpy(tails.data(), job.key_tail, key * sizeof(uint16_t));
    memcpy(tails.data() + key, job.value_tail, value * sizeof(uint16_t));
    job.key_tail = tails.data();
    job.value_tail = tails.data() + key;
  }
  for (const AttentionRole* role : {&request.key, &request.value}) {
    Append(AppendOf(request, *role), threads, dropped);
  }

  ZeroPadding(request);
  const std::vector<AttentionBlock> blocks = CutBlocks(request);
  if (request.tokens <= kSplitRows) {
    RunSplits(job, blocks, threads);
    return;
  }
  const AttentionKernels& kernels = BestAttentionKernels();
  threads.For(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    const int rows = blocks[i].count * job.group;
    kernels.attend(job, blocks[i], ThreadScratch(AttentionScratch(rows, job.key.head_dim)));
  });
}

Status DequantizeCache(DequantizeJob job, const Threads& threads) {
  if (Status status = CheckRole(job.role); !status.ok()) return status;
  job.role = Normalised(job.role);
  const RoleParams& role = job.role;
  if (role.head_dim > kMaxHeadDim) {
    return Invalid("head_dim " + std::to_string(role.head_dim) + " is above " +
                   std::to_string(kMaxHeadDim));
  }
  if (job.batch < 0 || job.heads < 0 || job.num_pages < 0) return Invalid("a size is negative");
  if (job.x.dtype < HQMQ_FLOAT32 || job.x.dtype > HQMQ_BFLOAT16)
    return Invalid("unknown dtype of x");
  const int64_t pages = int64_t{job.batch} * job.heads * job.num_pages;
  if (pages == 0) return {};
  const RoleCache& cache = job.cache;
  if (!cache.codes || !cache.tail || (role.storage == Storage::kHqmq && !cache.scales) ||
      (role.page_mean && !cache.mean) ||
      (role.outlier_capacity > 0 && (!cache.outlier_mask || !cache.outlier_value))) {
    return Invalid("a cache tensor is missing");
  }
  if (!job.length || !job.x.data) return Invalid("length or x is missing");
  const int64_t capacity = int64_t{job.num_pages} * role.page_size;
  for (int b = 0; b < job.batch; ++b) {
    if (job.length[b] < 0 || job.length[b] > capacity) {
      return Invalid("length of sequence " + std::to_string(b) + " is " +
                     std::to_string(job.length[b]) + ", outside the cache of 0…" +
                     std::to_string(capacity));
    }
  }
  const AttentionKernels& kernels = BestAttentionKernels();
  threads.For(pages, [&](int64_t i) {
    const int64_t lane = i / job.num_pages;
    kernels.dequantize(job, static_cast<int>(lane / job.heads), static_cast<int>(lane % job.heads),
                       static_cast<int>(i % job.num_pages),
                       ThreadScratch(int64_t{role.page_size} * PaddedDim(role.head_dim)));
  });
  return {};
}

}  // namespace hqmq
