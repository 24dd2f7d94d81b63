// The operators on GPUs, for the CUDA execution provider: all tensors are device memory, everything
// is enqueued on the session's stream, and nothing waits for it. What only the GPU sees (lengths,
// values) is treated as hqmq_cuda.h says.
#include <cstring>

#include "cuda_library.h"
#include "custom_op.h"

namespace hqmq::ort {
namespace {

#ifndef HQMQ_ORT_CUDA_PROVIDER
#define HQMQ_ORT_CUDA_PROVIDER "CUDAExecutionProvider"
#endif
constexpr const char* kCuda = HQMQ_ORT_CUDA_PROVIDER;

void* StreamOf(const KernelContext* context) {
  void* stream = nullptr;
  Check(api.KernelContext_GetGPUComputeStream(context, &stream));
  return stream;
}

// The provider's allocator of device memory.
class DeviceAllocator {
 public:
  explicit DeviceAllocator(const NodeInfo& node) {
    Check(api.KernelInfoGetAllocator(node.info(), kDefaultMemory, &allocator_));
  }
  ~DeviceAllocator() { api.ReleaseAllocator(allocator_); }
  DeviceAllocator(const DeviceAllocator&) = delete;
  DeviceAllocator& operator=(const DeviceAllocator&) = delete;

  // GetScratchBuffer ties the memory to the call's stream: once freed, it is reused in stream
  // order.
  void* Allocate(const KernelContext* context, void* stream, size_t bytes) const {
    void* out = nullptr;
    if (stream == nullptr) {  // GetScratchBuffer needs one
      Check(api.AllocatorAlloc(allocator_, bytes, &out));
      return out;
    }
    const MemoryInfo* info = nullptr;
    Check(api.AllocatorGetInfo(allocator_, &info));
    Check(api.KernelContext_GetScratchBuffer(context, info, bytes, &out));
    return out;
  }
  void Free(void* memory) const { Works(api.AllocatorFree(allocator_, memory)); }

 private:
  Allocator* allocator_ = nullptr;
};

class Workspace {
 public:
  Workspace(const DeviceAllocator& allocator, const KernelContext* context, void* stream,
            size_t bytes)
      : allocator_(allocator) {
    if (bytes) data_ = allocator.Allocate(context, stream, bytes);
  }
  ~Workspace() {
    if (data_) allocator_.Free(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  const DeviceAllocator& allocator_;
  void* data_ = nullptr;
};

hqmq_role_params ToC(const RoleParams& params) {
  hqmq_role_params out;
  static_assert(sizeof(out) == sizeof(params));
  memcpy(&out, &params, sizeof(out));
  return out;
}

hqmq_role_cache ToC(const RoleCache& cache) {
  hqmq_role_cache out;
  static_assert(sizeof(out) == sizeof(cache));
  memcpy(&out, &cache, sizeof(out));
  return out;
}

void CopyPast(const CudaLibrary& cuda, const Present& present, void* stream) {
  present.ForEachCopy([&](void* to, const void* from, size_t bytes) {
    cuda.Check(cuda.hqmq_cuda_copy(to, from, bytes, stream));
  });
}

// A constant codebook that does not fit is refused when the kernel is made.
void CheckConstantCodebook(const Role& role, const NodeInfo& node, size_t first_input) {
  Tensor secondaries, levels;
  role.ConstantCodebook(node, first_input, &secondaries, &levels);
}

class Quantize {
 public:
  static constexpr const char* kName = "HqmqQuantize";
  static constexpr const char* kProvider = kCuda;
  static constexpr int kLeastOutputs = 2;

  explicit Quantize(const NodeInfo& node)
      : node_(node), cuda_(LoadCudaLibrary()), allocator_(node) {
    CheckConstantCodebook(node_.role, node, QuantizeNode::kCodebook);
  }

  void Compute(KernelContext* context) const {
    const QuantizeCall call = node_.Read(context);
    const Role::View& past = call.past;
    void* const stream = StreamOf(context);
    const hqmq_role_params role = ToC(past.params);
    const hqmq_rows x = RowsOf(call.x, "x");
    const int32_t tokens = static_cast<int32_t>(call.x.dims[2]);
    size_t bytes = 0;
    cuda_.Check(cuda_.hqmq_cuda_append_workspace(&role, past.batch, past.heads, tokens, &bytes));
    const Present present(context, 0, past);
    const hqmq_role_cache cache = ToC(present.cache());
    const Workspace workspace(allocator_, context, stream, bytes);
    CopyPast(cuda_, present, stream);
    cuda_.Check(cuda_.hqmq_cuda_append(&role, past.batch, past.heads, tokens, past.num_pages, &x,
                                       call.past_length, call.new_length, past.secondary_data(),
                                       past.level_data(), &cache, nullptr, workspace.data(), bytes,
                                       stream));
  }

 private:
  QuantizeNode node_;
  const CudaLibrary& cuda_;
  DeviceAllocator allocator_;
};

class Dequantize {
 public:
  static constexpr const char* kName = "HqmqDequantize";
  static constexpr const char* kProvider = kCuda;
  static constexpr int kLeastOutputs = 1;

  explicit Dequantize(const NodeInfo& node) : node_(node), cuda_(LoadCudaLibrary()) {
    CheckConstantCodebook(node_.role, node, DequantizeNode::kCodebook);
  }

  void Compute(KernelContext* context) const {
    const DequantizeCall call = node_.Read(context);
    const Role::View& view = call.cache;
    const hqmq_role_params role = ToC(view.params);
    const hqmq_role_cache cache = ToC(view.cache);
    const hqmq_rows x = RowsOf(Output(context, 0, kFloat, call.dims), "output");
    cuda_.Check(cuda_.hqmq_cuda_load(&role, view.batch, view.heads, view.num_pages, call.length,
                                     view.secondary_data(), view.level_data(), &cache, &x,
                                     StreamOf(context)));
  }

 private:
  DequantizeNode node_;
  const CudaLibrary& cuda_;
};

class Attention {
 public:
  static constexpr const char* kName = "HqmqAttention";
  static constexpr const char* kProvider = kCuda;
  static constexpr int kLeastOutputs = 5;

  explicit Attention(const NodeInfo& node)
      : node_(node), cuda_(LoadCudaLibrary()), allocator_(node) {
    CheckConstantCodebook(node_.key, node, node_.key_codebook);
    CheckConstantCodebook(node_.value, node, node_.value_codebook);
  }

  void Compute(KernelContext* context) const {
    const AttentionCall call = node_.Read(context);
    void* const stream = StreamOf(context);
    const hqmq_attention_params params = {call.key.batch, call.key.heads,     call.group,
                                          call.tokens,    call.key.num_pages, node_.window,
                                          node_.scale,    node_.softcap};
    const hqmq_rows q = RowsOf(call.q, "q");
    hqmq_attention_role key = RoleOf(call.key, RowsOf(call.k, "k"));
    hqmq_attention_role value = RoleOf(call.value, RowsOf(call.v, "v"));
    size_t bytes = 0;
    cuda_.Check(cuda_.hqmq_cuda_attention_workspace(&params, &key.role, &value.role, &bytes));

    const hqmq_rows y = RowsOf(Output(context, 0, call.q.type, call.q.dims), "output");
    const Present present_key(context, 1, call.key),
        present_value(context, 1 + call.key.tensors.size(), call.value);
    key.cache = ToC(present_key.cache());
    value.cache = ToC(present_value.cache());

    // Behind the kernels' own workspace: sinks as float32, if they are not.
    const bool convert = call.sinks.data && call.sinks.type != kFloat;
    const size_t sinks_at = (bytes + 255) / 256 * 256;
    const size_t sinks_bytes = convert ? static_cast<size_t>(call.q.dims[1]) * sizeof(float) : 0;
    const Workspace workspace(allocator_, context, stream,
                              convert ? sinks_at + sinks_bytes : bytes);
    const float* sinks = static_cast<const float*>(call.sinks.data);
    if (convert) {
      float* const out = reinterpret_cast<float*>(workspace.data() + sinks_at);
      cuda_.Check(cuda_.hqmq_cuda_to_float(call.sinks.data, DtypeOf(call.sinks, "sinks"),
                                           call.q.dims[1], out, stream));
      sinks = out;
    }
    CopyPast(cuda_, present_key, stream);
    CopyPast(cuda_, present_value, stream);
    cuda_.Check(cuda_.hqmq_cuda_attention(&params, &q, &key, &value, call.past_length,
                                          call.new_length, sinks, &y, nullptr, workspace.data(),
                                          bytes, stream));
  }

 private:
  static hqmq_attention_role RoleOf(const Role::View& view, const hqmq_rows& x) {
    return {ToC(view.params), x, view.secondary_data(), view.level_data(), nullptr, {}};
  }

  AttentionNode node_;
  const CudaLibrary& cuda_;
  DeviceAllocator allocator_;
};

}  // namespace

const CustomOp* CudaQuantizeOp() {
  static const CustomOp op = MakeOp<Quantize>(InferQuantize);
  return &op;
}

const CustomOp* CudaDequantizeOp() {
  static const CustomOp op = MakeOp<Dequantize>(InferDequantize);
  return &op;
}

const CustomOp* CudaAttentionOp() {
  static const CustomOp op = MakeOp<Attention>(InferAttention);
  return &op;
}

}  // namespace hqmq::ort
