// A node's attributes: checked against contract_table.h, and as TensorRT serialises them.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "contract_table.h"

namespace hqmq::trt {

class Attributes {
 public:
  // Throws Error on unknown, missing, repeated, mistyped and out-of-range attributes and for
  // another format version.
  Attributes(const contract::Operator& op, const nvinfer1::PluginFieldCollection* fields);
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;

  int32_t Int(const std::string& name) const;
  float Float(const std::string& name) const;
  // Whether all of these, parted by spaces, are not zero.
  bool All(const char* names) const;
  // Lives as long as this object.
  const nvinfer1::PluginFieldCollection* fields() const { return &collection_; }

 private:
  struct Value {
    int32_t integer = 0;
    float real = 0;
    bool given = false;
  };
  const Value& Find(const std::string& name) const;
  Value Parse(const contract::Attribute& attribute, const nvinfer1::PluginField& field) const;

  const contract::Operator& op_;
  std::vector<Value> values_;  // as op_.attributes
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace hqmq::trt
