#include "trt_contract_cases.h"

#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace hqmq::test {
namespace {

Value ReadValue(std::istringstream& line) {
  Value value;
  std::string kind;
  line >> value.name >> kind;
  value.integer = kind == "int";
  if (value.integer) {
    line >> value.i;
  } else if (kind == "float") {
    line >> value.f;
  } else {
    throw std::runtime_error("attribute '" + value.name + "' is neither int nor float");
  }
  if (!line) throw std::runtime_error("attribute '" + value.name + "' has no value");
  return value;
}

Node ReadTensor(std::istringstream& line, bool output) {
  Node node;
  line >> node.name >> node.type;
  if (output) line >> node.alias;
  if (!line) throw std::runtime_error("tensor '" + node.name + "' lacks type or alias");
  for (std::string text; line >> text;) {
    Axis axis = {std::stoll(text), false, false};
    for (const char mark : text) {
      axis.dynamic |= mark == '?';
      axis.alone |= mark == '+';
    }
    node.shape.push_back(axis);
  }
  if (node.shape.empty()) throw std::runtime_error("tensor '" + node.name + "' has no shape");
  return node;
}

}  // namespace

std::vector<Case> ReadCases(const std::string& path) {
  std::ifstream file(path);
  std::vector<Case> cases;
  bool open = false;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string word;
    line >> word;
    if (word == "case") {
      cases.emplace_back();
      line >> cases.back().name >> cases.back().op;
      open = true;
      continue;
    }
    if (!open) throw std::runtime_error(path + ": no case is open: " + text);
    if (word == "attribute") {
      cases.back().attributes.push_back(ReadValue(line));
    } else if (word == "input") {
      cases.back().inputs.push_back(ReadTensor(line, false));
    } else if (word == "output") {
      cases.back().outputs.push_back(ReadTensor(line, true));
    } else if (word == "end") {
      open = false;
    } else {
      throw std::runtime_error(path + ": unknown line: " + text);
    }
  }
  if (cases.empty() || open) throw std::runtime_error(path + ": no case, or one without an end");
  return cases;
}

nvinfer1::DataType TypeOf(const Node& node, nvinfer1::DataType activation) {
  if (node.type == "T") return activation;
  if (node.type == "int32") return nvinfer1::DataType::kINT32;
  if (node.type == "float16") return nvinfer1::DataType::kHALF;
  if (node.type == "float32") return nvinfer1::DataType::kFLOAT;
  throw std::runtime_error("unknown type " + node.type);
}

nvinfer1::Dims DimsOf(const std::vector<Axis>& shape) {
  nvinfer1::Dims dims = {};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i].size;
  return dims;
}

Fields::Fields(std::vector<Value> values) : values_(std::move(values)) {
  for (const Value& value : values_) {
    if (value.integer) {
      fields_.emplace_back(value.name.c_str(), &value.i, nvinfer1::PluginFieldType::kINT32, 1);
    } else {
      fields_.emplace_back(value.name.c_str(), &value.f, nvinfer1::PluginFieldType::kFLOAT32, 1);
    }
  }
}

nvinfer1::PluginField& Fields::operator[](const std::string& name) {
  for (nvinfer1::PluginField& field : fields_) {
    if (name == field.name) return field;
  }
  throw std::runtime_error("no attribute " + name);
}

void Fields::Remove(const std::string& name) {
  nvinfer1::PluginField& field = (*this)[name];
  fields_.erase(fields_.begin() + (&field - fields_.data()));
}

const nvinfer1::PluginFieldCollection* Fields::get() {
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

void Report::Check(bool holds, const std::string& what) {
  ++checks_;
  if (holds) return;
  if (++failures_ <= 50) std::printf("FAILED %s: %s\n", where_.c_str(), what.c_str());
}

void Log::log(Severity severity, const char* text) noexcept {
  texts_.emplace_back(text ? text : "");
  severities_.push_back(severity);
}

std::string Log::TakeError() {
  const bool one = texts_.size() == 1 && severities_[0] == Severity::kERROR;
  const std::string text = one ? texts_[0] : "";
  Clear();
  return text;
}

std::string Log::Text() const {
  std::string out;
  for (const std::string& text : texts_) out += text + "; ";
  return out;
}

}  // namespace hqmq::test
