#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<4, 4>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<4, 4>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
