#include "attributes.h"

#include <cmath>
#include <cstring>
#include <sstream>

#include "log.h"

namespace hqmq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kFix = "; export the model again with this version of hqmq-trt";

std::string TypeName(const PluginField& field) {
  static const char* const names[] = {"float16", "float32",  "float64", "int8",
                                      "int16",   "int32",    "string",  "dims",
                                      "unknown", "bfloat16", "int64",   "float8"};
  const auto at = static_cast<size_t>(field.type);
  const std::string type = at < sizeof(names) / sizeof(*names) ? names[at] : "another type";
  return field.type == PluginFieldType::kCHAR || field.length == 1
             ? type
             : type + " of length " + std::to_string(field.length);
}

std::string Text(double value) {
  std::ostringstream out;
  out.precision(10);
  out << value;
  return out.str();
}

template <class T>
T Load(const PluginField& field) {
  T out;
  memcpy(&out, field.data, sizeof(out));
  return out;
}

// The ONNX parser reads these itself to find the plugin.
bool IsPluginName(const char* name) {
  return !strcmp(name, "plugin_version") || !strcmp(name, "plugin_namespace");
}

}  // namespace

Attributes::Attributes(const contract::Operator& op, const nvinfer1::PluginFieldCollection* fields)
    : op_(op), values_(op.num_attributes) {
  const int count = fields && fields->fields ? fields->nbFields : 0;
  for (int i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    if (!field.name) throw Error(std::string("an attribute has no name") + kFix);
    if (IsPluginName(field.name)) continue;
    int at = 0;
    while (at < op.num_attributes && strcmp(op.attributes[at].name, field.name)) ++at;
    if (at == op.num_attributes)
      throw Error("attribute '" + std::string(field.name) + "' is unknown" + kFix);
    if (values_[at].given)
      throw Error("attribute '" + std::string(field.name) + "' is given twice" + kFix);
    values_[at] = Parse(op.attributes[at], field);
  }
  for (int i = 0; i < op.num_attributes; ++i) {
    if (!values_[i].given)
      throw Error("attribute '" + std::string(op.attributes[i].name) + "' is missing" + kFix);
  }
  if (const int version = Int("format_version"); version != HQMQ_FORMAT_VERSION) {
    throw Error("attribute 'format_version' is " + std::to_string(version) +
                ", but this library has cache format " + std::to_string(HQMQ_FORMAT_VERSION) +
                "; export the model again or install the matching hqmq-trt");
  }
  for (int i = 0; i < op.num_attributes; ++i) {
    if (op.attributes[i].kind == contract::Kind::kInt) {
      fields_.emplace_back(op.attributes[i].name, &values_[i].integer, PluginFieldType::kINT32, 1);
    } else {
      fields_.emplace_back(op.attributes[i].name, &values_[i].real, PluginFieldType::kFLOAT32, 1);
    }
  }
  collection_.nbFields = static_cast<int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

Attributes::Value Attributes::Parse(const contract::Attribute& attribute,
                                    const PluginField& field) const {
  const std::string what = "attribute '" + std::string(attribute.name) + "' is ";
  const bool integer = attribute.kind == contract::Kind::kInt;
  const bool fits =
      integer ? field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64
              : field.type == PluginFieldType::kFLOAT32;
  if (!fits || field.length != 1 || !field.data) {
    throw Error(what + (field.data ? TypeName(field) : "without a value") + ", expected one " +
                (integer ? "int32" : "float32") + kFix);
  }
  double value;
  if (!integer) {
    value = Load<float>(field);
  } else if (field.type == PluginFieldType::kINT32) {
    value = Load<int32_t>(field);
  } else {
    value = static_cast<double>(Load<int64_t>(field));
  }
  if (!std::isfinite(value)) throw Error(what + Text(value) + ", not a finite number" + kFix);
  if (value < attribute.low || value > attribute.high) {
    throw Error(what + Text(value) + ", outside " + Text(attribute.low) + "…" +
                Text(attribute.high) + kFix);
  }
  if (attribute.power_of_two && (static_cast<int64_t>(value) & (static_cast<int64_t>(value) - 1)))
    throw Error(what + Text(value) + ", no power of two" + kFix);
  Value out;
  out.given = true;
  if (integer) {
    out.integer = static_cast<int32_t>(value);
  } else {
    out.real = static_cast<float>(value);
  }
  return out;
}

const Attributes::Value& Attributes::Find(const std::string& name) const {
  for (int i = 0; i < op_.num_attributes; ++i) {
    if (name == op_.attributes[i].name) return values_[i];
  }
  throw Error("the contract has no attribute '" + name + "'");
}

bool Attributes::All(const char* names) const {
  std::istringstream in(names);
  for (std::string name; in >> name;) {
    if (Int(name) == 0) return false;
  }
  return true;
}

int32_t Attributes::Int(const std::string& name) const { return Find(name).integer; }
float Attributes::Float(const std::string& name) const { return Find(name).real; }

}  // namespace hqmq::trt
