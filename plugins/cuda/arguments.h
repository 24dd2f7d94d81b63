// The arguments of the C interface as the kernels get them, and what is wrong with them.
#pragma once

#include <cstring>
#include <string>

#include "host/append.h"
#include "kernels.h"

namespace hqmq {
namespace cuda {

constexpr int64_t kMostBlocks = 0x7FFFFFFF;

inline Status CheckCudaRole(const RoleParams& role) {
  if (Status status = CheckRole(role); !status.ok()) return status;
  if (role.head_dim > kMaxHeadDim || role.head_dim % 4) {
    return Invalid("the GPU kernels take head_dim in multiples of 4 up to 256, not " +
                   std::to_string(role.head_dim));
  }
  return {};
}

inline RoleParams FromC(const hqmq_role_params& role) {
  RoleParams out;
  memcpy(&out, &role, sizeof(out));
  if (out.storage == Storage::kFp16) out.hadamard = out.page_mean = out.outlier_capacity = 0;
  return out;
}

inline Rows FromC(const hqmq_rows& x) {
  return {const_cast<void*>(x.data), x.dtype, x.batch_stride, x.head_stride, x.token_stride};
}

inline bool Misaligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes != 0;
}

inline Status CheckSizes(int batch, int heads, int tokens, int num_pages, int page_size) {
  if (batch < 0 || heads < 0 || tokens < 0 || num_pages < 0) return Invalid("a size is negative");
  const int64_t lanes = static_cast<int64_t>(batch) * heads;
  if (lanes > kMostBlocks / 2048 || tokens > kMostBlocks / 2048 ||
      lanes * (static_cast<int64_t>(tokens) + 1) > kMostBlocks || lanes * num_pages > kMostBlocks ||
      static_cast<int64_t>(num_pages) * page_size + tokens > kMostBlocks) {
    return Invalid("batch, heads, tokens or pages are beyond what one launch can count");
  }
  return {};
}

// A table that is not given, or has no entry, is all 0.
inline Status CheckPages(const hqmq_cuda_pages* pages, int64_t lanes, int heads, int num_pages,
                         PageTable* table) {
  *table = {};
  if (!pages) return {};
  if (pages->pool_pages < 0) return Invalid("pool_pages is negative");
  if (lanes == 0 || num_pages == 0) return {};
  if (pages->pool_pages == 0) return Invalid("the pool has no pages");
  if (static_cast<int64_t>(pages->pool_pages) * heads > kMostBlocks)
    return Invalid("the pool's pages are beyond what one launch can count");
  if (!pages->table) return Invalid("the page table is missing");
  if (Misaligned(pages->table, 4))
    return Invalid("the page table does not lie at a multiple of 4 bytes");
  *table = {pages->table, pages->pool_pages};
  return {};
}

inline Status CheckRows(const Rows& x, const char* name, bool wanted) {
  if (x.dtype < HQMQ_FLOAT32 || x.dtype > HQMQ_BFLOAT16)
    return Invalid(std::string("unknown dtype of ") + name);
  if (wanted && !x.data) return Invalid(std::string(name) + " is missing");
  return {};
}

// `empty`: no sequence or head, so that no tensor is needed.
inline Status MakeView(const hqmq_role_params& params, const hqmq_role_cache& cache,
                       const float* secondaries, const float* levels, const hqmq_rows& x,
                       int num_pages, bool empty, RoleView* view) {
  *view = {};
  view->role = FromC(params);
  const RoleParams& role = view->role;
  if (Status status = CheckCudaRole(role); !status.ok()) return status;
  view->layout = MakeLayout(role);
  view->mask_words = MaskWords(role);
  view->hadamard_scale = HadamardScale(role.head_dim);
  memcpy(&view->cache, &cache, sizeof(view->cache));
  view->secondaries = secondaries;
  view->levels = levels;
  view->x = FromC(x);
  if (empty) return {};
  const bool packed = role.storage == Storage::kHqmq;
  if (!cache.tail || (!cache.codes && num_pages > 0))
    return Invalid("cache tensor codes or tail is missing");
  if (packed && (!secondaries || !levels))
    return Invalid("the codebook (secondaries, levels) is missing");
  if (packed && num_pages > 0 &&
      (!cache.scales || (role.page_mean && !cache.mean) ||
       (role.outlier_capacity > 0 && (!cache.outlier_mask || !cache.outlier_value)))) {
    return Invalid("cache tensor scales, mean, outlier_mask or outlier_value is missing");
  }
  if (Misaligned(secondaries, 16) || Misaligned(cache.outlier_value, 8) ||
      Misaligned(cache.codes, 4) || Misaligned(cache.scales, 4)) {
    return Invalid(
        "secondaries, outlier_value, codes or scales do not lie at multiples of 16, 8, 4, 4 bytes");
  }
  return {};
}

inline size_t AlignedBytes(size_t bytes) { return (bytes + 255) / 256 * 256; }

inline Status CheckWorkspace(const void* workspace, size_t bytes, size_t needed) {
  if (bytes < needed || (needed && !workspace)) {
    return Invalid("the workspace holds " + std::to_string(bytes) + " bytes and " +
                   std::to_string(needed) + " are needed; ask the _workspace function");
  }
  if (needed && Misaligned(workspace, 16))
    return Invalid("the workspace does not lie at a multiple of 16 bytes");
  return {};
}

}  // namespace cuda
}  // namespace hqmq
