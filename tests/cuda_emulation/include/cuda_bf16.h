// __nv_bfloat16 as plugins/cuda/transfer.cu reads it.
#pragma once

#include <cstdint>

#include "codec/numeric.h"

struct __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return hqmq::FloatFromBf16(bits); }
};
