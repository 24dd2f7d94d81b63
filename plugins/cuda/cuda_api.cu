// The C interface: checks arguments on the host, then enqueues.
#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "decode_job.h"
#include "prefill.h"

namespace hqmq {
namespace {

std::string& LastError() {
  thread_local std::string text;
  return text;
}

}  // namespace

int Report(const Status& status) {
  LastError() = status.text;
  return status.code;
}

namespace cuda {
namespace {

std::atomic<bool> plain_only{false};

// Workspace: scratch of K, of V, then what one of the kernels needs; which depends on more than
// sizes.
struct AttentionPlan {
  AttentionJob job;
  int block_rows;
  size_t scratch[2], states, counters, parts, prefill;

  size_t bytes() const {
    return scratch[0] + scratch[1] + std::max({states, counters + parts, prefill});
  }
};

void PlanDecode(const AttentionJob& job, AttentionPlan* plan, bool most = false) {
  if (!DecodeTakesScheme(job, nullptr)) return;
  plan->counters = std::max(plan->counters, AlignedBytes(DecodeCounterBytes(job)));
  plan->parts = std::max(plan->parts, AlignedBytes(DecodePartBytes(job, most)));
}

Status MakePlan(const hqmq_attention_params& params, const hqmq_role_params& key,
                const hqmq_role_params& value, AttentionPlan* plan) {
  *plan = {};
  AttentionJob& job = plan->job;
  job.key.role = FromC(key);
  job.value.role = FromC(value);
  for (const RoleParams* role : {&job.key.role, &job.value.role}) {
    if (Status status = CheckCudaRole(*role); !status.ok()) return status;
  }
  if (key.head_dim != value.head_dim || key.page_size != value.page_size)
    return Invalid("K and V differ in head_dim or page size");
  if (params.group < 1)
    return Invalid("the number of query heads is not a multiple of the KV heads");
  if (params.window < 0) return Invalid("window is negative: use 0 for none");
  if (!(params.softcap >= 0)) return Invalid("softcap is negative: use 0 for none");
  if (Status status =
          CheckSizes(params.batch, params.heads, params.tokens, params.num_pages, key.page_size);
      !status.ok()) {
    return status;
  }
  const int64_t lanes = static_cast<int64_t>(params.batch) * params.heads;
  const int64_t rows = static_cast<int64_t>(params.group) * params.tokens;
  if (params.group > 4096 || lanes * rows > kMostBlocks)
    return Invalid("query rows are beyond what one launch can count");
  job.call = {params.batch, params.heads, params.tokens, params.num_pages, nullptr, nullptr, {}};
  job.scale = params.scale;
  job.softcap = params.softcap;
  job.window = params.window;
  job.group = params.group;
  if (lanes == 0 || rows == 0) return {};
  plan->block_rows = BlockRows(rows, key.head_dim);
  CutRows(&job, plan->block_rows);
  plan->states = AlignedBytes(AttentionStates(job));
  plan->scratch[0] = AlignedBytes(AppendScratch(job.key.role, lanes, params.tokens));
  plan->scratch[1] = AlignedBytes(AppendScratch(job.value.role, lanes, params.tokens));
  plan->prefill = AlignedBytes(PrefillBytes(job));
  PlanDecode(job, plan);
  return {};
}

// `why`: why not the fused decode kernel, and why not prefill.
hqmq_cuda_path PathOf(const AttentionJob& job, std::string* why) {
  *why = plain_only ? "hqmq_cuda_use_plain_attention is on" : "";
  if (job.call.batch == 0 || job.call.heads == 0 || job.call.tokens == 0)
    *why = "nothing runs: there is no sequence, head or token";
  if (!why->empty()) return HQMQ_CUDA_PLAIN;
  if (FastDecodeSupports(job, why)) return HQMQ_CUDA_DECODE;
  std::string prefill;
  if (PrefillSupports(job, &prefill)) return HQMQ_CUDA_PREFILL;
  *why += "; " + prefill;
  return HQMQ_CUDA_PLAIN;
}

Status RunAttention(AttentionPlan* plan, const hqmq_attention_role& key,
                    const hqmq_attention_role& value, hqmq_cuda_status* counters, void* workspace,
                    cudaStream_t stream) {
  AttentionJob& job = plan->job;
  char* at = static_cast<char*>(workspace);
  AppendJob append = {};
  append.roles = 2;
  append.call = job.call;
  append.status = counters;
  const hqmq_attention_role* roles[2] = {&key, &value};
  for (int i = 0; i < 2; ++i) {
    const hqmq_attention_role& role = *roles[i];
    if (Status status = MakeView(role.role, role.cache, role.secondaries, role.levels, role.x,
                                 job.call.num_pages, false, &append.view[i]);
        !status.ok()) {
      return status;
    }
    if (Status status = CheckRows(append.view[i].x, i ? "v" : "k", true); !status.ok())
      return status;
    append.scratch[i] = reinterpret_cast<float*>(at);
    at += plan->scratch[i];
  }
  job.key = append.view[0];
  job.value = append.view[1];
  std::string why;
  const hqmq_cuda_path path = PathOf(job, &why);
  if (path == HQMQ_CUDA_DECODE) {
    append.counters = reinterpret_cast<uint32_t*>(at);
    append.lane_counters = DecodeCounters(job);
  } else if (path == HQMQ_CUDA_PLAIN) {
    job.states = plan->states ? reinterpret_cast<float*>(at) : nullptr;
  }
  // Attention reads the codes of pages that fill now, and the tail as it was before.
  Status status = EncodePages(append, stream);
  if (!status.ok()) return status;
  switch (path) {
    case HQMQ_CUDA_DECODE:
      status = Decode(job, append.counters, reinterpret_cast<float*>(at + plan->counters), stream);
      break;
    case HQMQ_CUDA_PREFILL:
      status = Prefill(job, at, stream);
      break;
    default:
      status = Attend(job, plan->block_rows, stream);
  }
  return status.ok() ? WriteTails(append, stream) : status;
}

}  // namespace
}  // namespace cuda
}  // namespace hqmq

using namespace hqmq;
using namespace hqmq::cuda;

int32_t hqmq_cuda_format_version(void) { return HQMQ_FORMAT_VERSION; }
const char* hqmq_cuda_version(void) { return HQMQ_VERSION; }
size_t hqmq_cuda_role_params_size(void) { return sizeof(RoleParams); }
size_t hqmq_cuda_role_cache_size(void) { return sizeof(RoleCache); }
const char* hqmq_cuda_last_error(void) { return LastError().c_str(); }

int hqmq_cuda_append_workspace(const hqmq_role_params* role, int32_t batch, int32_t heads,
                               int32_t tokens, size_t* bytes) {
  return Guard([&]() -> Status {
    if (!role || !bytes) return Invalid("role or bytes is missing");
    const RoleParams params = cuda::FromC(*role);
    if (Status status = CheckCudaRole(params); !status.ok()) return status;
    if (Status status = CheckSizes(batch, heads, tokens, 0, params.page_size); !status.ok())
      return status;
    *bytes = AppendScratch(params, static_cast<int64_t>(batch) * heads, tokens);
    return {};
  });
}

int hqmq_cuda_append(const hqmq_role_params* role, int32_t batch, int32_t heads, int32_t tokens,
                     int32_t num_pages, const hqmq_rows* x, const int32_t* past_length,
                     const int32_t* new_length, const float* secondaries, const float* levels,
                     const hqmq_role_cache* cache, hqmq_cuda_status* status, void* workspace,
                     size_t workspace_bytes, void* stream) {
  return hqmq_cuda_append_paged(nullptr, role, batch, heads, tokens, num_pages, x, past_length,
                                new_length, secondaries, levels, cache, status, workspace,
                                workspace_bytes, stream);
}

int hqmq_cuda_append_paged(const hqmq_cuda_pages* pages, const hqmq_role_params* role,
                           int32_t batch, int32_t heads, int32_t tokens, int32_t num_pages,
                           const hqmq_rows* x, const int32_t* past_length,
                           const int32_t* new_length, const float* secondaries, const float* levels,
                           const hqmq_role_cache* cache, hqmq_cuda_status* status, void* workspace,
                           size_t workspace_bytes, void* stream) {
  return Guard([&]() -> Status {
    if (!role || !x || !cache) return Invalid("role, x or cache is missing");
    if (Status bad = CheckSizes(batch, heads, tokens, num_pages, role->page_size); !bad.ok())
      return bad;
    const int64_t lanes = static_cast<int64_t>(batch) * heads;
    PageTable table;
    if (Status bad = CheckPages(pages, lanes, heads, num_pages, &table); !bad.ok()) return bad;
    cuda::AppendJob job = {};
    if (Status bad =
            MakeView(*role, *cache, secondaries, levels, *x, num_pages, lanes == 0, &job.view[0]);
        !bad.ok()) {
      return bad;
    }
    if (Status bad = CheckRows(job.view[0].x, "x", lanes * tokens > 0); !bad.ok()) return bad;
    if (lanes == 0 || tokens == 0) return {};
    if (!past_length || !new_length) return Invalid("past_length or new_length is missing");
    const size_t needed = AppendScratch(job.view[0].role, lanes, tokens);
    if (Status bad = CheckWorkspace(workspace, workspace_bytes, needed); !bad.ok()) return bad;
    job.roles = 1;
    job.scratch[0] = static_cast<float*>(workspace);
    job.call = {batch, heads, tokens, num_pages, past_length, new_length, table};
    job.status = status;
    const auto on = static_cast<cudaStream_t>(stream);
    const Status encoded = EncodePages(job, on);
    return encoded.ok() ? WriteTails(job, on) : encoded;
  });
}

int hqmq_cuda_load(const hqmq_role_params* role, int32_t batch, int32_t heads, int32_t num_pages,
                   const int32_t* length, const float* secondaries, const float* levels,
                   const hqmq_role_cache* cache, const hqmq_rows* x, void* stream) {
  return hqmq_cuda_load_paged(nullptr, role, batch, heads, num_pages, length, secondaries, levels,
                              cache, x, stream);
}

int hqmq_cuda_load_paged(const hqmq_cuda_pages* pages, const hqmq_role_params* role, int32_t batch,
                         int32_t heads, int32_t num_pages, const int32_t* length,
                         const float* secondaries, const float* levels,
                         const hqmq_role_cache* cache, const hqmq_rows* x, void* stream) {
  return Guard([&]() -> Status {
    if (!role || !x || !cache) return Invalid("role, x or cache is missing");
    if (Status bad = CheckSizes(batch, heads, 0, num_pages, role->page_size); !bad.ok()) return bad;
    const bool empty = !batch || !heads || !num_pages;
    LoadJob job = {};
    if (Status bad = CheckPages(pages, static_cast<int64_t>(batch) * heads, heads, num_pages,
                                &job.call.pages);
        !bad.ok()) {
      return bad;
    }
    if (Status bad = MakeView(*role, *cache, secondaries, levels, *x, num_pages, empty, &job.view);
        !bad.ok()) {
      return bad;
    }
    if (Status bad = CheckRows(job.view.x, "x", !empty); !bad.ok()) return bad;
    if (empty) return {};
    if (!length) return Invalid("length is missing");
    job.call.batch = batch;
    job.call.heads = heads;
    job.call.num_pages = num_pages;
    job.call.past_length = length;
    return Load(job, static_cast<cudaStream_t>(stream));
  });
}

int hqmq_cuda_attention_workspace(const hqmq_attention_params* params, const hqmq_role_params* key,
                                  const hqmq_role_params* value, size_t* bytes) {
  return Guard([&]() -> Status {
    if (!params || !key || !value || !bytes)
      return Invalid("params, key, value or bytes is missing");
    AttentionPlan plan;
    if (Status status = MakePlan(*params, *key, *value, &plan); !status.ok()) return status;
    *bytes = plan.bytes();
    return {};
  });
}

int hqmq_cuda_attention_workspace_limit(const hqmq_attention_params* params,
                                        const hqmq_role_params* key, const hqmq_role_params* value,
                                        size_t* bytes) {
  return Guard([&]() -> Status {
    if (!params || !key || !value || !bytes)
      return Invalid("params, key, value or bytes is missing");
    AttentionPlan plan;
    if (Status status = MakePlan(*params, *key, *value, &plan); !status.ok()) return status;
    if (plan.block_rows) {
      plan.states = AlignedBytes(MostAttentionStates(plan.job));
      plan.prefill = AlignedBytes(MostPrefillBytes(plan.job));
    }
    AttentionJob job = plan.job;
    for (int tokens = 1; plan.block_rows && tokens <= params->tokens; ++tokens) {
      if (tokens > kMostDecodeTokens) break;
      job.call.tokens = tokens;
      PlanDecode(job, &plan, true);
    }
    *bytes = plan.bytes();
    return {};
  });
}

int hqmq_cuda_attention_path(const hqmq_attention_params* params, const hqmq_role_params* key,
                             const hqmq_role_params* value, int32_t dtype, int32_t* path,
                             const char** why) {
  return Guard([&]() -> Status {
    if (!params || !key || !value || !path || !why)
      return Invalid("params, key, value, path or why is missing");
    AttentionPlan plan;
    if (Status status = MakePlan(*params, *key, *value, &plan); !status.ok()) return status;
    for (Rows* rows : {&plan.job.q, &plan.job.y, &plan.job.key.x, &plan.job.value.x})
      rows->dtype = dtype;
    thread_local std::string text;
    *path = PathOf(plan.job, &text);
    *why = text.c_str();
    return {};
  });
}

int hqmq_cuda_decode_plan(const hqmq_attention_params* params, const hqmq_role_params* key,
                          const hqmq_role_params* value, int32_t shared_limit,
                          hqmq_cuda_decode_memory* memory, const char** why) {
  return Guard([&]() -> Status {
    if (!params || !key || !value || !memory || !why)
      return Invalid("params, key, value, plan or why is missing");
    if (shared_limit < 0) return Invalid("shared_limit is negative");
    AttentionPlan plan;
    if (Status status = MakePlan(*params, *key, *value, &plan); !status.ok()) return status;
    thread_local std::string text;
    text.clear();
    *memory = {};
    if (plan.block_rows == 0)
      text = "nothing runs: there is no sequence, head or token";
    else
      PlanDecodeMemory(plan.job, shared_limit, memory, &text);
    *why = text.c_str();
    return {};
  });
}

void hqmq_cuda_limit_shared_memory(int32_t bytes) { LimitDecodeMemory(bytes); }

void hqmq_cuda_batch_invariant(int32_t on) { MakeBatchInvariant(on != 0); }

void hqmq_cuda_cut_by_work(int32_t when) {
  CutByWork(when == 0 ? WorkCut::kNever : when == 1 ? WorkCut::kWhereFaster : WorkCut::kAlways);
}

void hqmq_cuda_use_plain_attention(int32_t on) { plain_only = on == 1, AllowSm90Prefill(on != 2); }

int hqmq_cuda_attention(const hqmq_attention_params* params, const hqmq_rows* q,
                        const hqmq_attention_role* key, const hqmq_attention_role* value,
                        const int32_t* past_length, const int32_t* new_length, const float* sinks,
                        const hqmq_rows* y, hqmq_cuda_status* status, void* workspace,
                        size_t workspace_bytes, void* stream) {
  return hqmq_cuda_attention_paged(nullptr, params, q, key, value, past_length, new_length, sinks,
                                   y, status, workspace, workspace_bytes, stream);
}

int hqmq_cuda_attention_paged(const hqmq_cuda_pages* pages, const hqmq_attention_params* params,
                              const hqmq_rows* q, const hqmq_attention_role* key,
                              const hqmq_attention_role* value, const int32_t* past_length,
                              const int32_t* new_length, const float* sinks, const hqmq_rows* y,
                              hqmq_cuda_status* status, void* workspace, size_t workspace_bytes,
                              void* stream) {
  return Guard([&]() -> Status {
    if (!params || !q || !key || !value || !y)
      return Invalid("params, q, key, value or y is missing");
    AttentionPlan plan;
    if (Status bad = MakePlan(*params, key->role, value->role, &plan); !bad.ok()) return bad;
    const int64_t lanes = static_cast<int64_t>(params->batch) * params->heads;
    if (Status bad =
            CheckPages(pages, lanes, params->heads, params->num_pages, &plan.job.call.pages);
        !bad.ok()) {
      return bad;
    }
    plan.job.q = cuda::FromC(*q);
    plan.job.y = cuda::FromC(*y);
    const bool empty = plan.block_rows == 0;
    for (const Rows* rows : {&plan.job.q, &plan.job.y}) {
      if (Status bad = CheckRows(*rows, rows == &plan.job.q ? "q" : "y", !empty); !bad.ok())
        return bad;
    }
    if (empty) return {};
    if (!past_length || !new_length) return Invalid("past_length or new_length is missing");
    if (Status bad = CheckWorkspace(workspace, workspace_bytes, plan.bytes()); !bad.ok())
      return bad;
    plan.job.call.past_length = past_length;
    plan.job.call.new_length = new_length;
    plan.job.sinks = sinks;
    return cuda::RunAttention(&plan, *key, *value, status, workspace,
                              static_cast<cudaStream_t>(stream));
  });
}
