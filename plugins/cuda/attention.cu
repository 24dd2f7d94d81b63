// HqmqAttention on the GPU: how rows are cut, which kernel runs, and the combination of parts.
#include <algorithm>

#include "attention_kernel.cuh"

namespace hqmq {
namespace cuda {
namespace {

// Parts run in parallel while there are fewer blocks of rows than this and their states take no
// more than this; both ways give the same bits.
constexpr int64_t kFewBlocks = 1024;
constexpr size_t kMostStateBytes = size_t{256} << 20;
constexpr int kMostParts = 65535;

// One row of y by one warp: joins the states of its parts in order.
__global__ void __launch_bounds__(kAttentionThreads)
    CombineKernel(const __grid_constant__ AttentionJob job) {
  __shared__ float rows[kAttentionWarps][kMaxHeadDim];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int query_heads = job.call.heads * job.group, p = job.key.role.page_size;
  const int d = job.key.role.head_dim;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAttentionWarps + warp;
  const int64_t sequence_head = row / job.call.tokens;
  if (sequence_head >= static_cast<int64_t>(job.call.batch) * query_heads) return;
  const int i = static_cast<int>(row % job.call.tokens);
  const int b = static_cast<int>(sequence_head / query_heads);
  const int head = static_cast<int>(sequence_head % query_heads);
  const Span span = SpanOf(job.call, p, b);
  const int time = span.past + i;
  const int64_t to = RowStart(job.y, b, head, i);
  if (time >= span.end) {
    StoreConstant(job.y, to, d, time < span.end + span.lost, lane);
    return;
  }
  float* out = rows[warp];
  const float* states = job.states + row * job.parts * (d + 2);
  const Keys coded = KeysOf(time, false, p, job.window);
  const int end = coded.first < coded.end ? (coded.end + kSplitTokens - 1) / kSplitTokens : 0;
  Softmax sum = {MinusInfinity(), 0.0f};
  float2 joined[kPairs] = {};
  for (int part = coded.first / kSplitTokens; part < end; ++part) {
    const float* state = states + static_cast<int64_t>(part) * (d + 2);
    const Softmax from = {state[d], state[d + 1]};
    if (from.sum == 0.0f) continue;
    const Factors factors = Join(&sum, from);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int element = 2 * (lane + j * kWarp);
      if (element < d)
        joined[j] = Joined(joined[j], *reinterpret_cast<const float2*>(state + element), factors);
    }
  }
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int element = 2 * (lane + j * kWarp);
    if (element < d) *reinterpret_cast<float2*>(out + element) = joined[j];
  }
  __syncwarp();
  if (job.value.role.hadamard) WarpHadamard(out, d, job.value.hadamard_scale, lane);
  const float* state = states + static_cast<int64_t>(job.parts - 1) * (d + 2);
  const Factors factors = Join(&sum, {state[d], state[d + 1]});
  for (int j = 0; j < kPairs; ++j) {
    const int element = 2 * (lane + j * kWarp);
    if (element >= d) continue;
    float2* at = reinterpret_cast<float2*>(out + element);
    *at = Joined(*at, *reinterpret_cast<const float2*>(state + element), factors);
  }
  __syncwarp();
  StoreOutput(job.y, to, out, d, sum, job.sinks ? job.sinks + head : nullptr, lane);
}

template <int N>
Status AttendRows(const AttentionJob& job, int block_rows, cudaStream_t stream) {
  constexpr int kMost = N > 2 ? 4 : 8;
  if (block_rows <= kAttentionWarps) return LaunchAttend<1, N>(job, stream);
  if (block_rows <= 2 * kAttentionWarps) return LaunchAttend<2, N>(job, stream);
  return LaunchAttend<kMost, N>(job, stream);
}

}  // namespace

template <>
Status LaunchAttend<1, 1>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<2, 1>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<8, 1>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<1, 2>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<2, 2>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<8, 2>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<1, 4>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<2, 4>(const AttentionJob&, cudaStream_t);
template <>
Status LaunchAttend<4, 4>(const AttentionJob&, cudaStream_t);

int BlockRows(int64_t rows, int head_dim) {
  if (rows <= kAttentionWarps) return kAttentionWarps;
  if (rows <= 2 * kAttentionWarps) return 2 * kAttentionWarps;
  return (head_dim > 128 ? 4 : 8) * kAttentionWarps;  // what 99 KiB of shared memory hold
}

void CutRows(AttentionJob* job, int block_rows) {
  job->heads = job->group < block_rows ? job->group : block_rows;
  job->head_blocks = (job->group + job->heads - 1) / job->heads;
  job->positions = block_rows / job->heads;
  job->row_blocks = (job->call.tokens + job->positions - 1) / job->positions;
  const int64_t capacity = static_cast<int64_t>(job->call.num_pages) * job->key.role.page_size;
  job->parts = static_cast<int>((capacity + kSplitTokens - 1) / kSplitTokens) + 1;
}

size_t AttentionStates(const AttentionJob& job) {
  const int64_t lanes = static_cast<int64_t>(job.call.batch) * job.call.heads;
  if (lanes * job.head_blocks * job.row_blocks >= kFewBlocks || job.parts > kMostParts) return 0;
  const size_t bytes =
      sizeof(float) * lanes * job.group * job.call.tokens * job.parts * (job.key.role.head_dim + 2);
  return bytes <= kMostStateBytes ? bytes : 0;
}

size_t MostAttentionStates(const AttentionJob& job) {
  size_t most = 0;
  AttentionJob part = job;
  for (int tokens = 1; tokens <= job.call.tokens && most < kMostStateBytes; ++tokens) {
    part.call.tokens = tokens;
    CutRows(&part, BlockRows(static_cast<int64_t>(job.group) * tokens, job.key.role.head_dim));
    // The largest batch with few enough blocks; fewer sequences with more pages reach the cap.
    const int64_t blocks =
        static_cast<int64_t>(job.call.heads) * part.head_blocks * part.row_blocks;
    const int64_t batch = std::min<int64_t>(job.call.batch, (kFewBlocks - 1) / blocks);
    const size_t bytes = sizeof(float) * batch * job.call.heads * job.group * tokens *
                         std::min(part.parts, kMostParts) * (job.key.role.head_dim + 2);
    most = std::max(most, std::min(bytes, kMostStateBytes));
  }
  return most;
}

Status Attend(const AttentionJob& job, int block_rows, cudaStream_t stream) {
  const int d = job.key.role.head_dim;
  Status status = d <= 64    ? AttendRows<1>(job, block_rows, stream)
                  : d <= 128 ? AttendRows<2>(job, block_rows, stream)
                             : AttendRows<4>(job, block_rows, stream);
  if (!status.ok() || !job.states) return status;
  const int64_t rows =
      static_cast<int64_t>(job.call.batch) * job.call.heads * job.group * job.call.tokens;
  const int64_t blocks = (rows + kAttentionWarps - 1) / kAttentionWarps;
  return Launch(CombineKernel, dim3(static_cast<unsigned>(blocks)), kAttentionThreads, 0, stream,
                job);
}

}  // namespace cuda
}  // namespace hqmq
