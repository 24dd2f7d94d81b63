// The codec and append part of the C interface.
#include <cstring>

#include "append.h"
#include "codec/layout.h"
#include "encode_kernels.h"
#include "hqmq_host.h"
#include "isa.h"

namespace hqmq {
namespace {

static_assert(sizeof(hqmq_role_params) == sizeof(RoleParams), "the structs of C and C++ differ");
static_assert(sizeof(hqmq_role_cache) == sizeof(RoleCache), "the structs of C and C++ differ");
constexpr int64_t kSearchBlock = 4096;  // chunks of one task

RoleParams FromC(const hqmq_role_params* role) {
  RoleParams out;
  memcpy(&out, role, sizeof(out));
  return out;
}

std::string& LastError() {
  thread_local std::string text;
  return text;
}

Status CheckPacked(const RoleParams& role) {
  if (Status status = CheckRole(role); !status.ok()) return status;
  return role.storage == Storage::kHqmq ? Status() : Invalid("storage fp16 has no codes");
}

}  // namespace

int Report(const Status& status) {
  LastError() = status.text;
  return status.code;
}

}  // namespace hqmq

using namespace hqmq;

int32_t hqmq_format_version(void) { return HQMQ_FORMAT_VERSION; }
const char* hqmq_version(void) { return HQMQ_VERSION; }
const char* hqmq_isa(void) { return IsaName(); }
size_t hqmq_role_params_size(void) { return sizeof(RoleParams); }
size_t hqmq_role_cache_size(void) { return sizeof(RoleCache); }
const char* hqmq_last_error(void) { return LastError().c_str(); }

int hqmq_set_num_threads(int32_t count) {
  return Guard([&]() -> Status {
    if (count < 0 || count > 1024) return Invalid("threads outside 0…1024");
    SetNumThreads(count);
    return {};
  });
}

int32_t hqmq_num_threads(void) { return NumThreads(); }

int hqmq_get_layout(const hqmq_role_params* role, hqmq_layout* layout) {
  return Guard([&]() -> Status {
    if (!role || !layout) return Invalid("role or layout is missing");
    const RoleParams params = FromC(role);
    if (Status status = CheckRole(params); !status.ok()) return status;
    const Layout from = MakeLayout(params);
    *layout = {};
    layout->index_bits = from.index_bits;
    layout->code_bits = from.code_bits;
    layout->words = from.words;
    layout->mask_words = MaskWords(params);
    layout->num_planes = from.num_planes;
    for (int i = 0; i < from.num_planes; ++i) {
      layout->plane_width[i] = from.planes[i].width;
      layout->plane_shift[i] = from.planes[i].shift;
      layout->plane_offset[i] = from.planes[i].offset;
    }
    return {};
  });
}

int hqmq_pack(const hqmq_role_params* role, int64_t tokens, const uint32_t* codes, int32_t* words) {
  return Guard([&]() -> Status {
    if (!role || !codes || !words || tokens < 0) return Invalid("role, codes or words is missing");
    const RoleParams params = FromC(role);
    if (Status status = CheckPacked(params); !status.ok()) return status;
    const Layout layout = MakeLayout(params);
    memset(words, 0, static_cast<size_t>(tokens) * layout.words * sizeof(int32_t));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < layout.chunks; ++c) {
        PackCode(layout, c, codes[t * layout.chunks + c], words + t * layout.words);
      }
    }
    return {};
  });
}

int hqmq_unpack(const hqmq_role_params* role, int64_t tokens, const int32_t* words,
                uint32_t* codes) {
  return Guard([&]() -> Status {
    if (!role || !codes || !words || tokens < 0) return Invalid("role, codes or words is missing");
    const RoleParams params = FromC(role);
    if (Status status = CheckPacked(params); !status.ok()) return status;
    const Layout layout = MakeLayout(params);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < layout.chunks; ++c) {
        codes[t * layout.chunks + c] = UnpackCode(layout, c, words + t * layout.words);
      }
    }
    return {};
  });
}

int hqmq_search(const float* chunks, int64_t n, const float* secondaries, int32_t count,
                int32_t* word, uint8_t* negative, float* projection) {
  return Guard([&]() -> Status {
    if (n < 0 || !secondaries || (n > 0 && (!chunks || !word || !negative || !projection))) {
      return Invalid("chunks, secondaries or an output is missing");
    }
    if (count < 1 || count > 1024) return Invalid("secondaries outside 1…1024");
    const EncodeKernels& kernels = BestEncodeKernels();
    Threads().For((n + kSearchBlock - 1) / kSearchBlock, [&](int64_t i) {
      const int64_t start = i * kSearchBlock,
                    size = n - start < kSearchBlock ? n - start : kSearchBlock;
      kernels.search(chunks + 4 * start, size, secondaries, count, word + start, negative + start,
                     projection + start);
    });
    return {};
  });
}

int hqmq_append(const hqmq_role_params* role, int32_t batch, int32_t heads, int32_t tokens,
                int32_t num_pages, const hqmq_rows* x, const int32_t* past_length,
                const int32_t* new_length, const float* secondaries, const float* levels,
                const hqmq_role_cache* cache, int64_t* dropped, hqmq_parallel_for parallel_for,
                void* pool) {
  return Guard([&]() -> Status {
    if (!role || !x || !cache) return Invalid("role, x or cache is missing");
    AppendJob job = {FromC(role), batch,      heads,       tokens, num_pages, *x,
                     past_length, new_length, secondaries, levels, {}};
    memcpy(&job.cache, cache, sizeof(job.cache));
    const Threads threads = {parallel_for, pool};
    if (Status status = CheckAppend(job, threads); !status.ok()) return status;
    int64_t lost = 0;
    Append(job, threads, &lost);
    if (dropped) *dropped = lost;
    return {};
  });
}
