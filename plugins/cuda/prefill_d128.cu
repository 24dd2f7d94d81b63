#include "prefill_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchPrefill<128>(const PrefillJob& job, cudaStream_t stream) {
  return LaunchPrefillKernel<128>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
