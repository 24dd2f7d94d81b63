// What the codec needs to know of one role (K or V) of the cache. Mirrors hqmq_trt/contract.py.
#pragma once

#include <cstdint>

#include "macros.h"

namespace hqmq {

enum class Storage : int32_t { kFp16 = 0, kHqmq = 1 };
enum class Gain : int32_t { kMax = 0, kRms = 1 };

constexpr int kMaxSinkTokens = 8;

// Plain data: also the struct of the C interface and of kernel launches.
struct RoleParams {
  Storage storage;
  Gain gain;
  int32_t head_dim;          // D, a multiple of 4
  int32_t page_size;         // P, a power of two
  int32_t secondaries;       // S, 1…1024
  int32_t radius_bits;       // r, 1…8
  int32_t hadamard;          // 1: rotate head_dim here
  int32_t page_mean;         // 1: tokens are stored minus the mean of their page
  int32_t outlier_capacity;  // Med3x slots of a page; 0: no Med3x
  int32_t sink_tokens;       // N, first tokens of a sequence that are read exactly, 0…8
};

// One role's cache tensors of one layer (hqmq_trt/format.py: cache_tensors); absent ones are null.
// fp16 values travel as uint16_t bits.
struct RoleCache {
  int32_t* codes;           // [B, H, M*P, W]
  int32_t* scales;          // [B, H, M, Z]
  uint16_t* mean;           // [B, H, M, D]
  int32_t* outlier_mask;    // [B, H, M, mask_words]
  uint16_t* outlier_value;  // [B, H, M, cap, 4]
  uint16_t* tail;           // [B, H, P+N, D]: row t mod P of token t; then the first N tokens
};

// Rows of the tail of one sequence and head.
HQMQ_HD int TailRows(const RoleParams& role) { return role.page_size + role.sink_tokens; }

}  // namespace hqmq
