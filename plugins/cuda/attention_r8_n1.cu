#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<8, 1>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<8, 1>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
