// The three operators as their nodes and calls describe them, whatever runs them. Constructors and
// Read() refuse what does not fit hqmq_trt/contract.py.
#pragma once

#include "node.h"

namespace hqmq::ort {

struct QuantizeCall {
  Role::View past;
  Tensor x;                                 // [B, H, T, D]
  const int32_t *past_length, *new_length;  // [B]
};

struct QuantizeNode {
  explicit QuantizeNode(const NodeInfo& node);
  QuantizeCall Read(const KernelContext* context) const;

  static constexpr size_t kCodebook = 3;
  Role role;
};

struct DequantizeCall {
  Role::View cache;
  const int32_t* length;  // [B]
  Dims dims;              // of the output
};

struct DequantizeNode {
  explicit DequantizeNode(const NodeInfo& node);
  DequantizeCall Read(const KernelContext* context) const;

  static constexpr size_t kCodebook = 1;
  Role role;
};

struct AttentionCall {
  Role::View key, value;
  Tensor q, k, v;                           // [B, Hq, T, D], twice [B, H, T, D]
  Tensor sinks;                             // [Hq], data null if there are none
  const int32_t *past_length, *new_length;  // [B]
  int32_t group, tokens;
};

struct AttentionNode {
  explicit AttentionNode(const NodeInfo& node);
  AttentionCall Read(const KernelContext* context) const;

  Role key, value;
  float scale, softcap;
  int window, has_sinks;
  size_t key_codebook, value_codebook, key_cache, value_cache;
};

}  // namespace hqmq::ort
