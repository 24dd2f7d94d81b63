#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "contract_table.h"
#include "trt_contract_cases.h"

namespace hqmq::test {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kLayer = "layers.7";

void Refused(const Context& context, Fields& fields, const std::string& name,
             const std::string& what) {
  for (const auto phase : {nvinfer1::TensorRTPhase::kBUILD, nvinfer1::TensorRTPhase::kRUNTIME}) {
    context.log->Clear();
    const std::unique_ptr<nvinfer1::IPluginV3> plugin(
        context.creator->createPlugin(kLayer, fields.get(), phase));
    context.report->Check(!plugin, "attribute " + name + " " + what + " was taken");
    const std::string text = context.log->Text();
    const std::string error = context.log->TakeError();
    context.report->Check(
        error.find("'" + name + "'") != std::string::npos &&
            error.find(kLayer) != std::string::npos &&
            error.find(context.creator->getPluginName()) != std::string::npos &&
            error.find('\n') == std::string::npos,
        "attribute " + name + " " + what +
            ": expected one error that names operator, layer and attribute, got: " + text);
  }
}

void TestNumber(const Context& context, const Case& node, const contract::Attribute& attribute,
                double number, const std::string& what) {
  Fields fields(node.attributes);
  const auto whole = static_cast<int64_t>(number);
  const auto small = static_cast<int32_t>(whole);
  const auto real = static_cast<float>(number);
  PluginField& field = fields[attribute.name];
  if (attribute.kind == contract::Kind::kFloat) {
    field.data = &real;
  } else if (small == whole) {
    field.data = &small;
  } else {
    field = PluginField(attribute.name, &whole, PluginFieldType::kINT64, 1);
  }
  Refused(context, fields, attribute.name, what);
}

void TestType(const Context& context, const Case& node, const contract::Attribute& attribute) {
  static const char zeros[64] = {};
  const bool integer = attribute.kind == contract::Kind::kInt;
  for (int type = 0; type <= static_cast<int>(PluginFieldType::kFP8); ++type) {
    const auto wrong = static_cast<PluginFieldType>(type);
    // ONNX has int64; TensorRT's parser narrows it, other callers may not.
    if (wrong == PluginFieldType::kINT64 && integer) continue;
    if (wrong == (integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32)) continue;
    Fields fields(node.attributes);
    fields[attribute.name] = PluginField(attribute.name, zeros, wrong, 1);
    Refused(context, fields, attribute.name, "of type " + std::to_string(type));
  }
  for (const int length : {-1, 0, 2}) {
    Fields fields(node.attributes);
    fields[attribute.name].length = length;
    fields[attribute.name].data = zeros;
    Refused(context, fields, attribute.name, "of length " + std::to_string(length));
  }
  Fields fields(node.attributes);
  fields[attribute.name].data = nullptr;
  Refused(context, fields, attribute.name, "without data");
}

void TestRange(const Context& context, const Case& node, const contract::Attribute& attribute) {
  if (attribute.kind == contract::Kind::kFloat) {
    TestNumber(context, node, attribute, std::nan(""), "nan");
    TestNumber(context, node, attribute, INFINITY, "inf");
    TestNumber(context, node, attribute, -INFINITY, "-inf");
    if (attribute.low == 0) TestNumber(context, node, attribute, -1e-3, "below its range");
    return;
  }
  TestNumber(context, node, attribute, attribute.low - 1, "below its range");
  TestNumber(context, node, attribute, attribute.high + 1, "above its range");
  // Would be in range if it were cut to 32 bits.
  TestNumber(context, node, attribute, 4294967296.0 + attribute.low, "of 33 bits");
  if (attribute.power_of_two)
    TestNumber(context, node, attribute, attribute.low + 1, "no power of two");
}

}  // namespace

void TestAttributeErrors(const Context& context, const Case& node) {
  const contract::Operator* op = nullptr;
  for (const contract::Operator* one :
       {&contract::kQuantize, &contract::kDequantize, &contract::kAttention}) {
    if (node.op == one->name) op = one;
  }
  if (!op) return context.report->Check(false, "the table has no " + node.op);
  for (int i = 0; i < op->num_attributes; ++i) {
    const contract::Attribute& attribute = op->attributes[i];
    Fields missing(node.attributes);
    missing.Remove(attribute.name);
    Refused(context, missing, attribute.name, "left out");
    Fields twice(node.attributes);
    twice.Add(twice[attribute.name]);
    Refused(context, twice, attribute.name, "given twice");
    TestType(context, node, attribute);
    TestRange(context, node, attribute);
  }
  for (const char* const prefix : {"", "k_", "v_"}) {
    const std::string storage = std::string(prefix) + "storage";
    const std::string sinks = std::string(prefix) + "sink_tokens";
    if (std::none_of(node.attributes.begin(), node.attributes.end(),
                     [&](const Value& value) { return value.name == storage; }))
      continue;
    const int32_t fp16 = 0, some = 4;
    Fields exact(node.attributes);
    exact[storage].data = &fp16;
    exact[sinks].data = &some;
    Refused(context, exact, sinks, "of a cache in fp16");
  }
  Fields unknown(node.attributes);
  const int32_t one = 1;
  unknown.Add(PluginField("k_colour", &one, PluginFieldType::kINT32, 1));
  Refused(context, unknown, "k_colour", "that is unknown");
  for (const int off : {-1, 1}) {
    Fields version(node.attributes);
    const int32_t other = HQMQ_FORMAT_VERSION + off;
    version["format_version"].data = &other;
    Refused(context, version, "format_version", "of another version");
  }

  context.log->Clear();
  const std::unique_ptr<nvinfer1::IPluginV3> none(
      context.creator->createPlugin(kLayer, nullptr, nvinfer1::TensorRTPhase::kBUILD));
  context.report->Check(!none && !context.log->TakeError().empty(), "no fields at all were taken");
  // What TensorRT's parser reads itself may come along.
  Fields named(node.attributes);
  named.Add(PluginField("plugin_version", "1", PluginFieldType::kCHAR, 1));
  named.Add(PluginField("plugin_namespace", contract::kDomain, PluginFieldType::kCHAR,
                        static_cast<int32_t>(strlen(contract::kDomain))));
  const std::unique_ptr<nvinfer1::IPluginV3> plugin(
      context.creator->createPlugin(kLayer, named.get(), nvinfer1::TensorRTPhase::kBUILD));
  context.report->Check(
      plugin != nullptr && context.log->Silent(),
      "plugin_version and plugin_namespace are not taken: " + context.log->Text());
}

}  // namespace hqmq::test
