// The encoder's inner loops, compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/params.h"

namespace hqmq {

// One page of one head. rows: fp16 [P, D]; secondaries: [S, 4]; levels: [2^r]; middles:
// [2^r - 1] boundaries between them. The rest points into the cache: codes [P, W], scales [Z], mean
// [D], outlier_mask, outlier_value [cap, 4].
struct PageJob {
  const RoleParams* role;
  const uint16_t* rows;
  const float* secondaries;
  const float* levels;
  const float* middles;
  int32_t* codes;
  int32_t* scales;
  uint16_t* mean;
  int32_t* outlier_mask;
  uint16_t* outlier_value;
  float* scratch;  // ScratchFloats(), 32-byte aligned
};

inline size_t ScratchFloats(const RoleParams& role) {
  const size_t p = role.page_size, d = role.head_dim, chunks = d / 4;
  const size_t flat = role.outlier_capacity > 0 ? p * chunks : 0;
  return p * d + p * chunks + p + 4 * 8 * chunks + flat;
}

struct EncodeKernels {
  void (*search)(const float* chunks, int64_t n, const float* secondaries, int32_t count,
                 int32_t* word, uint8_t* negative, float* projection);
  // n elements of an hqmq_dtype to fp16; false if any is then NaN or infinite.
  bool (*to_half)(const void* from, int32_t dtype, int64_t n, uint16_t* to);
  // Codes a full page; returns the outliers that found no slot.
  int (*encode_page)(const PageJob& job);
};

extern const EncodeKernels kEncodeKernelsBaseline;
extern const EncodeKernels kEncodeKernelsX86V3;  // where HQMQ_HAVE_X86_V3 is defined

const EncodeKernels& BestEncodeKernels();

}  // namespace hqmq
