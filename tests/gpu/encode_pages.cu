// The codec headers on a GPU, one thread a token: slow and plain, to compare bytes with the host.
#include <cuda_runtime.h>

#include <cstdint>

#include "codec/decode.h"
#include "codec/encode.h"

namespace {

struct Job {
  hqmq::RoleParams role;
  int pages;
  const uint16_t* rows;      // [H, pages*P, D]
  const float* secondaries;  // [H, S, 4]
  const float* levels;       // [2^r]
  float* x;                  // scratch [H, pages*P, D]
  float* norm2;              // scratch [H, pages*P, D/4]
  hqmq::RoleCache cache;     // batch of one
  float* decoded;            // [H, pages*P, D], chunks as coded: no mean, no inverse rotation
  float hadamard_scale;
};

// Grid (pages, H), P threads: thread t owns token t of the page.
__global__ void EncodePages(Job job) {
  using namespace hqmq;
  const RoleParams& role = job.role;
  const Layout layout = MakeLayout(role);
  const int d = role.head_dim, chunks = layout.chunks, p = role.page_size, t = threadIdx.x;
  const int64_t page = static_cast<int64_t>(blockIdx.y) * job.pages + blockIdx.x;
  const int64_t token = page * p + t;
  float* x = job.x + token * d;
  float* norm2 = job.norm2 + token * chunks;
  const float* secondaries = job.secondaries + blockIdx.y * role.secondaries * 4;

  for (int i = 0; i < d; ++i) x[i] = FloatFromHalf(job.rows[token * d + i]);
  if (role.hadamard) Hadamard(x, d, job.hadamard_scale);
  __syncthreads();
  if (role.page_mean) {
    for (int i = t; i < d; i += p) {
      float column[1024];
      for (int k = 0; k < p; ++k) column[k] = job.x[(page * p + k) * d + i];
      const float sum = TreeSum(column, p);
      job.cache.mean[page * d + i] = HalfFromFloat(Mul(sum, 1.0f / static_cast<float>(p)));
    }
    __syncthreads();
    for (int i = 0; i < d; ++i) x[i] = Sub(x[i], FloatFromHalf(job.cache.mean[page * d + i]));
  }
  bool finite = true;
  for (int c = 0; c < chunks; ++c) {
    norm2[c] = SquaredNorm(x + 4 * c);
    finite = finite && IsFinite(norm2[c]);
  }
  for (int c = 0; c < chunks && !finite; ++c) norm2[c] = 0.0f;
  __syncthreads();
  if (role.outlier_capacity > 0 && t == 0) {
    float* all = job.norm2 + page * p * chunks;
    const float* values = job.x + page * p * d;
    int32_t* mask = job.cache.outlier_mask + page * MaskWords(role);
    uint16_t* slot = job.cache.outlier_value + page * role.outlier_capacity * 4;
    const int dropped =
        ChooseOutliers([&](int i) { return all[i]; }, p * chunks, role.outlier_capacity,
                       [&](int i) {
                         mask[i / 32] |= static_cast<int32_t>(1u << (i % 32));
                         for (int k = 0; k < 4; ++k) *slot++ = HalfFromFloat(values[4 * i + k]);
                         all[i] = kOutlierMark;
                       });
    mask[MaskWords(role) - 1] = dropped;
  }
  __syncthreads();
  float middles[255], copy[64], projection[64], errors[64];
  for (int i = 0; i + 1 < 1 << role.radius_bits; ++i) middles[i] = LevelMiddle(job.levels, i);
  for (int c = 0; c < chunks; ++c) copy[c] = norm2[c];
  uint16_t scale = HalfFromFloat(TokenScale(role.gain, role.radius_bits, copy, chunks));
  if (role.gain == Gain::kRms) {
    for (int c = 0; c < chunks; ++c)
      projection[c] = NearestWord(x + 4 * c, secondaries, role.secondaries).projection;
    ChooseShortScale(role.radius_bits, norm2, projection, chunks, job.levels, middles, errors,
                     &scale);
  }
  int32_t* words = job.cache.codes + token * layout.words;
  for (int c = 0; c < chunks; ++c) {
    const float code =
        ChunkCode(role, layout, x + 4 * c, norm2[c], FloatFromHalf(scale), secondaries, middles);
    PackCode(layout, c, static_cast<uint32_t>(code), words);
    DecodeChunk(layout, UnpackCode(layout, c, words), FloatFromHalf(scale), secondaries, job.levels,
                job.decoded + token * d + 4 * c);
  }
  WriteScale(role.gain, finite ? scale : kHalfNan, token, job.cache.scales);
}

}  // namespace

// All pointers are device memory; outputs start as zeros. Returns a cudaError_t.
extern "C" int hqmq_test_encode_pages(const hqmq::RoleParams* role, int heads, int pages,
                                      const uint16_t* rows, const float* secondaries,
                                      const float* levels, float* x, float* norm2,
                                      const hqmq::RoleCache* cache, float* decoded) {
  const Job job = {*role, pages, rows,   secondaries, levels,
                   x,     norm2, *cache, decoded,     hqmq::HadamardScale(role->head_dim)};
  EncodePages<<<dim3(pages, heads), role->page_size>>>(job);
  const cudaError_t launch = cudaGetLastError();
  return launch != cudaSuccess ? launch : cudaDeviceSynchronize();
}
