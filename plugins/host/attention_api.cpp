// The decode side of the C interface.
#include <cstring>
#include <memory>

#include "attention.h"
#include "hqmq_host_attention.h"

struct hqmq_table {
  hqmq::Words words;
};

namespace hqmq {
namespace {

RoleParams FromC(const hqmq_role_params& role) {
  RoleParams out;
  memcpy(&out, &role, sizeof(out));
  return out;
}

RoleCache FromC(const hqmq_role_cache& cache) {
  RoleCache out;
  memcpy(&out, &cache, sizeof(out));
  return out;
}

AttentionRole FromC(const hqmq_attention_role& role) {
  return {FromC(role.role),  role.x,
          role.secondaries,  role.levels,
          FromC(role.cache), role.table ? &role.table->words : nullptr};
}

Rows Writable(const hqmq_rows& x) {
  return {const_cast<void*>(x.data), x.dtype, x.batch_stride, x.head_stride, x.token_stride};
}

}  // namespace
}  // namespace hqmq

using namespace hqmq;

int hqmq_table_create(const hqmq_role_params* role, int32_t heads, const float* secondaries,
                      const float* levels, hqmq_table** table) {
  return Guard([&]() -> Status {
    if (!role || !table || heads < 0) return Invalid("role or table is missing");
    const RoleParams params = FromC(*role);
    if (Status status = CheckRole(params); !status.ok()) return status;
    if (params.storage == Storage::kHqmq && (!secondaries || !levels)) {
      return Invalid("the codebook (secondaries, levels) is missing");
    }
    *table = new hqmq_table{Words(params, heads, secondaries, levels)};
    return {};
  });
}

void hqmq_table_destroy(hqmq_table* table) { delete table; }

int hqmq_load(const hqmq_role_params* role, int32_t batch, int32_t heads, int32_t num_pages,
              const int32_t* length, const hqmq_table* table, const hqmq_role_cache* cache,
              const hqmq_rows* x, hqmq_parallel_for parallel_for, void* pool) {
  return Guard([&]() -> Status {
    if (!role || !cache || !x || !table) return Invalid("role, table, cache or x is missing");
    const RoleParams params = FromC(*role);
    if (!table->words.Matches(params, heads))
      return Invalid("the word table was made for another codebook");
    return DequantizeCache({params, table->words.table(), FromC(*cache), length, Writable(*x),
                            batch, heads, num_pages},
                           {parallel_for, pool});
  });
}

int hqmq_attention(const hqmq_attention_params* params, const hqmq_rows* q,
                   const hqmq_attention_role* key, const hqmq_attention_role* value,
                   const int32_t* past_length, const int32_t* new_length, const float* sinks,
                   const hqmq_rows* y, int64_t* dropped, hqmq_parallel_for parallel_for,
                   void* pool) {
  return Guard([&]() -> Status {
    if (!params || !q || !key || !value || !y)
      return Invalid("params, q, key, value or y is missing");
    AttentionRequest request = {};
    request.key = FromC(*key);
    request.value = FromC(*value);
    request.q = *q;
    request.y = Writable(*y);
    request.batch = params->batch;
    request.heads = params->heads;
    request.group = params->group;
    request.tokens = params->tokens;
    request.num_pages = params->num_pages;
    request.past_length = past_length;
    request.new_length = new_length;
    request.sinks = sinks;
    request.scale = params->scale;
    request.softcap = params->softcap;
    request.window = params->window;
    const Threads threads = {parallel_for, pool};
    if (Status status = CheckAttention(request, threads); !status.ok()) return status;
    int64_t lost = 0;
    RunAttention(request, threads, &lost);
    if (dropped) *dropped = lost;
    return {};
  });
}
