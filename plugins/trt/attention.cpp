// HqmqAttention: appends to the caches of K and V, then attends.
#include "log.h"
#include "operation.h"

namespace hqmq::trt {
namespace {

size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// q, k, v, past_length, new_length, [sinks], CODEBOOK of K, CODEBOOK of V, CACHE of K, CACHE of V
// → y, CACHE of K, CACHE of V
class Attention final : public Operation {
 public:
  explicit Attention(const nvinfer1::PluginFieldCollection* fields)
      : Operation(contract::kAttention, fields, 2),
        scale_(attributes_.Float("scale")),
        softcap_(attributes_.Float("softcap")),
        window_(attributes_.Int("window")),
        has_sinks_(attributes_.Int("has_sinks") != 0) {}

  // Kernels first, then sinks as float32.
  size_t Workspace(const Sizes& most) const override {
    const hqmq_attention_params params = ParamsOf(most);
    const hqmq_role_params key = Params(0, most), value = Params(1, most);
    size_t bytes = 0;
    Check(hqmq_cuda_attention_workspace_limit(&params, &key, &value, &bytes));
    return Aligned(bytes) + SinkBytes(most);
  }

  void Run(const Call& call) const override {
    const Sizes& sizes = call.sizes;
    const hqmq_attention_params params = ParamsOf(sizes);
    const hqmq_attention_role key = RoleOf(0, call), value = RoleOf(1, call);
    size_t bytes = 0;
    Check(hqmq_cuda_attention_workspace(&params, &key.role, &value.role, &bytes));
    const hqmq_rows q = Rows(call.inputs[0], call.activation, sizes, kQueryHeads, kTokens, "q");
    const hqmq_rows y = Rows(call.outputs[0], call.activation, sizes, kQueryHeads, kTokens, "y");
    const float* sinks = has_sinks_ ? static_cast<const float*>(call.inputs[5]) : nullptr;
    if (has_sinks_ && call.activation != nvinfer1::DataType::kFLOAT) {
      if (!call.workspace) throw Error("TensorRT gave no workspace");
      float* const converted =
          reinterpret_cast<float*>(static_cast<char*>(call.workspace) + Aligned(bytes));
      Check(
          hqmq_cuda_to_float(call.inputs[5], q.dtype, sizes[kQueryHeads], converted, call.stream));
      sinks = converted;
    }
    Check(hqmq_cuda_attention(&params, &q, &key, &value,
                              static_cast<const int32_t*>(call.inputs[3]),
                              static_cast<const int32_t*>(call.inputs[4]), sinks, &y, nullptr,
                              call.workspace, bytes, call.stream));
  }

 private:
  hqmq_attention_params ParamsOf(const Sizes& sizes) const {
    const int32_t heads = sizes.Int(kHeads);
    const int32_t group = heads > 0 ? sizes.Int(kQueryHeads) / heads : 0;
    return {sizes.Int(kBatch), heads,   group,  sizes.Int(kTokens),
            sizes.Int(kPages), window_, scale_, softcap_};
  }

  // Counted for all types: that of q is not known here.
  size_t SinkBytes(const Sizes& sizes) const {
    return has_sinks_ ? static_cast<size_t>(sizes[kQueryHeads]) * sizeof(float) : 0;
  }

  hqmq_attention_role RoleOf(size_t role, const Call& call) const {
    return {
        Params(role, call.sizes),
        Rows(call.inputs[1 + role], call.activation, call.sizes, kHeads, kTokens, role ? "v" : "k"),
        Secondaries(role, call),
        Levels(role, call),
        nullptr,
        Present(role, call)};
  }

  float scale_, softcap_;
  int32_t window_;
  bool has_sinks_;
};

}  // namespace

std::shared_ptr<const Operation> MakeAttention(const nvinfer1::PluginFieldCollection* fields) {
  return std::make_shared<Attention>(fields);
}

}  // namespace hqmq::trt
