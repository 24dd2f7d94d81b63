// The body of decode_*.cu.
#pragma once

#include "decode_cosets.cuh"
#include "decode_kernel.cuh"

namespace hqmq {
namespace cuda {

template <class Key, class Value, int D, int kColumns, bool kByWork>
Status DecodeInstance<Key, Value, D, kColumns, kByWork>::Run(const DecodeJob& job, int blocks,
                                                             const Gpu& gpu, cudaStream_t stream) {
  return LaunchEarly(DecodeKernel<Key, Value, D, kColumns, kByWork>,
                     dim3(static_cast<unsigned>(blocks)), kDecodeThreads, job.shared_bytes, stream,
                     job, gpu);
}

}  // namespace cuda
}  // namespace hqmq
