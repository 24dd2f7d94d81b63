// Attention over packed pages and HqmqDequantize: the inner loops, compiled once per instruction
// set.
//
// One row's arithmetic does not depend on how the work is cut: coded pages are taken in steps of
// kStepTokens with an online softmax, started afresh every SplitTokens; the splits' states are
// merged in order; the row's own page, exact and not rotated, comes last. Whether splits run as
// tasks of their own (decode) or one after the other (prefill) changes nothing.
#include "attention_kernels.h"

#include "attention_state.h"
#include "decode_rows.h"

namespace hqmq {
inline namespace HQMQ_ISA {
namespace {

struct Scratch {
  float* q;        // [rows, dim], times the softmax scale
  float* rotated;  // q as coded keys need it: rotated if they are
  State total, split, own;
  float* score;   // [rows, kStepTokens]
  float* weight;  // [rows]: sum of a step's weights
  float* block;   // [kBlockTokens, dim]: decoded rows
  float* mean;    // [2, dim]: page means of K and V
};

Scratch Carve(float* floats, int rows, int dim) {
  const int64_t matrix = int64_t{rows} * dim, state = matrix + 2 * int64_t{(rows + 7) & ~7};
  Scratch out;
  auto take = [&floats](int64_t count) {
    float* at = floats;
    floats += (count + 7) & ~int64_t{7};
    return at;
  };
  out.block = take(kBlockTokens * dim);
  out.mean = take(2 * dim);
  out.q = take(matrix);
  out.rotated = take(matrix);
  out.total = StateAt(take(state), rows, dim);
  out.split = StateAt(take(state), rows, dim);
  out.own = StateAt(take(state), rows, dim);
  out.score = take(int64_t{rows} * kStepTokens);
  out.weight = take(rows);
  return out;
}

// What all parts of one block need.
struct Block {
  const AttentionJob& job;
  const AttentionBlock& at;
  int rows, dim, head_dim, page_size;
  int64_t token;       // position of the first row
  int64_t page_start;  // of the rows' own page: tokens before it are coded

  Block(const AttentionJob& job, const AttentionBlock& at)
      : job(job),
        at(at),
        rows(at.count * job.group),
        dim(PaddedDim(job.key.head_dim)),
        head_dim(job.key.head_dim),
        page_size(job.key.page_size),
        token(int64_t{job.past_length[at.batch]} + at.row),
        page_start(token / page_size * page_size) {}

  int64_t Position(int row) const { return token + row / job.group; }
  int64_t Sequence() const { return int64_t{at.batch} * job.heads + at.head; }
  // First position row sees.
  int64_t Oldest(int row) const { return job.window > 0 ? Position(row) - job.window + 1 : 0; }
};

void LoadQueries(const Block& block, const Scratch& scratch) {
  const AttentionJob& job = block.job;
  for (int r = 0; r < block.rows; ++r) {
    float* q = scratch.q + r * block.dim;
    const int head = block.at.head * job.group + r % job.group;
    LoadRow(RowAt(job.q, block.at.batch, head, block.at.row + r / job.group), job.q.dtype,
            block.head_dim, q);
    for (int d = block.head_dim; d < block.dim; ++d) q[d] = 0.0f;
    Scale(q, block.dim, job.scale);
  }
  memcpy(scratch.rotated, scratch.q, sizeof(float) * block.rows * block.dim);
  if (!job.key.hadamard) return;
  for (int r = 0; r < block.rows; ++r) HadamardRow(scratch.rotated + r * block.dim, block.head_dim);
}

// Scores of tokens first…first+count-1 → weights, and the state made ready to add the weighted
// values.
void SoftmaxStep(const Block& block, const Scratch& scratch, const State& state, int64_t first,
                 int count) {
  const int padded = (count + 7) & ~7;
  for (int r = 0; r < block.rows; ++r) {
    float* score = scratch.score + r * kStepTokens;
    const int64_t hidden = block.Oldest(r) - first, visible = block.Position(r) + 1 - first;
    if (block.job.softcap > 0) {
      for (int i = count; i < padded; ++i) score[i] = 0.0f;
      for (int i = 0; i < padded; i += 8)
        Vector::Store(SoftCap(Vector::Load(score + i), block.job.softcap), score + i);
    }
    for (int i = 0; i < hidden && i < count; ++i) score[i] = -kInfinity;
    for (int i = visible < count ? static_cast<int>(visible < 0 ? 0 : visible) : count; i < padded;
         ++i) {
      score[i] = -kInfinity;
    }
    F32x8 top = Vector::Load(score);
    for (int i = 8; i < padded; i += 8) top = Max(top, Vector::Load(score + i));
    float lane[8], maximum = state.maximum[r];
    Vector::Store(top, lane);
    for (float x : lane) maximum = Max(x, maximum);
    const F32x8 shift = Vector::Set(Finite(maximum));
    F32x8 sum = Vector::Set(0.0f);
    for (int i = 0; i < padded; i += 8) {
      const F32x8 w = Exp(Sub(Vector::Load(score + i), shift));
      Vector::Store(w, score + i);
      sum = Add(sum, w);
    }
    scratch.weight[r] = SumOfLanes(sum);
    if (maximum != state.maximum[r]) {
      const float factor = Exp(state.maximum[r] - Finite(maximum));
      Scale(state.out + r * block.dim, block.dim, factor);
      state.sum[r] *= factor;
      state.maximum[r] = maximum;
    }
    state.sum[r] += scratch.weight[r];
  }
}

// Reads one role's page in steps; the mean, if any, as floats.
PageReader Open(const Block& block, const Layout& layout, bool is_key, int page, float* mean) {
  const AttentionJob& job = block.job;
  PageReader out =
      OpenPage(is_key ? job.key : job.value, layout, is_key ? job.key_table : job.value_table,
               is_key ? job.key_cache : job.value_cache, block.Sequence(), block.at.head,
               job.num_pages, page);
  if (out.mean) LoadHalfRow(out.mean, block.head_dim, mean);
  return out;
}

// ReadRows, but rows kept exactly take the place of what the codes hold, in the form of coded rows:
// rotated, less the mean.
void ReadPage(PageReader* page, const float* mean, int first, int count, int dim, float* out) {
  ReadRows(page, first, count, dim, out);
  const int head_dim = page->role->head_dim, end = Least(first + count, page->num_sinks);
  for (int t = first; t < end; ++t) {
    float* row = out + (t - first) * dim;
    LoadHalfRow(page->sinks + t * head_dim, head_dim, row);
    if (page->role->hadamard) HadamardRow(row, head_dim);
    for (int d = 0; page->mean && d < head_dim; ++d) row[d] -= mean[d];
  }
}

void AttendPage(const Block& block, const Scratch& scratch, const State& state,
                const Layout& key_layout, const Layout& value_layout, int page) {
  const int dim = block.dim;
  PageReader keys = Open(block, key_layout, true, page, scratch.mean);
  float* mean_value = scratch.mean + dim;
  PageReader values = Open(block, value_layout, false, page, mean_value);
  for (int step = 0; step < block.page_size; step += kStepTokens) {
    const int count = Least(kStepTokens, block.page_size - step);
    const int64_t first = int64_t{page} * block.page_size + step;
    if (first + count <= block.Oldest(0)) {  // out of every row's window
      SkipRows(&keys, step, count);
      SkipRows(&values, step, count);
      continue;
    }
    for (int i = 0; i < count; i += kBlockTokens) {
      const int some = Least(kBlockTokens, count - i);
      ReadPage(&keys, scratch.mean, step + i, some, dim, scratch.block);
      Dots(scratch.rotated, block.rows, scratch.block, some, dim, scratch.score + i, kStepTokens);
    }
    if (keys.mean) {
      Dots(scratch.rotated, block.rows, scratch.mean, 1, dim, scratch.weight, 1);
      for (int r = 0; r < block.rows; ++r) {
        float* score = scratch.score + r * kStepTokens;
        const F32x8 offset = Vector::Set(scratch.weight[r]);
        for (int i = 0; i < count; i += 8)
          Vector::Store(Add(Vector::Load(score + i), offset), score + i);
      }
    }
    SoftmaxStep(block, scratch, state, first, count);
    for (int i = 0; i < count; i += kBlockTokens) {
      const int some = Least(kBlockTokens, count - i);
      ReadPage(&values, mean_value, step + i, some, dim, scratch.block);
      WeightedSums(scratch.score + i, kStepTokens, block.rows, scratch.block, some, dim, state.out);
    }
    if (values.mean) WeightedSums(scratch.weight, 1, block.rows, mean_value, 1, dim, state.out);
  }
}

void AttendSplitInto(const Block& block, const Scratch& scratch, int split, const State& state) {
  const AttentionJob& job = block.job;
  const Layout key_layout = MakeLayout(job.key), value_layout = MakeLayout(job.value);
  Clear(state, block.rows, block.dim);
  const int64_t start = int64_t{split} * SplitTokens(block.page_size),
                stop = start + SplitTokens(block.page_size);
  const int64_t end = stop < block.page_start ? stop : block.page_start;
  for (int64_t token = start; token < end; token += block.page_size) {
    if (token + block.page_size <= block.Oldest(0)) continue;
    AttendPage(block, scratch, state, key_layout, value_layout,
               static_cast<int>(token / block.page_size));
  }
}

// Rows first…first+count-1 of the own page, exact: from the tail as it was, or from the new rows.
void LoadOwn(const Block& block, bool is_key, int64_t first, int count, float* out) {
  const AttentionJob& job = block.job;
  const Rows& rows = is_key ? job.k : job.v;
  const uint16_t* tail = (is_key ? job.key_tail : job.value_tail) +
                         block.Sequence() * TailRows(is_key ? job.key : job.value) * block.head_dim;
  const int64_t past = job.past_length[block.at.batch];
  for (int i = 0; i < count; ++i) {
    const int64_t token = first + i;
    float* row = out + i * block.dim;
    if (token < past) {
      LoadHalfRow(tail + token % block.page_size * block.head_dim, block.head_dim, row);
    } else {
      LoadRow(RowAt(rows, block.at.batch, block.at.head, token - past), rows.dtype, block.head_dim,
              row);
      RoundToHalf(row, block.head_dim);
    }
  }
}

void AttendOwn(const Block& block, const Scratch& scratch, const State& state) {
  Clear(state, block.rows, block.dim);
  const int64_t end = block.token + block.at.count;
  for (int64_t first = block.page_start; first < end; first += kStepTokens) {
    const int count = static_cast<int>(end - first < kStepTokens ? end - first : kStepTokens);
    if (first + count <= block.Oldest(0)) continue;
    for (int i = 0; i < count; i += kBlockTokens) {
      const int some = Least(kBlockTokens, count - i);
      LoadOwn(block, true, first + i, some, scratch.block);
      Dots(scratch.q, block.rows, scratch.block, some, block.dim, scratch.score + i, kStepTokens);
    }
    SoftmaxStep(block, scratch, state, first, count);
    for (int i = 0; i < count; i += kBlockTokens) {
      const int some = Least(kBlockTokens, count - i);
      LoadOwn(block, false, first + i, some, scratch.block);
      WeightedSums(scratch.score + i, kStepTokens, block.rows, scratch.block, some, block.dim,
                   state.out);
    }
  }
}

// Adds the own page and the sinks to the merged splits, normalises, stores y.
void Finish(const Block& block, const Scratch& scratch) {
  const AttentionJob& job = block.job;
  const State& total = scratch.total;
  if (job.value.hadamard) {
    for (int r = 0; r < block.rows; ++r) HadamardRow(total.out + r * block.dim, block.head_dim);
  }
  AttendOwn(block, scratch, scratch.own);
  Merge(total, scratch.own, block.rows, block.dim);
  for (int r = 0; r < block.rows; ++r) {
    const int head = block.at.head * job.group + r % job.group;
    float* out = total.out + r * block.dim;
    float sum = total.sum[r];
    if (job.sinks) {
      const float maximum = Max(job.sinks[head], total.maximum[r]);
      const float factor = Exp(total.maximum[r] - Finite(maximum));
      sum = Fma(sum, factor, Exp(job.sinks[head] - Finite(maximum)));
      Scale(out, block.dim, factor);
    }
    Scale(out, block.dim, 1.0f / sum);
    StoreRow(out, block.head_dim, job.y.dtype,
             RowAt(job.y, block.at.batch, head, block.at.row + r / job.group));
  }
}

// Padding beyond head_dim is read by the dot products: zero it once.
Scratch Prepare(const Block& block, float* floats) {
  const Scratch scratch = Carve(floats, block.rows, block.dim);
  if (block.dim != block.head_dim)
    memset(scratch.block, 0, sizeof(float) * (kBlockTokens + 2) * block.dim);
  LoadQueries(block, scratch);
  return scratch;
}

void Attend(const AttentionJob& job, const AttentionBlock& at, float* floats) {
  const Block block(job, at);
  const Scratch scratch = Prepare(block, floats);
  Clear(scratch.total, block.rows, block.dim);
  const SplitRange splits = BlockSplits(job, at);
  for (int split = splits.first; split < splits.end; ++split) {
    AttendSplitInto(block, scratch, split, scratch.split);
    Merge(scratch.total, scratch.split, block.rows, block.dim);
  }
  Finish(block, scratch);
}

void AttendSplit(const AttentionJob& job, const AttentionBlock& at, int split, float* state,
                 float* floats) {
  const Block block(job, at);
  AttendSplitInto(block, Prepare(block, floats), split, StateAt(state, block.rows, block.dim));
}

void Combine(const AttentionJob& job, const AttentionBlock& at, const float* states, int splits,
             float* floats) {
  const Block block(job, at);
  const Scratch scratch = Prepare(block, floats);
  Clear(scratch.total, block.rows, block.dim);
  for (int i = 0; i < splits; ++i) {
    float* state = const_cast<float*>(states) + i * StateFloats(block.rows, block.head_dim);
    Merge(scratch.total, StateAt(state, block.rows, block.dim), block.rows, block.dim);
  }
  Finish(block, scratch);
}

void Dequantize(const DequantizeJob& job, int batch, int head, int page, float* floats) {
  const RoleParams& role = job.role;
  const int dim = PaddedDim(role.head_dim), size = role.page_size;
  const int64_t sequence = int64_t{batch} * job.heads + head, start = int64_t{page} * size;
  const int64_t left = job.length[batch] - start;
  const int valid = static_cast<int>(left < 0 ? 0 : left < size ? left : size);
  if (valid == size) {
    float mean[kMaxHeadDim];
    PageReader reader =
        OpenPage(role, MakeLayout(role), job.table, job.cache, sequence, head, job.num_pages, page);
    ReadRows(&reader, 0, size, dim, floats);
    if (reader.mean) LoadHalfRow(reader.mean, role.head_dim, mean);
    for (int t = 0; t < size; ++t) {
      float* row = floats + t * dim;
      for (int d = 0; reader.mean && d < role.head_dim; ++d) row[d] += mean[d];
      if (role.storage == Storage::kHqmq && role.hadamard) HadamardRow(row, role.head_dim);
    }
    for (int t = 0; t < reader.num_sinks; ++t)
      LoadHalfRow(reader.sinks + t * role.head_dim, role.head_dim, floats + t * dim);
  } else {
    memset(floats, 0, sizeof(float) * size * dim);
    for (int t = 0; t < valid; ++t) {
      LoadHalfRow(job.cache.tail + (sequence * TailRows(role) + t) * role.head_dim, role.head_dim,
                  floats + t * dim);
    }
  }
  for (int t = 0; t < size; ++t) {
    StoreRow(floats + t * dim, role.head_dim, job.x.dtype, RowAt(job.x, batch, head, start + t));
  }
}

}  // namespace
}  // namespace HQMQ_ISA

extern const AttentionKernels HQMQ_ISA_NAME(kAttentionKernels) = {Attend, AttendSplit, Combine,
                                                                  Dequantize};

}  // namespace hqmq
