#include "prefill_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchPrefill<64>(const PrefillJob& job, cudaStream_t stream) {
  return LaunchPrefillKernel<64>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
