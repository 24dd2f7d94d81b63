// HqmqQuantize on the GPU: which kernel codes the pages that fill, and the tails.
#include <algorithm>

#include "encode_job.h"
#include "tails.cuh"

namespace hqmq {
namespace cuda {
namespace {

constexpr int kThreads = 256;

struct TailsJob {
  EncodeJob whole;
  int32_t rows;
};

// WriteTail of each new token, or of those that may be kept (in the last P rows or the first N) or
// lost where EncodePages counts the others: `rows` warps a sequence and head. Rows of the grid:
// roles.
__global__ void __launch_bounds__(kThreads, 4)
    WriteTailsKernel(const __grid_constant__ TailsJob tails) {
  const AppendJob& job = tails.whole.append;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t lane = row / tails.rows;
  if (lane >= static_cast<int64_t>(job.call.batch) * job.call.heads) return;
  const int b = static_cast<int>(lane / job.call.heads), role = blockIdx.y;
  const RoleParams& params = job.view[role].role;
  const int p = params.page_size;
  const Span span = SpanOf(job.call, p, b);
  // New tokens whose row later ones take, and the first of them that have another row.
  const int passed = tails.whole.fast[role] ? max(0, span.end - p - span.past) : 0;
  const int sinks = min(passed, max(0, params.sink_tokens - span.past));
  for (int n = static_cast<int>(row % tails.rows);; n += tails.rows) {
    const int i = n < sinks ? n : n - sinks + passed;
    if (i >= span.end + span.lost - span.past) return;
    WriteTail(tails.whole, role, b, static_cast<int>(lane % job.call.heads), i, n == 0,
              threadIdx.x % kWarp);
  }
}

EncodeJob MakeJob(const AppendJob& append, const Gpu& gpu) {
  EncodeJob job = {};
  job.append = append;
  for (int i = 0; i < append.roles; ++i) {
    job.vector[i] = HasVectors(append.view[i]);
    job.fast[i] = job.vector[i] && FastEncodeTakes(append.view[i], gpu.shared_limit);
  }
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
  EncodeJob job = MakeJob(append, gpu);
  const auto encode = [&](int role, int roles) {
    job.role = role;
    job.roles = roles;
    return job.fast[role] ? EncodeFast(job, gpu, stream) : EncodeGeneral(job, gpu, stream);
  };
  const auto filtered = [&](int i) { return job.fast[i] && Filtered(append.view[i].role); };
  if (append.roles == 1 || (job.fast[0] == job.fast[1] && filtered(0) == filtered(1)))
    return encode(0, append.roles);
  const Status status = encode(0, 1);
  return status.ok() ? encode(1, 1) : status;
}

Status WriteTails(const AppendJob& append, cudaStream_t stream) {
  if (append.call.tokens == 1) return {};
  Gpu gpu;
  if (Status status = CurrentGpu(&gpu); !status.ok()) return status;
  TailsJob job = {MakeJob(append, gpu), 1};
  for (int i = 0; i < append.roles; ++i) {
    const int kept = TailRows(append.view[i].role), t = append.call.tokens;
    job.rows = std::max(job.rows, job.whole.fast[i] ? std::min(kept, t) : t);
  }
  const int64_t rows = static_cast<int64_t>(append.call.batch) * append.call.heads * job.rows;
  const int64_t blocks = (rows * kWarp + kThreads - 1) / kThreads;
  return Launch(WriteTailsKernel, dim3(static_cast<unsigned>(blocks), append.roles), kThreads, 0,
                stream, job);
}

}  // namespace cuda
}  // namespace hqmq
