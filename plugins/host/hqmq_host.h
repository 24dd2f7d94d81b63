/* C interface of libhqmq_host: the codec on the CPU, for Python (hqmq_trt/native.py) and other
 * hosts.
 *
 * Functions return HQMQ_OK or an error code; hqmq_last_error() then tells the calling thread what
 * is wrong. Nothing throws across this interface. fp16 values travel as uint16_t bits. Tensors of a
 * cache are contiguous and have the shapes of hqmq_trt/format.py; others name their strides.
 */
#ifndef HQMQ_HOST_H_
#define HQMQ_HOST_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HQMQ_API __attribute__((visibility("default")))
#else
#define HQMQ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum hqmq_status {
  HQMQ_OK = 0,
  HQMQ_INVALID = 1,    /* an argument is out of range or missing */
  HQMQ_NOT_FINITE = 2, /* NaN or infinity in the input */
  HQMQ_CACHE_FULL = 3, /* the cache has too few pages */
  HQMQ_INTERNAL = 4    /* out of memory */
};

enum hqmq_dtype { HQMQ_FLOAT32 = 0, HQMQ_FLOAT16 = 1, HQMQ_BFLOAT16 = 2 };

/* hqmq::RoleParams of plugins/codec/params.h, field by field. */
typedef struct hqmq_role_params {
  int32_t storage; /* 0 fp16, 1 packed */
  int32_t gain;    /* 0 MAX, 1 RMS */
  int32_t head_dim;
  int32_t page_size;
  int32_t secondaries;
  int32_t radius_bits;
  int32_t hadamard;
  int32_t page_mean;
  int32_t outlier_capacity;
  int32_t sink_tokens; /* 0…8 */
} hqmq_role_params;

/* hqmq::RoleCache of plugins/codec/params.h: tensors of one layer and role; absent ones are null.
 */
typedef struct hqmq_role_cache {
  int32_t* codes;          /* [B, H, M*P, W] */
  int32_t* scales;         /* [B, H, M, P*b/32]: b = 16 bits a token with gain MAX, 8 with RMS */
  uint16_t* mean;          /* [B, H, M, D] */
  int32_t* outlier_mask;   /* [B, H, M, mask_words] */
  uint16_t* outlier_value; /* [B, H, M, cap, 4] */
  uint16_t* tail;          /* [B, H, P + sink_tokens, D] */
} hqmq_role_cache;

/* Activations [B, H, T, D]; the D elements of a token are contiguous, other strides count elements.
 */
typedef struct hqmq_rows {
  const void* data;
  int32_t dtype; /* enum hqmq_dtype */
  int64_t batch_stride;
  int64_t head_stride;
  int64_t token_stride;
  const char* name; /* for error messages; null: "x" */
} hqmq_rows;

/* Bit layout of one token (hqmq_trt/format.py). */
typedef struct hqmq_layout {
  int32_t index_bits;
  int32_t code_bits;
  int32_t words;
  int32_t mask_words;
  int32_t num_planes;
  int32_t plane_width[5];
  int32_t plane_shift[5];
  int32_t plane_offset[5];
} hqmq_layout;

/* Runs body(ctx, i) for i in 0…n-1, in any order and on any threads, and returns when all are done.
 */
typedef void (*hqmq_parallel_for)(void* pool, int64_t n, void (*body)(void* ctx, int64_t i),
                                  void* ctx);

HQMQ_API int32_t hqmq_format_version(void);
HQMQ_API const char* hqmq_version(void);
HQMQ_API const char* hqmq_isa(void); /* instruction set in use: "x86-64-v3" or "baseline" */
HQMQ_API size_t hqmq_role_params_size(void);
HQMQ_API size_t hqmq_role_cache_size(void);
HQMQ_API const char* hqmq_last_error(void); /* of this thread; never null */

/* Threads of the library's own pool; 0: as many as the process may use (or HQMQ_NUM_THREADS). */
HQMQ_API int hqmq_set_num_threads(int32_t count);
HQMQ_API int32_t hqmq_num_threads(void);

HQMQ_API int hqmq_get_layout(const hqmq_role_params* role, hqmq_layout* layout);
/* codes uint32 [tokens, D/4] <-> words int32 [tokens, W] */
HQMQ_API int hqmq_pack(const hqmq_role_params* role, int64_t tokens, const uint32_t* codes,
                       int32_t* words);
HQMQ_API int hqmq_unpack(const hqmq_role_params* role, int64_t tokens, const int32_t* words,
                         uint32_t* codes);

/* Codeword nearest in angle to each of n chunks [n, 4] among 24*S: word 0…12*S-1, sign, projection
 * on it. secondaries: [S, 4], S in 1…1024. Chunks must be finite. */
HQMQ_API int hqmq_search(const float* chunks, int64_t n, const float* secondaries, int32_t count,
                         int32_t* word, uint8_t* negative, float* projection);

/* HqmqQuantize in place: appends the first new_length[b] of T tokens of x [B, H, T, D] to a cache
 * of num_pages pages that holds past_length[b] tokens. secondaries: [H, S, 4], levels: [2^r], both
 * null for storage fp16. dropped (may be null) is set to the outliers of the pages filled that
 * found no slot. HQMQ_NOT_FINITE (also for values fp16 cannot hold) and HQMQ_CACHE_FULL leave the
 * cache as it was. parallel_for null: the library's own threads. */
HQMQ_API int hqmq_append(const hqmq_role_params* role, int32_t batch, int32_t heads, int32_t tokens,
                         int32_t num_pages, const hqmq_rows* x, const int32_t* past_length,
                         const int32_t* new_length, const float* secondaries, const float* levels,
                         const hqmq_role_cache* cache, int64_t* dropped,
                         hqmq_parallel_for parallel_for, void* pool);

#ifdef __cplusplus
}
#endif

#endif  // HQMQ_HOST_H_
