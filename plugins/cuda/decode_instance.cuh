// The body of decode_*.cu.
#pragma once

#include "decode_codec12.cuh"
#include "decode_codec14.cuh"
#include "decode_codec16.cuh"
#include "decode_codec20.cuh"
#include "decode_kernel.cuh"

namespace hqmq {
namespace cuda {

template <class Key, class Value, int D, int kColumns>
int DecodeInstance<Key, Value, D, kColumns>::Stages(int shared_limit) {
  int stages = kMostStages;
  while (stages > 1 &&
         Arena<Key, Value, D, kColumns>::Bytes(stages) > static_cast<uint32_t>(shared_limit))
    --stages;
  return stages;
}

template <class Key, class Value, int D, int kColumns>
Status DecodeInstance<Key, Value, D, kColumns>::Run(const DecodeJob& job, int blocks,
                                                    const Gpu& gpu, cudaStream_t stream) {
  return LaunchEarly(DecodeKernel<Key, Value, D, kColumns>, dim3(static_cast<unsigned>(blocks)),
                     kDecodeThreads, Arena<Key, Value, D, kColumns>::Bytes(job.stages), stream, job,
                     gpu);
}

}  // namespace cuda
}  // namespace hqmq
