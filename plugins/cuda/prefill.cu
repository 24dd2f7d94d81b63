// Prefill attention on the host: what it takes, its workspace, waves; and the joining of splits.
#include <algorithm>
#include <atomic>

#include "prefill.h"
#include "prefill_kernel.cuh"

namespace hqmq {
namespace cuda {

template <>
Status LaunchPrefill<64>(const PrefillJob&, cudaStream_t);
template <>
Status LaunchPrefill<128>(const PrefillJob&, cudaStream_t);
template <>
Status LaunchPrefill<256>(const PrefillJob&, cudaStream_t);
template <>
Status LaunchSm90<64>(const PrefillJob&, cudaStream_t);
template <>
Status LaunchSm90<128>(const PrefillJob&, cudaStream_t);

namespace {

constexpr int kJoinWarps = 4;

// One row of y by one warp: joins the parts of its splits in order.
template <int D>
__global__ void __launch_bounds__(kJoinWarps* kWarp)
    JoinKernel(const __grid_constant__ PrefillJob job) {
  using Shape = PrefillShape<D>;
  constexpr int kEach = D / kWarp;
  const AttentionJob& a = job.attention;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kJoinWarps + threadIdx.x / kWarp;
  const int i = static_cast<int>(row % a.call.tokens);
  const int in_group = static_cast<int>(row / a.call.tokens % a.group);
  const int64_t in_wave = row / a.call.tokens / a.group;
  if (in_wave >= job.lanes) return;
  const int row_block = i / a.positions, head_block = in_group / a.heads;
  const int index = static_cast<int>(
      ((a.row_blocks - 1 - row_block) * static_cast<int64_t>(job.lanes) + in_wave) * a.head_blocks +
      head_block);
  const PrefillBlock block = BlockOf<Shape::kKeys>(job, index);
  if (block.span.past + i > block.last_time) return;
  const int local = (i - block.first_row) * a.heads + in_group - block.first_head;
  float out[kEach] = {}, maximum = kNoMaximum, sum = 0.0f;
  for (int split = 0; split < job.splits; ++split) {
    const KeyRange tiles = SplitTiles(block.tiles(), job.splits, split);
    if (tiles.first >= tiles.end) break;
    const float* part =
        job.parts +
        ((static_cast<int64_t>(index) * job.splits + split) * Shape::kRows + local) * (D + 2);
    const float most = fmaxf(maximum, part[D]);
    const float old = ptx::Exp2(maximum - most), factor = ptx::Exp2(part[D] - most);
    maximum = most;
    sum = Fma(sum, old, Mul(part[D + 1], factor));
#pragma unroll
    for (int k = 0; k < kEach; ++k) out[k] = Fma(out[k], old, Mul(part[lane + k * kWarp], factor));
  }
  const int head = block.h * a.group + in_group;
  const float per_sum = PerSum(maximum, sum, a.sinks ? a.sinks + head : nullptr);
  const int64_t to = RowStart(a.y, block.b, head, i);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int element = lane + k * kWarp;
    if (element < a.key.role.head_dim) StoreFloat(a.y, to + element, out[k] * per_sum);
  }
}

// Whether sm_90a is compiled for (CMakeLists.txt).
#if defined(HQMQ_SM90A) || !defined(__CUDACC__)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

std::atomic<bool> allow_sm90{true};

template <int D>
Status Multiply(const PrefillJob& job, cudaStream_t stream) {
  if constexpr (kHasSm90 && D <= 128) {
    Gpu gpu;
    if (Status status = CurrentGpu(&gpu); !status.ok()) return status;
    if (gpu.major == 9 && allow_sm90) return LaunchSm90<D>(job, stream);
  }
  return LaunchPrefill<D>(job, stream);
}

template <int D>
Status Run(const PrefillJob& job, cudaStream_t stream) {
  Status status = DecodeTiles(job, stream);
  if (status.ok()) status = Multiply<D>(job, stream);
  if (!status.ok() || job.splits == 1) return status;
  const AttentionJob& a = job.attention;
  const int64_t rows = static_cast<int64_t>(job.lanes) * a.group * a.call.tokens;
  const dim3 grid(static_cast<unsigned>((rows + kJoinWarps - 1) / kJoinWarps));
  return Launch(JoinKernel<D>, grid, kJoinWarps * kWarp, 0, stream, job);
}

int BlockRowsOf(int head_dim) {
  return head_dim > 128 ? PrefillShape<256>::kRows : PrefillShape<128>::kRows;
}
static_assert(PrefillShape<64>::kRows == PrefillShape<128>::kRows, "one number of rows");

size_t SharedBytes(int head_dim) {
  return head_dim > 128  ? sizeof(PrefillShared<256>)
         : head_dim > 64 ? sizeof(PrefillShared<128>)
                         : sizeof(PrefillShared<64>);
}

// A call's rows, splits and the bytes of workspace of one lane.
struct Plan {
  AttentionJob job;
  int lane_tiles, splits;
  int64_t lanes;  // of the call
  size_t tile_bytes, part_bytes;

  size_t lane_bytes() const { return std::max<size_t>(tile_bytes + part_bytes, 1); }
  // Of one wave.
  int64_t wave() const {
    const int64_t most = static_cast<int64_t>(kMostPrefillBytes / lane_bytes());
    if (most >= lanes) return lanes;
    const int64_t waves = (lanes + most - 1) / most;
    return (lanes + waves - 1) / waves;
  }
};

size_t PartBytes(int blocks, int head_dim) {
  return sizeof(float) * blocks * BlockRowsOf(head_dim) * (PaddedDim(head_dim) + 2);
}

Plan PlanOf(const AttentionJob& job) {
  Plan plan;
  plan.job = job;
  const int d = job.key.role.head_dim;
  CutRows(&plan.job, BlockRowsOf(d));
  const int64_t capacity = static_cast<int64_t>(job.call.num_pages) * job.key.role.page_size;
  plan.lane_tiles = static_cast<int>((capacity + kPrefillTile - 1) / kPrefillTile);
  plan.lanes = static_cast<int64_t>(job.call.batch) * job.call.heads;
  const int64_t lane_blocks = static_cast<int64_t>(plan.job.head_blocks) * plan.job.row_blocks;
  plan.splits = static_cast<int>(std::max<int64_t>(
      1, std::min<int64_t>(kMostPrefillSplits, kPrefillBlocks / (lane_blocks * job.call.heads))));
  plan.tile_bytes = size_t{2} * plan.lane_tiles * kPrefillTile * PaddedDim(d) * sizeof(uint16_t);
  plan.part_bytes = plan.splits > 1 ? PartBytes(static_cast<int>(lane_blocks) * plan.splits, d) : 0;
  return plan;
}

bool Refuse(std::string* why, const char* text) {
  if (why) *why = text;
  return false;
}

// Whether rows of D elements start at multiples of `bytes`.
bool Aligned(const Rows& x, int bytes) {
  const int elements = bytes / 2;
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && x.batch % elements == 0 &&
         x.head % elements == 0 && x.token % elements == 0;
}

}  // namespace

bool PrefillTakesSizes(const AttentionJob& job, std::string* why) {
  if (job.call.tokens < kLeastPrefillTokens)
    return Refuse(why, "the prefill kernel takes calls of 9 tokens and more");
  if (PlanOf(job).lane_bytes() > kMostPrefillBytes)
    return Refuse(why, "the prefill kernel would need more than 256 MiB for one head's context");
  return true;
}

bool PrefillSupports(const AttentionJob& job, std::string* why) {
  if (!PrefillTakesSizes(job, why)) return false;
  for (const Rows* rows : {&job.q, &job.y, &job.key.x, &job.value.x}) {
    if (rows->dtype == HQMQ_FLOAT32) return Refuse(why, "activations are float32");
  }
  Gpu gpu;
  if (!CurrentGpu(&gpu).ok()) return Refuse(why, "there is no GPU");
  if (static_cast<size_t>(gpu.shared_limit) < SharedBytes(job.key.role.head_dim))
    return Refuse(why, "the GPU gives a block too little shared memory");
  return true;
}

size_t PrefillBytes(const AttentionJob& job) {
  if (!PrefillTakesSizes(job, nullptr)) return 0;
  const Plan plan = PlanOf(job);
  return plan.wave() * plan.lane_bytes();
}

size_t MostPrefillBytes(const AttentionJob& job) {
  if (job.call.tokens < kLeastPrefillTokens) return 0;
  const Plan plan = PlanOf(job);
  const size_t parts = PartBytes(kPrefillBlocks / job.call.heads, job.key.role.head_dim);
  const double bytes = static_cast<double>(plan.lanes) * (plan.tile_bytes + parts);
  return bytes < kMostPrefillBytes ? static_cast<size_t>(bytes) : kMostPrefillBytes;
}

void AllowSm90Prefill(bool on) { allow_sm90 = on; }

Status Prefill(const AttentionJob& attention, void* workspace, cudaStream_t stream) {
  const Plan plan = PlanOf(attention);
  const int d = attention.key.role.head_dim;
  PrefillJob job;
  job.attention = plan.job;
  job.lane_tiles = plan.lane_tiles;
  job.splits = plan.splits;
  job.tiles = static_cast<uint16_t*>(workspace);
  const RoleView* roles[2] = {&job.attention.key, &job.attention.value};
  for (int i = 0; i < 2; ++i) {
    const Rows tail = {roles[i]->cache.tail, HQMQ_FLOAT16, 0, 0, 0};
    job.wide_tail[i] = d % 8 == 0 && Aligned(tail, 16);
    job.wide_x[i] = d % 8 == 0 && Aligned(roles[i]->x, 16);
  }
  job.wide_y = Aligned(attention.y, 4);
  const int64_t wave = plan.wave();
  job.parts = plan.splits > 1
                  ? reinterpret_cast<float*>(static_cast<char*>(workspace) + wave * plan.tile_bytes)
                  : nullptr;
  Status status;
  for (job.first_lane = 0; job.first_lane < plan.lanes && status.ok(); job.first_lane += wave) {
    job.lanes = static_cast<int32_t>(std::min(wave, plan.lanes - job.first_lane));
    status = d <= 64    ? Run<64>(job, stream)
             : d <= 128 ? Run<128>(job, stream)
                        : Run<256>(job, stream);
  }
  return status;
}

}  // namespace cuda
}  // namespace hqmq
