// The library's entry points: creators of the three plugins, TensorRT's logger, and versions.
#include "creators.h"

#include <NvInferVersion.h>

#include "log.h"
#include "plugin.h"

namespace hqmq::trt {
namespace {

using MakeOperation = std::shared_ptr<const Operation> (*)(const nvinfer1::PluginFieldCollection*);

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator(const contract::Operator& op, MakeOperation make) : op_(op), make_(make) {
    for (int i = 0; i < op.num_attributes; ++i) {
      const contract::Attribute& attribute = op.attributes[i];
      fields_.emplace_back(attribute.name, nullptr,
                           attribute.kind == contract::Kind::kInt
                               ? nvinfer1::PluginFieldType::kINT32
                               : nvinfer1::PluginFieldType::kFLOAT32,
                           1);
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return contract::kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return contract::kDomain; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(const char* layer,
                                    const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    return Logged<nvinfer1::IPluginV3*>("hqmq-trt: ", nullptr, [&] {
      const std::string title =
          std::string(op_.name) +
          (layer && *layer ? " '" + std::string(layer) + "': " : std::string(": "));
      return Logged<nvinfer1::IPluginV3*>(title, nullptr,
                                          [&] { return new Plugin(make_(fields), title); });
    });
  }

 private:
  const contract::Operator& op_;
  MakeOperation make_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace
}  // namespace hqmq::trt

using namespace hqmq;

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  try {
    // Never destroyed: TensorRT may ask for them while the process ends.
    static auto* const quantize = new trt::Creator(contract::kQuantize, trt::MakeQuantize);
    static auto* const dequantize = new trt::Creator(contract::kDequantize, trt::MakeDequantize);
    static auto* const attention = new trt::Creator(contract::kAttention, trt::MakeAttention);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {quantize, dequantize, attention};
    count = 3;
    return creators;
  } catch (...) {
    count = 0;
    return nullptr;
  }
}

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { trt::UseLoggerFinder(finder); }

int32_t hqmq_trt_format_version(void) noexcept { return HQMQ_FORMAT_VERSION; }
const char* hqmq_trt_version(void) noexcept { return HQMQ_VERSION; }

#define HQMQ_TEXT_OF(x) #x
#define HQMQ_TEXT(x) HQMQ_TEXT_OF(x)
const char* hqmq_trt_tensorrt_headers(void) noexcept {
  return HQMQ_TEXT(NV_TENSORRT_MAJOR) "." HQMQ_TEXT(NV_TENSORRT_MINOR) "." HQMQ_TEXT(
      NV_TENSORRT_PATCH);
}
