// HqmqQuantize on the CPU, in place on a cache.
#pragma once

#include <cstdint>

#include "codec/params.h"
#include "hqmq_host.h"
#include "parallel.h"
#include "status.h"

namespace hqmq {

// What is wrong with a role's parameters, if anything.
Status CheckRole(const RoleParams& role);

struct AppendJob {
  RoleParams role;
  int32_t batch;
  int32_t heads;
  int32_t tokens;  // T, rows of x
  int32_t num_pages;
  hqmq_rows x;
  const int32_t* past_length;  // [B]
  const int32_t* new_length;   // [B]
  const float* secondaries;    // [H, S, 4]
  const float* levels;         // [2^r]
  RoleCache cache;
};

// Fails before anything is written if a length is out of range, the cache has too few pages, or a
// new token holds NaN or infinity (as fp16).
Status CheckAppend(const AppendJob& job, const Threads& threads);

// Codes the pages that fill, then writes the tail; adds the outliers that found no slot to
// `dropped`. CheckAppend must have passed.
void Append(const AppendJob& job, const Threads& threads, int64_t* dropped);

}  // namespace hqmq
