/* C interface of libhqmq_cuda: the three operators on a GPU, on raw device pointers.
 *
 * Parallel to hqmq_host.h and hqmq_host_attention.h and with their structs; `table` of
 * hqmq_attention_role is not used. Pointers to data (x, lengths, codebooks, cache tensors, sinks,
 * status, workspace) are device memory; structs are host memory and are read before the call
 * returns. Calls enqueue kernels on `stream` (a cudaStream_t) and never wait: lengths are read by
 * the kernels, so that a captured CUDA graph serves changing lengths. Results are the same bytes on
 * every run and do not depend on what shares a batch, but for how attention cuts it
 * (hqmq_cuda_batch_invariant, hqmq_cuda_cut_by_work). head_dim: a multiple of 4 up to 256.
 *
 * Page tables: the functions that end in _paged read and write pages of a pool (hqmq_cuda_pages).
 *
 * A GPU cannot raise. A page that holds NaN or infinity gets scales NaN and decodes to NaN; tokens
 * that find no page are not cached and their rows of y are NaN. `status` counts both.
 */
#ifndef HQMQ_CUDA_H_
#define HQMQ_CUDA_H_

#include "host/hqmq_host_attention.h"

#ifdef __cplusplus
extern "C" {
#endif

enum hqmq_cuda_error { HQMQ_CUDA_FAILED = 5 /* a CUDA call failed; beside enum hqmq_status */ };

/* Device memory; the kernels add to it, the caller clears it. */
typedef struct hqmq_cuda_status {
  int32_t not_finite; /* new tokens (of a sequence, head and role) with NaN or infinity as fp16 */
  int32_t no_page;    /* tokens of a sequence that found no page: beyond num_pages, or of pages that
                         filled without a valid entry of the page table */
  int32_t dropped;    /* Med3x outliers that found no slot */
} hqmq_cuda_status;

HQMQ_API int32_t hqmq_cuda_format_version(void);
HQMQ_API const char* hqmq_cuda_version(void);
HQMQ_API size_t hqmq_cuda_role_params_size(void);
HQMQ_API size_t hqmq_cuda_role_cache_size(void);
HQMQ_API const char* hqmq_cuda_last_error(void); /* of this thread; never null */

/* Which pages of a pool sequences have. The page tensors are then those of a cache of pool_pages
 * sequences of one page each:
 *
 *   codes [pool, H, P, W]             scales [pool, H, 1, Z]               mean [pool, H, 1, D]
 *   outlier_mask [pool, H, 1, words]  outlier_value [pool, H, 1, cap, 4]
 *
 * Page m of sequence b (tokens m*P … m*P + P-1) is page table[b, m] of each of them, of K and of V
 * alike; num_pages is the most pages that a sequence can have. The tail stays [B, H, P+N, D]: it
 * belongs to the running sequence. Results are the same bytes as without a table.
 *
 * A call reads the entries of the full pages that one of its queries sees (hqmq_cuda_load: of all
 * full pages), and of the pages that fill in it; the others may be anything. A page is written
 * once, in the call in which it fills, and must then be named by no other entry that the call
 * reads. Full pages may be named by any number of sequences, which so share a prefix; a sequence
 * that goes on from another's tokens needs a copy of its tail, too.
 *
 * An entry outside 0 … pool_pages-1 touches no memory: a page that fills there is not written and
 * its tokens count in status.no_page; one that is read gives NaN (but for the first sink_tokens
 * tokens, which come from the tail), so that the rows of y that see it are NaN. */
typedef struct hqmq_cuda_pages {
  const int32_t* table; /* device memory, [B, num_pages]; read by the kernels, as lengths are */
  int32_t pool_pages;   /* pages of the pool */
} hqmq_cuda_pages;

/* Bytes of device memory hqmq_cuda_append needs beside its arguments; often 0. */
HQMQ_API int hqmq_cuda_append_workspace(const hqmq_role_params* role, int32_t batch, int32_t heads,
                                        int32_t tokens, size_t* bytes);

/* HqmqQuantize in place (hqmq_append). status may be null. */
HQMQ_API int hqmq_cuda_append(const hqmq_role_params* role, int32_t batch, int32_t heads,
                              int32_t tokens, int32_t num_pages, const hqmq_rows* x,
                              const int32_t* past_length, const int32_t* new_length,
                              const float* secondaries, const float* levels,
                              const hqmq_role_cache* cache, hqmq_cuda_status* status,
                              void* workspace, size_t workspace_bytes, void* stream);
/* The same with a page table; pages null: without one. */
HQMQ_API int hqmq_cuda_append_paged(const hqmq_cuda_pages* pages, const hqmq_role_params* role,
                                    int32_t batch, int32_t heads, int32_t tokens, int32_t num_pages,
                                    const hqmq_rows* x, const int32_t* past_length,
                                    const int32_t* new_length, const float* secondaries,
                                    const float* levels, const hqmq_role_cache* cache,
                                    hqmq_cuda_status* status, void* workspace,
                                    size_t workspace_bytes, void* stream);

/* HqmqDequantize (hqmq_load). Lengths beyond the cache count as its capacity. */
HQMQ_API int hqmq_cuda_load(const hqmq_role_params* role, int32_t batch, int32_t heads,
                            int32_t num_pages, const int32_t* length, const float* secondaries,
                            const float* levels, const hqmq_role_cache* cache, const hqmq_rows* x,
                            void* stream);
/* The same with a page table; pages null: without one. */
HQMQ_API int hqmq_cuda_load_paged(const hqmq_cuda_pages* pages, const hqmq_role_params* role,
                                  int32_t batch, int32_t heads, int32_t num_pages,
                                  const int32_t* length, const float* secondaries,
                                  const float* levels, const hqmq_role_cache* cache,
                                  const hqmq_rows* x, void* stream);

/* Page tables change neither workspaces nor paths. */
HQMQ_API int hqmq_cuda_attention_workspace(const hqmq_attention_params* params,
                                           const hqmq_role_params* key,
                                           const hqmq_role_params* value, size_t* bytes);

/* Bytes that are enough for every batch, number of tokens and of pages up to those of params. Fewer
 * of them may need more: what leaves the GPU idle is cut into more parts. */
HQMQ_API int hqmq_cuda_attention_workspace_limit(const hqmq_attention_params* params,
                                                 const hqmq_role_params* key,
                                                 const hqmq_role_params* value, size_t* bytes);

/* Which kernels attend: the fused decode kernel (at most 8 new tokens, fp16 or bf16), prefill on
 * tensor cores (more tokens, fp16 or bf16, any scheme), or the plain ones, which take everything.
 * path: enum hqmq_cuda_path for a call with these params whose activations are of `dtype` and whose
 * cache tensors lie at multiples of 16 bytes, on the current GPU; *why (of this thread, never
 * null): why it is none of those before it in this list. */
enum hqmq_cuda_path { HQMQ_CUDA_PLAIN = 0, HQMQ_CUDA_DECODE = 1, HQMQ_CUDA_PREFILL = 2 };
HQMQ_API int hqmq_cuda_attention_path(const hqmq_attention_params* params,
                                      const hqmq_role_params* key, const hqmq_role_params* value,
                                      int32_t dtype, int32_t* path, const char** why);

/* For comparisons: while 1, attention of this process takes the plain kernels only; while 2,
 * prefill takes the kernel of sm_80 on sm_90 too. 0: as usual. */
HQMQ_API void hqmq_cuda_use_plain_attention(int32_t on);

/* What a block of the fused decode kernel keeps in shared memory. */
typedef struct hqmq_cuda_decode_memory {
  int32_t head_dim, columns; /* of the instance; columns: query rows that it holds, 4 or 8 */
  int32_t code_bits[2];      /* of K, V */
  int32_t compact; /* 1: tables with as many copies as fit, 0: those of GPUs with 227 KB */
  int32_t built;   /* 0: this library lacks the instance, 1: it has it for GPUs with less memory, 2:
                      for all */
  int32_t copies[2]; /* of each word in K's and in V's table (which may be one) */
  int32_t rings;     /* warps that take coded tiles; the same for every limit */
  int32_t stages;    /* of each of them, of stage_tiles tiles; 0: nothing fits */
  int32_t stage_tiles;
  int32_t shared_states; /* 1: the warps' states, too, 0: they lie in the workspace */
  int32_t shared_bytes;  /* all in all */
} hqmq_cuda_decode_memory;

/* The fused decode kernel for a call with these params where a GPU gives a block `shared_limit`
 * bytes of shared memory (sm_80, 87: 166912; 86, 89, 120: 101376; 90, 100: 232448). Asks no GPU.
 * *why (of this thread, never null): why there is none; stages is 0 then. */
HQMQ_API int hqmq_cuda_decode_plan(const hqmq_attention_params* params, const hqmq_role_params* key,
                                   const hqmq_role_params* value, int32_t shared_limit,
                                   hqmq_cuda_decode_memory* plan, const char** why);

/* For comparisons: the fused decode kernel of this process takes at most `bytes` of shared memory a
 * block, as on a GPU with so much; 0: as much as there is. y has the same bits. */
HQMQ_API void hqmq_cuda_limit_shared_memory(int32_t bytes);

/* 1: the fused decode kernel of this process gives a sequence the same bits of y whatever the other
 * sequences of the call, which takes up to half as long again in batches, and as long as the
 * longest one where lengths differ. 0: their number, and where the call is cut by work
 * (hqmq_cuda_cut_by_work) their lengths in their order, decide into which parts each is cut, but
 * nothing else of the others does. At first 0, and 1 where the environment has
 * HQMQ_BATCH_INVARIANT. Workspaces of hqmq_cuda_attention_workspace are those of the setting, the
 * limits serve both. */
HQMQ_API void hqmq_cuda_batch_invariant(int32_t on);

/* How the fused decode kernel of this process cuts calls of several sequences. 1: the GPU decides
 * by their lengths, as at first: where they differ much, blocks share the keys of all sequences
 * evenly. 0: each sequence is cut into as many parts, whatever its length, as where the environment
 * has HQMQ_CUT_BY_WORK=0. 2, for tests: blocks always share the keys evenly, if batch invariance is
 * off. The same lengths in the same order always give the same bits. Workspaces serve all. */
HQMQ_API void hqmq_cuda_cut_by_work(int32_t when);

/* HqmqAttention in place (hqmq_attention). sinks: float [H*group] or null; status may be null. */
HQMQ_API int hqmq_cuda_attention(const hqmq_attention_params* params, const hqmq_rows* q,
                                 const hqmq_attention_role* key, const hqmq_attention_role* value,
                                 const int32_t* past_length, const int32_t* new_length,
                                 const float* sinks, const hqmq_rows* y, hqmq_cuda_status* status,
                                 void* workspace, size_t workspace_bytes, void* stream);
/* The same with a page table; pages null: without one. */
HQMQ_API int hqmq_cuda_attention_paged(const hqmq_cuda_pages* pages,
                                       const hqmq_attention_params* params, const hqmq_rows* q,
                                       const hqmq_attention_role* key,
                                       const hqmq_attention_role* value, const int32_t* past_length,
                                       const int32_t* new_length, const float* sinks,
                                       const hqmq_rows* y, hqmq_cuda_status* status,
                                       void* workspace, size_t workspace_bytes, void* stream);

/* Device to device; the ranges must not overlap. */
HQMQ_API int hqmq_cuda_copy(void* to, const void* from, size_t bytes, void* stream);

/* count elements x of a dtype (enum hqmq_dtype) as float, for sinks. */
HQMQ_API int hqmq_cuda_to_float(const void* x, int32_t dtype, int64_t count, float* out,
                                void* stream);

#ifdef __cplusplus
}
#endif

#endif  // HQMQ_CUDA_H_
