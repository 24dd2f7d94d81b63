// HqmqQuantize and HqmqDequantize: one role of a cache.
#include "operation.h"

namespace hqmq::trt {
namespace {

// x, past_length, new_length, CODEBOOK, CACHE → CACHE
class Quantize final : public Operation {
 public:
  explicit Quantize(const nvinfer1::PluginFieldCollection* fields)
      : Operation(contract::kQuantize, fields, 1) {}

  size_t Workspace(const Sizes& most) const override {
    const hqmq_role_params role = Params(0, most);
    size_t bytes = 0;
    Check(hqmq_cuda_append_workspace(&role, most.Int(kBatch), most.Int(kHeads), most.Int(kTokens),
                                     &bytes));
    return bytes;
  }

  void Run(const Call& call) const override {
    const Sizes& sizes = call.sizes;
    const hqmq_role_params role = Params(0, sizes);
    const hqmq_rows x = Rows(call.inputs[0], call.activation, sizes, kHeads, kTokens, "x");
    const hqmq_role_cache cache = Present(0, call);
    Check(hqmq_cuda_append(&role, sizes.Int(kBatch), sizes.Int(kHeads), sizes.Int(kTokens),
                           sizes.Int(kPages), &x, static_cast<const int32_t*>(call.inputs[1]),
                           static_cast<const int32_t*>(call.inputs[2]), Secondaries(0, call),
                           Levels(0, call), &cache, nullptr, call.workspace, Workspace(sizes),
                           call.stream));
  }
};

// length, CODEBOOK, CACHE → x
class Dequantize final : public Operation {
 public:
  explicit Dequantize(const nvinfer1::PluginFieldCollection* fields)
      : Operation(contract::kDequantize, fields, 1) {}

  size_t Workspace(const Sizes&) const override { return 0; }

  void Run(const Call& call) const override {
    const Sizes& sizes = call.sizes;
    const hqmq_role_params role = Params(0, sizes);
    const hqmq_role_cache cache = Past(0, call);
    const hqmq_rows x =
        Rows(call.outputs[0], nvinfer1::DataType::kFLOAT, sizes, kHeads, kCapacity, "x");
    Check(hqmq_cuda_load(&role, sizes.Int(kBatch), sizes.Int(kHeads), sizes.Int(kPages),
                         static_cast<const int32_t*>(call.inputs[0]), Secondaries(0, call),
                         Levels(0, call), &cache, &x, call.stream));
  }
};

}  // namespace

std::shared_ptr<const Operation> MakeQuantize(const nvinfer1::PluginFieldCollection* fields) {
  return std::make_shared<Quantize>(fields);
}

std::shared_ptr<const Operation> MakeDequantize(const nvinfer1::PluginFieldCollection* fields) {
  return std::make_shared<Dequantize>(fields);
}

}  // namespace hqmq::trt
