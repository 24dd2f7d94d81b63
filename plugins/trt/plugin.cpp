#include "plugin.h"

#include "log.h"

namespace hqmq::trt {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

namespace {

// Of TensorRT's functions that return int32_t.
constexpr int32_t kOk = 0, kFailed = -1;

std::string Counted(int32_t count, const char* what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

}  // namespace

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return Logged<nvinfer1::IPluginV3*>(title_, nullptr,
                                      [&] { return new Plugin(operation_, title_); });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return operation_->fields();
}

int32_t Plugin::getNbOutputs() const noexcept {
  return static_cast<int32_t>(operation_->outputs().size());
}

void Plugin::CheckCounts(int32_t num_inputs, int32_t num_outputs) const {
  const auto inputs = static_cast<int32_t>(operation_->inputs().size());
  if (num_inputs == inputs && num_outputs == getNbOutputs()) return;
  throw Error("has " + Counted(num_inputs, "input") + " and " + Counted(num_outputs, "output") +
              ", its attributes ask for " + std::to_string(inputs) + " and " +
              std::to_string(getNbOutputs()) +
              "; export the model again with this version of hqmq-trt");
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs, const DataType* inputs,
                                   int32_t num_inputs) const noexcept {
  return Logged(title_, kFailed, [&] {
    CheckCounts(num_inputs, num_outputs);
    for (int32_t i = 0; i < num_inputs; ++i) {
      const TensorSpec& spec = operation_->inputs()[i];
      if (Fits(spec.type, inputs[i], inputs[0])) continue;
      const char* wanted = spec.type == Type::kInt32          ? "int32"
                           : spec.type == Type::kFloat16      ? "float16"
                           : spec.type == Type::kFloat32      ? "float32"
                           : i > 0 && IsActivation(inputs[0]) ? TypeName(inputs[0])
                                                              : "float32, float16 or bfloat16";
      throw Error("input '" + std::string(spec.name) + "' is " + TypeName(inputs[i]) +
                  ", expected " + wanted +
                  "; build a strongly typed network from a model exported by hqmq-trt");
    }
    for (int32_t i = 0; i < num_outputs; ++i) {
      const int alike = operation_->outputs()[i].alike;
      outputs[i] = alike < 0 ? DataType::kFLOAT : inputs[alike];
    }
    return kOk;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                int32_t num_outputs, nvinfer1::IExprBuilder&) noexcept {
  return Logged(title_, kFailed, [&] {
    CheckCounts(num_inputs, num_outputs);
    std::vector<Shape> shapes;
    for (int32_t i = 0; i < num_inputs; ++i) shapes.push_back(ShapeOf(inputs[i]));
    Solve(operation_->inputs(), shapes, operation_->roles());
    for (int32_t i = 0; i < num_outputs; ++i) {
      const Operation::Output& output = operation_->outputs()[i];
      if (output.alike >= 0) {
        outputs[i] = inputs[output.alike];
        continue;
      }
      outputs[i].nbDims = static_cast<int32_t>(output.dims.size());
      for (size_t k = 0; k < output.dims.size(); ++k)
        outputs[i].d[k] = inputs[output.dims[k].input].d[output.dims[k].dim];
    }
    return kOk;
  });
}

bool Plugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                       int32_t num_inputs, int32_t num_outputs) noexcept {
  return Logged(title_, false, [&] {
    CheckCounts(num_inputs, num_outputs);
    if (position < 0 || position >= num_inputs + num_outputs) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position < num_inputs)
      return Fits(operation_->inputs()[position].type, tensor.type, tensors[0].desc.type);
    const int alike = operation_->outputs()[position - num_inputs].alike;
    return tensor.type == (alike < 0 ? DataType::kFLOAT : tensors[alike].desc.type);
  });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  if (output < 0 || output >= getNbOutputs()) return -1;
  const Operation::Output& out = operation_->outputs()[output];
  return out.in_place ? out.alike : -1;
}

Sizes Plugin::SizesOf(const PluginTensorDesc* inputs) const {
  std::vector<Shape> shapes;
  for (size_t i = 0; i < operation_->inputs().size(); ++i)
    shapes.push_back(ShapeOf(inputs[i].dims));
  return Solve(operation_->inputs(), shapes, operation_->roles());
}

Sizes Plugin::MostOf(const DynamicPluginTensorDesc* inputs) const {
  std::vector<Shape> shapes;
  for (size_t i = 0; i < operation_->inputs().size(); ++i) shapes.push_back(ShapeOf(inputs[i].max));
  return Largest(operation_->inputs(), shapes, operation_->roles());
}

int32_t Plugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
  return Logged(title_, kFailed, [&] {
    CheckCounts(num_inputs, num_outputs);
    std::vector<Shape> shapes;
    for (int32_t i = 0; i < num_inputs; ++i) shapes.push_back(ShapeOf(inputs[i].desc.dims));
    Solve(operation_->inputs(), shapes, operation_->roles());
    operation_->Workspace(MostOf(inputs));
    return kOk;
  });
}

size_t Plugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const DynamicPluginTensorDesc*,
                                int32_t num_outputs) const noexcept {
  return Logged(title_, size_t{0}, [&] {
    CheckCounts(num_inputs, num_outputs);
    return operation_->Workspace(MostOf(inputs));
  });
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs,
                              const PluginTensorDesc*, int32_t num_outputs) noexcept {
  return Logged(title_, kFailed, [&] {
    CheckCounts(num_inputs, num_outputs);
    operation_->Workspace(SizesOf(inputs));
    return kOk;
  });
}

void Plugin::CopyPast(const PluginTensorDesc* input_descs, const void* const* inputs,
                      void* const* outputs, cudaStream_t stream) {
  for (size_t i = 0; i < operation_->outputs().size(); ++i) {
    const Operation::Output& output = operation_->outputs()[i];
    if (!output.in_place || outputs[i] == inputs[output.alike]) continue;
    if (!warned_) {
      warned_ = true;
      Log(Severity::kWarning,
          title_ +
              "TensorRT gave past and present of the cache different addresses, so each call "
              "copies it; bind both to one address and build with ALIASED_PLUGIN_IO_10_03");
    }
    if (hqmq_cuda_copy(outputs[i], inputs[output.alike], Bytes(input_descs[output.alike]),
                       stream) != HQMQ_OK)
      throw Error(hqmq_cuda_last_error());
  }
}

int32_t Plugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return Logged(title_, kFailed, [&] {
    const Sizes sizes = SizesOf(input_descs);
    CopyPast(input_descs, inputs, outputs, stream);
    operation_->Run({sizes, input_descs[0].type, inputs, outputs, workspace, stream});
    return kOk;
  });
}

}  // namespace hqmq::trt
