#include "prefill_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchPrefill<256>(const PrefillJob& job, cudaStream_t stream) {
  return LaunchPrefillKernel<256>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
