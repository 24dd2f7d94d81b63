#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<1, 1>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<1, 1>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
