// HqmqQuantize on the GPU: which kernel codes the pages that fill, and the tails.
#include "encode_job.h"
#include "tails.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// WriteTail of each new token. Rows of the grid: roles.
__global__ void __launch_bounds__(kThreads, 4)
    WriteTailsKernel(const __grid_constant__ EncodeJob whole) {
  const AppendJob& job = whole.append;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t lane = row / job.call.tokens;
  if (lane >= static_cast<int64_t>(job.call.batch) * job.call.heads) return;
  WriteTail(whole, blockIdx.y, static_cast<int>(lane / job.call.heads),
            static_cast<int>(lane % job.call.heads), static_cast<int>(row % job.call.tokens),
            threadIdx.x % kWarp);
}

EncodeJob MakeJob(const AppendJob& append) {
  EncodeJob job = {};
  job.append = append;
  for (int i = 0; i < append.roles; ++i) job.vector[i] = HasVectors(append.view[i]);
  job.most = MostPages(append.call.tokens, append.view[0].role.page_size);
  return job;
}

}  // namespace

size_t AppendScratch(const RoleParams& role, int64_t lanes, int tokens) {
  return GeneralScratch(role, lanes, tokens);
}

Status EncodePages(const AppendJob& append, cudaStream_t stream) {
  Gpu gpu;
  if (Status status = CurrentGpu(&gpu); !status.ok()) return status;
  EncodeJob job = MakeJob(append);
  bool fast[2] = {};
  for (int i = 0; i < append.roles; ++i)
    fast[i] = job.vector[i] && FastEncodeTakes(append.view[i], gpu.shared_limit);
  const auto encode = [&](int role, int roles) {
    job.role = role;
    job.roles = roles;
    return fast[role] ? EncodeFast(job, gpu, stream) : EncodeGeneral(job, stream);
  };
  if (append.roles == 1 || fast[0] == fast[1]) return encode(0, append.roles);
  const Status status = encode(0, 1);
  return status.ok() ? encode(1, 1) : status;
}

Status WriteTails(const AppendJob& append, cudaStream_t stream) {
  if (append.call.tokens == 1) return {};
  const int64_t rows =
      static_cast<int64_t>(append.call.batch) * append.call.heads * append.call.tokens;
  const int64_t blocks = (rows * kWarp + kThreads - 1) / kThreads;
  return Launch(WriteTailsKernel, dim3(static_cast<unsigned>(blocks), append.roles), kThreads, 0,
                stream, MakeJob(append));
}

}  // namespace cuda
}  // namespace hqmq
