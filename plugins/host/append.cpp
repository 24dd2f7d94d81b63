#include "append.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "codec/encode.h"
#include "encode_kernels.h"
#include "isa.h"

namespace hqmq {
namespace {

// Loops below so many elements are not worth waking threads for.
constexpr int64_t kSerialElements = 1 << 15;
constexpr int kCheckTokens = 64;  // tokens one task checks

// A buffer each thread keeps, for vectors of 32 bytes.
template <int kUse, class T>
T* ThreadBuffer(size_t count) {
  struct alignas(32) Block {
    unsigned char bytes[32];
  };
  thread_local std::vector<Block> blocks;
  const size_t wanted = (count * sizeof(T) + sizeof(Block) - 1) / sizeof(Block);
  if (blocks.size() < wanted) blocks.resize(wanted);
  return reinterpret_cast<T*>(blocks.data());
}

const void* Row(const hqmq_rows& x, int64_t b, int64_t h, int64_t t) {
  const int64_t element = b * x.batch_stride + h * x.head_stride + t * x.token_stride;
  return static_cast<const char*>(x.data) + element * (x.dtype == HQMQ_FLOAT32 ? 4 : 2);
}

std::string At(const char* what, int64_t value) {
  return std::string(what) + std::to_string(value);
}

Threads Serial() {
  return {[](void*, int64_t n, void (*body)(void*, int64_t), void* ctx) {
            for (int64_t i = 0; i < n; ++i) body(ctx, i);
          },
          nullptr};
}

struct Page {
  int32_t b, h, page;
};

void EncodeOne(const AppendJob& job, const Page& at, const Layout& layout, const float* middles,
               const EncodeKernels& kernels, std::atomic<int64_t>* dropped) {
  const RoleParams& role = job.role;
  const int p = role.page_size, d = role.head_dim;
  const int64_t lane = static_cast<int64_t>(at.b) * job.heads + at.h;
  const int64_t page = lane * job.num_pages + at.page, past = job.past_length[at.b];
  uint16_t* rows = ThreadBuffer<0, uint16_t>(static_cast<size_t>(p) * d);
  for (int i = 0; i < p; ++i) {
    const int64_t t = static_cast<int64_t>(at.page) * p + i;
    if (t < past) {
      memcpy(rows + i * d, job.cache.tail + (lane * TailRows(role) + i) * d, d * sizeof(uint16_t));
    } else {
      kernels.to_half(Row(job.x, at.b, at.h, t - past), job.x.dtype, d, rows + i * d);
    }
  }
  int32_t* codes = job.cache.codes + page * p * layout.words;
  if (role.storage == Storage::kFp16) {
    memcpy(codes, rows, static_cast<size_t>(p) * d * sizeof(uint16_t));
    return;
  }
  PageJob work = {};
  work.role = &role;
  work.rows = rows;
  work.secondaries = job.secondaries + static_cast<int64_t>(at.h) * role.secondaries * 4;
  work.levels = job.levels;
  work.middles = middles;
  work.codes = codes;
  work.scales = job.cache.scales + page * ScaleWords(role);
  if (role.page_mean) work.mean = job.cache.mean + page * d;
  if (role.outlier_capacity > 0) {
    work.outlier_mask = job.cache.outlier_mask + page * MaskWords(role);
    work.outlier_value = job.cache.outlier_value + page * role.outlier_capacity * 4;
  }
  work.scratch = ThreadBuffer<1, float>(ScratchFloats(role));
  *dropped += kernels.encode_page(work);
}

}  // namespace

const EncodeKernels& BestEncodeKernels() {
#ifdef HQMQ_HAVE_X86_V3
  if (UseX86V3()) return kEncodeKernelsX86V3;
#endif
  return kEncodeKernelsBaseline;
}

Status CheckRole(const RoleParams& role) {
  const int d = role.head_dim, p = role.page_size;
  if (p < 8 || p > 1024 || (p & (p - 1)))
    return Invalid(At("page size is not a power of two in 8…1024: ", p));
  if (role.sink_tokens < 0 || role.sink_tokens > kMaxSinkTokens)
    return Invalid(At("sink tokens outside 0…8: ", role.sink_tokens));
  if (role.storage == Storage::kFp16) {
    if (role.sink_tokens != 0) {
      return Invalid(At("storage fp16 holds every token exactly and takes no sink tokens, not ",
                        role.sink_tokens));
    }
    return d > 0 && d % 2 == 0 ? Status()
                               : Invalid(At("head_dim is not a positive even number: ", d));
  }
  if (role.storage != Storage::kHqmq)
    return Invalid(At("unknown storage: ", static_cast<int>(role.storage)));
  if (d <= 0 || d % 4) return Invalid(At("head_dim is not divisible by 4: ", d));
  if (role.gain != Gain::kMax && role.gain != Gain::kRms) {
    return Invalid(At("unknown gain: ", static_cast<int>(role.gain)));
  }
  if (role.secondaries < 1 || role.secondaries > 1024) {
    return Invalid(At("secondaries outside 1…1024: ", role.secondaries));
  }
  if (role.radius_bits < 1 || role.radius_bits > 8)
    return Invalid(At("radius bits outside 1…8: ", role.radius_bits));
  if (role.hadamard && (d & (d - 1))) {
    return Invalid(At("the Hadamard rotation needs head_dim to be a power of two, not ", d));
  }
  if (role.outlier_capacity < 0 || role.outlier_capacity > p * (d / 4)) {
    return Invalid(At("outlier capacity is not within a page's chunks: ", role.outlier_capacity));
  }
  return {};
}

Status CheckAppend(const AppendJob& job, const Threads& threads) {
  if (Status status = CheckRole(job.role); !status.ok()) return status;
  const RoleParams& role = job.role;
  const bool packed = role.storage == Storage::kHqmq;
  const RoleCache& cache = job.cache;
  if (job.batch < 0 || job.heads < 0 || job.tokens < 0 || job.num_pages < 0)
    return Invalid("a size is negative");
  if (job.x.dtype < HQMQ_FLOAT32 || job.x.dtype > HQMQ_BFLOAT16)
    return Invalid(At("unknown dtype: ", job.x.dtype));
  if (!job.batch || !job.heads) return {};
  if (!job.past_length || !job.new_length) return Invalid("past_length or new_length is missing");
  if (!job.x.data && job.tokens > 0) return Invalid("x is missing");
  if (!cache.tail || (!cache.codes && job.num_pages > 0))
    return Invalid("cache tensor codes or tail is missing");
  if (packed && (!job.secondaries || !job.levels))
    return Invalid("the codebook (secondaries, levels) is missing");
  if (packed && job.num_pages > 0 &&
      (!cache.scales || (role.page_mean && !cache.mean) ||
       (role.outlier_capacity > 0 && (!cache.outlier_mask || !cache.outlier_value)))) {
    return Invalid("cache tensor scales, mean, outlier_mask or outlier_value is missing");
  }
  const int64_t capacity = static_cast<int64_t>(job.num_pages) * role.page_size;
  for (int32_t b = 0; b < job.batch; ++b) {
    const int64_t past = job.past_length[b], count = job.new_length[b];
    const std::string where = At(" of sequence ", b);
    if (past < 0 || past > capacity) {
      return Invalid("past_length" + where + At(" is ", past) +
                     At(", outside the cache of 0…", capacity));
    }
    if (count < 0 || count > job.tokens) {
      return Invalid("new_length" + where + At(" is ", count) + At(", outside 0…", job.tokens));
    }
    if (past + count > capacity) {
      const int64_t needed = (past + count + role.page_size - 1) / role.page_size;
      return {HQMQ_CACHE_FULL, At("the cache is too small: sequence ", b) + At(" needs ", needed) +
                                   At(" pages of ", role.page_size) +
                                   At(" tokens and the cache has ", job.num_pages) +
                                   "; give it more pages"};
    }
  }

  const int64_t blocks = (job.tokens + kCheckTokens - 1) / kCheckTokens,
                lanes = static_cast<int64_t>(job.batch) * job.heads;
  const EncodeKernels& kernels = BestEncodeKernels();
  const int64_t none = lanes * job.tokens;
  std::atomic<int64_t> first_bad{none};  // (b * H + h) * T + t
  const auto check = [&](int64_t task) {
    const int64_t lane = task / blocks, b = lane / job.heads, h = lane % job.heads;
    const int64_t start = task % blocks * kCheckTokens;
    const int64_t end = std::min<int64_t>(start + kCheckTokens, job.new_length[b]);
    uint16_t* row = ThreadBuffer<0, uint16_t>(role.head_dim);
    for (int64_t t = start; t < end; ++t) {
      if (kernels.to_half(Row(job.x, b, h, t), job.x.dtype, role.head_dim, row)) continue;
      const int64_t position = lane * job.tokens + t;
      for (int64_t seen = first_bad;
           position < seen && !first_bad.compare_exchange_weak(seen, position);) {
      }
      return;
    }
  };
  (none * role.head_dim < kSerialElements ? Serial() : threads).For(lanes * blocks, check);
  if (first_bad < none) {
    const int64_t lane = first_bad / job.tokens, b = lane / job.heads, t = first_bad % job.tokens;
    const std::string name = job.x.name ? job.x.name : "x";
    return {HQMQ_NOT_FINITE, name + At(" holds NaN or infinity (as fp16) at sequence ", b) +
                                 At(", head ", lane % job.heads) +
                                 At(", token ", job.past_length[b] + t) +
                                 "; the model overflows fp16 or its input is broken"};
  }
  return {};
}

void Append(const AppendJob& job, const Threads& threads, int64_t* dropped) {
  const RoleParams& role = job.role;
  const Layout layout = MakeLayout(role);
  const EncodeKernels& kernels = BestEncodeKernels();
  const int p = role.page_size, d = role.head_dim;

  std::vector<Page> pages;
  int64_t new_tokens = 0;
  for (int32_t b = 0; b < job.batch; ++b) {
    const int32_t past = job.past_length[b], count = job.new_length[b];
    new_tokens += static_cast<int64_t>(count) * job.heads;
    for (int32_t h = 0; h < job.heads; ++h) {
      for (int32_t page = past / p; page < (past + count) / p; ++page)
        pages.push_back({b, h, page});
    }
  }
  std::vector<float> middles;
  if (role.storage == Storage::kHqmq) {
    for (int i = 0; i + 1 < 1 << role.radius_bits; ++i)
      middles.push_back(LevelMiddle(job.levels, i));
  }
  std::atomic<int64_t> lost{0};
  threads.For(static_cast<int64_t>(pages.size()),
              [&](int64_t i) { EncodeOne(job, pages[i], layout, middles.data(), kernels, &lost); });
  *dropped += lost;

  // Pages above still read the old tail.
  const auto write_tail = [&](int64_t lane) {
    const int64_t b = lane / job.heads, h = lane % job.heads;
    const int64_t past = job.past_length[b], end = past + job.new_length[b];
    uint16_t* tail = job.cache.tail + lane * TailRows(role) * d;
    const auto write = [&](int64_t t, int64_t row) {
      kernels.to_half(Row(job.x, b, h, t - past), job.x.dtype, d, tail + row * d);
    };
    for (int64_t t = std::max(past, end - p); t < end; ++t) write(t, t % p);
    for (int64_t t = past; t < std::min<int64_t>(end, role.sink_tokens); ++t) write(t, p + t);
  };
  (new_tokens * d < kSerialElements ? Serial() : threads)
      .For(static_cast<int64_t>(job.batch) * job.heads, write_tail);
}

}  // namespace hqmq
