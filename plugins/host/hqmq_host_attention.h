/* C interface of libhqmq_host, decode side: codeword tables, HqmqDequantize and HqmqAttention.
 * Conventions as in hqmq_host.h.
 */
#ifndef HQMQ_HOST_ATTENTION_H_
#define HQMQ_HOST_ATTENTION_H_

#include "hqmq_host.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The codewords of one role's codebook, multiplied out: make it once a layer and role, use it in
 * every call. */
typedef struct hqmq_table hqmq_table;

/* secondaries: [heads, S, 4], levels: [2^r]; copied. Both null for storage fp16. */
HQMQ_API int hqmq_table_create(const hqmq_role_params* role, int32_t heads,
                               const float* secondaries, const float* levels, hqmq_table** table);
HQMQ_API void hqmq_table_destroy(hqmq_table* table); /* null is fine */

/* HqmqDequantize: the cache of length[b] tokens → x [B, H, M*P, D]; full pages from codes but for
 * the first sink_tokens tokens, which are exact, then the tail, then 0. x.data is written.
 * parallel_for null: the library's own threads. */
HQMQ_API int hqmq_load(const hqmq_role_params* role, int32_t batch, int32_t heads,
                       int32_t num_pages, const int32_t* length, const hqmq_table* table,
                       const hqmq_role_cache* cache, const hqmq_rows* x,
                       hqmq_parallel_for parallel_for, void* pool);

/* One role of hqmq_attention. */
typedef struct hqmq_attention_role {
  hqmq_role_params role;
  hqmq_rows x;              /* new k or v [B, H, T, D] */
  const float* secondaries; /* [H, S, 4]; null for storage fp16 */
  const float* levels;      /* [2^r]; likewise */
  const hqmq_table* table;  /* of these secondaries and levels */
  hqmq_role_cache cache;    /* present tensors, written in place */
} hqmq_attention_role;

typedef struct hqmq_attention_params {
  int32_t batch;
  int32_t heads; /* of K and V */
  int32_t group; /* query heads of a KV head */
  int32_t tokens;
  int32_t num_pages;
  int32_t window; /* 0: none */
  float scale;
  float softcap; /* 0: none */
} hqmq_attention_params;

/* HqmqAttention in place (hqmq_trt/contract.py): appends k and v, then attends. q, y: [B, H*group,
 * T, D]; y.data is written. sinks: float [H*group] or null. dropped: as in hqmq_append. Errors
 * leave the caches as they were. */
HQMQ_API int hqmq_attention(const hqmq_attention_params* params, const hqmq_rows* q,
                            const hqmq_attention_role* key, const hqmq_attention_role* value,
                            const int32_t* past_length, const int32_t* new_length,
                            const float* sinks, const hqmq_rows* y, int64_t* dropped,
                            hqmq_parallel_for parallel_for, void* pool);

#ifdef __cplusplus
}
#endif

#endif  // HQMQ_HOST_ATTENTION_H_
