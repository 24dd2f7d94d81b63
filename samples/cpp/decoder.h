// One sequence on an engine: a prompt is read in chunks, then each step is one CUDA graph launch.
//
// The engine describes itself: names, types and the shapes of its two optimisation profiles (0: one
// token a sequence, 1: a chunk of a prompt) give the size of the cache, the vocabulary and the
// limits, so no other file is read. past.* and present.* are bound to one address each: the plugins
// then update the cache in place.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cuda_resources.h"

// Errors of TensorRT become part of our exception; warnings are shown.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity <= Severity::kERROR) {
      errors_ += errors_.empty() ? text : std::string("; ") + text;
    } else if (severity == Severity::kWARNING) {
      std::cerr << "TensorRT: " << text << '\n';
    }
  }

  std::string take_errors() {
    std::string text = errors_.empty() ? "TensorRT gave no reason" : errors_;
    errors_.clear();
    return text;
  }

 private:
  std::string errors_;
};

class Decoder {
 public:
  // `max_context`: tokens the cache holds, rounded up to whole pages; 0: the engine's limit.
  Decoder(const std::string& folder, const std::string& plugins, int64_t max_context);

  int64_t max_context() const { return max_context_; }
  size_t vocabulary() const { return vocabulary_; }
  size_t cache_bytes() const { return cache_bytes_; }

  // Reads the whole prompt and returns the most likely next token.
  int64_t prefill(const std::vector<int64_t>& prompt);
  // Appends one token and returns the most likely next one.
  int64_t decode(int64_t token);

 private:
  // Limits, types and the cache, from what the engine says of its tensors.
  void measure(const std::string& path, int64_t max_context);
  nvinfer1::Dims most(const std::string& name, int profile) const;
  nvinfer1::Dims least(const std::string& name, int profile) const;
  void check(bool done, const std::string& action);
  std::unique_ptr<nvinfer1::IExecutionContext> context(int profile, int64_t scratch);
  void shapes(nvinfer1::IExecutionContext& context, int64_t tokens);
  // Puts a run's inputs into pinned memory, from where `enqueue` copies them.
  void stage(const int64_t* tokens, size_t count);
  void enqueue(nvinfer1::IExecutionContext& context, size_t tokens);
  void upload(void* device, const void* host, size_t bytes);
  void download(void* host, const void* device, size_t bytes);
  int64_t best() const;

  struct Tensor {
    std::string name;
    nvinfer1::Dims shape;
    DeviceMemory memory;
  };

  // In order of construction: what is below is freed first.
  Logger logger_;
  Stream stream_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<Tensor> cache_;
  DeviceMemory ids_, lengths_, index_, logits_, sum_, scratch_;
  PinnedMemory host_ids_, host_lengths_, host_index_, host_logits_, host_sum_;
  std::unique_ptr<nvinfer1::IExecutionContext> prefill_, decode_;
  Graph graph_;
  int64_t chunk_ = 0, max_context_ = 0, length_ = 0;
  size_t vocabulary_ = 0, cache_bytes_ = 0;
};
