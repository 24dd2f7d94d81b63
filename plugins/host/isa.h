// Which copy of the kernels this processor runs.
#pragma once

namespace hqmq {

// Whether x86-64-v3 (AVX2, FMA, F16C) may be used: the processor has it and HQMQ_ISA=baseline is
// not set.
bool UseX86V3();
const char* IsaName();

}  // namespace hqmq
