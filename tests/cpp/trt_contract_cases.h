// Nodes to try the TensorRT plugins with, as tests/trt_cases.py writes them:
//
//   case hq4 HqmqAttention
//   attribute window int 0
//   input q T 3? 4 5?+ 32        a size; ? it is dynamic; + no other tensor has it
//   output present_key_codes int32 18 3? 2 ...     after the type: the input it is aliased to, or
//   -1 end
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

namespace hqmq::test {

struct Value {
  std::string name;
  bool integer;
  int32_t i = 0;
  float f = 0;
};

struct Axis {
  int64_t size;
  bool dynamic, alone;
};

struct Node {
  std::string name, type;  // "T": the activations' type
  int alias = -1;
  std::vector<Axis> shape;
};

struct Case {
  std::string name, op;
  std::vector<Value> attributes;
  std::vector<Node> inputs, outputs;
};

// Throws std::runtime_error if the file is not of this form or has no case.
std::vector<Case> ReadCases(const std::string& path);

nvinfer1::DataType TypeOf(const Node& node, nvinfer1::DataType activation);
nvinfer1::Dims DimsOf(const std::vector<Axis>& shape);

// Plugin fields that own what they point to.
class Fields {
 public:
  explicit Fields(std::vector<Value> values);
  Fields(const Fields&) = delete;
  Fields& operator=(const Fields&) = delete;

  nvinfer1::PluginField& operator[](const std::string& name);
  void Remove(const std::string& name);
  void Add(const nvinfer1::PluginField& field) { fields_.push_back(field); }
  const nvinfer1::PluginFieldCollection* get();

 private:
  std::vector<Value> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

// Counts what holds and prints what does not.
class Report {
 public:
  void Check(bool holds, const std::string& what);
  // Where we are, for messages.
  void At(std::string where) { where_ = std::move(where); }
  int checks() const { return checks_; }
  int failures() const { return failures_; }

 private:
  std::string where_;
  int checks_ = 0, failures_ = 0;
};

// Takes the library's messages, as TensorRT would.
class Log final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity severity, const char* text) noexcept override;
  nvinfer1::ILogger* findLogger() override { return this; }
  // The only message since the last call, an error; otherwise "" (and more than one is reported).
  std::string TakeError();
  bool Silent() const { return texts_.empty(); }
  std::string Text() const;
  void Clear() { texts_.clear(), severities_.clear(); }

 private:
  std::vector<std::string> texts_;
  std::vector<Severity> severities_;
};

struct Context {
  nvinfer1::IPluginCreatorV3One* creator = nullptr;
  Report* report = nullptr;
  Log* log = nullptr;
};

// Everything a plugin does for TensorRT, with one type of activations.
void TestPlugin(const Context& context, const Case& node, nvinfer1::DataType activation);

// Every kind of wrong attribute, one at a time: createPlugin gives nothing and logs one error.
void TestAttributeErrors(const Context& context, const Case& node);

}  // namespace hqmq::test
