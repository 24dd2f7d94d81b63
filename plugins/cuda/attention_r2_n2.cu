#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<2, 2>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<2, 2>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
