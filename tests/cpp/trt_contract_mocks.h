// TensorRT's side of a plugin: dimension expressions, and the plugin behind its interfaces.
#pragma once

#include <NvInferRuntime.h>

#include <limits>
#include <memory>
#include <vector>

#include "trt_contract_cases.h"

namespace hqmq::test {

using namespace nvinfer1;

// What TensorRT knows of a dimension when it builds: the number, or nothing.
class MockDim final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit MockDim(const Axis& axis) : axis_(axis) { mImpl = this; }
  int64_t size() const { return axis_.size; }
  bool dynamic() const { return axis_.dynamic; }

 private:
  bool isConstant() const noexcept override { return !axis_.dynamic; }
  int64_t getConstantValue() const noexcept override {
    return axis_.dynamic ? std::numeric_limits<int64_t>::min() : axis_.size;
  }
  bool isSizeTensor() const noexcept override { return false; }

  Axis axis_;
};

class MockBuilder final : public IExprBuilder, private apiv::VExprBuilder {
 public:
  MockBuilder() { mImpl = this; }
  const IDimensionExpr* Make(const Axis& axis) {
    dims_.push_back(std::make_unique<MockDim>(axis));
    return dims_.back().get();
  }

 private:
  const IDimensionExpr* constant(int64_t value) override { return Make({value, false, false}); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    const auto& a = static_cast<const MockDim&>(first);
    const auto& b = static_cast<const MockDim&>(second);
    int64_t value = std::numeric_limits<int64_t>::min();
    if (op == DimensionOperation::kPROD) value = a.size() * b.size();
    if (op == DimensionOperation::kFLOOR_DIV) value = a.size() / b.size();
    return Make({value, a.dynamic() || b.dynamic(), false});
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }

  std::vector<std::unique_ptr<MockDim>> dims_;
};

struct Plugin {
  std::unique_ptr<IPluginV3> object;
  IPluginV3OneCore* core = nullptr;
  IPluginV3OneBuildV2* build = nullptr;
  IPluginV3OneRuntime* runtime = nullptr;

  explicit Plugin(IPluginV3* from) : object(from) {
    if (!object) return;
    core =
        static_cast<IPluginV3OneCore*>(object->getCapabilityInterface(PluginCapabilityType::kCORE));
    build = static_cast<IPluginV3OneBuildV2*>(
        object->getCapabilityInterface(PluginCapabilityType::kBUILD));
    runtime = static_cast<IPluginV3OneRuntime*>(
        object->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  }
  bool whole() const { return object && core && build && runtime; }
};

}  // namespace hqmq::test
