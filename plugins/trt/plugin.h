// TensorRT's plugin interface around an Operation.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>

#include "operation.h"

namespace hqmq::trt {

// Outputs that hold the cache after the call alias the inputs that hold it before (TensorRT's
// ALIASED_PLUGIN_IO_10_03). Where TensorRT gives them addresses of their own all the same, enqueue
// copies first, so that results are right everywhere.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(std::shared_ptr<const Operation> operation, std::string title)
      : operation_(std::move(operation)), title_(std::move(title)) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return operation_->op().name; }
  const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return contract::kDomain; }

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs,
                             const nvinfer1::DataType* inputs,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  void CheckCounts(int32_t num_inputs, int32_t num_outputs) const;
  Sizes SizesOf(const nvinfer1::PluginTensorDesc* inputs) const;
  Sizes MostOf(const nvinfer1::DynamicPluginTensorDesc* inputs) const;
  void CopyPast(const nvinfer1::PluginTensorDesc* input_descs, const void* const* inputs,
                void* const* outputs, cudaStream_t stream);

  std::shared_ptr<const Operation> operation_;
  std::string title_;  // "HqmqAttention 'layer': "
  bool warned_ = false;
};

}  // namespace hqmq::trt
