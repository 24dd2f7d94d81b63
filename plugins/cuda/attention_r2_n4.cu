#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<2, 4>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<2, 4>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
