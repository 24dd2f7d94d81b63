#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<1, 4>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<1, 4>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
