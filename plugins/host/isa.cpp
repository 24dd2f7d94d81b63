#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace hqmq {

bool UseX86V3() {
#ifdef HQMQ_HAVE_X86_V3
  static const bool use = [] {
    const char* wish = std::getenv("HQMQ_ISA");
    if (wish && std::strcmp(wish, "baseline") == 0) return false;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }();
  return use;
#else
  return false;
#endif
}

const char* IsaName() { return UseX86V3() ? "x86-64-v3" : "baseline"; }

}  // namespace hqmq
