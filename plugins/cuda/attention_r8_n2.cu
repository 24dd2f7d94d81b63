#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchAttend<8, 2>(const AttentionJob& job, cudaStream_t stream) {
  return LaunchAttendKernel<8, 2>(job, stream);
}

}  // namespace cuda
}  // namespace hqmq
