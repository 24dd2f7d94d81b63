// Decode tables: the codewords of a codebook, multiplied out once.
#pragma once

#include <vector>

#include "attention_kernels.h"
#include "codec/params.h"

namespace hqmq {

// Owns what WordTable points to. Empty for storage fp16.
class Words {
 public:
  Words() = default;
  // secondaries: [heads, S, 4]; levels: [2^r]; not kept.
  Words(const RoleParams& role, int heads, const float* secondaries, const float* levels);

  WordTable table() const { return {words_.data(), levels_.data(), head_stride_}; }
  bool Matches(const RoleParams& role, int heads) const;

 private:
  std::vector<float> words_, levels_;
  int64_t head_stride_ = 0;
  int heads_ = 0, secondaries_ = 0, radius_bits_ = 0;
};

}  // namespace hqmq
