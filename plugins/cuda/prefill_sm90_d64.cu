#include "prefill_sm90.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchSm90<64>(const PrefillJob& job, cudaStream_t stream) {
  return LaunchSm90Kernel<64>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
