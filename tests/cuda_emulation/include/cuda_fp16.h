// __half as plugins/cuda/transfer.cu reads it.
#pragma once

#include <cstdint>

#include "codec/numeric.h"

struct __half {
  uint16_t bits;
  operator float() const { return hqmq::FloatFromHalf(bits); }
};
