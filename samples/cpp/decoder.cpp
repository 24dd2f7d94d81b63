#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

constexpr int kDecodeProfile = 0, kPrefillProfile = 1;

size_t size_of(DataType type) {
  switch (type) {
    case DataType::kINT64:
      return 8;
    case DataType::kFLOAT:
    case DataType::kINT32:
      return 4;
    case DataType::kHALF:
    case DataType::kBF16:
      return 2;
    default:
      throw std::runtime_error("the engine has a tensor of an unknown type; build it again");
  }
}

size_t elements(const Dims& dims) {
  size_t product = 1;
  for (int i = 0; i < dims.nbDims; ++i) product *= static_cast<size_t>(dims.d[i]);
  return product;
}

std::vector<char> contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const std::streamoff size = file.good() ? static_cast<std::streamoff>(file.tellg()) : 0;
  std::vector<char> bytes(static_cast<size_t>(std::max<std::streamoff>(size, 0)));
  file.seekg(0);
  file.read(bytes.data(), size);
  require(size > 0 && file.good(),
          path + ": cannot be read; build an engine with `hqmq-trt build`");
  return bytes;
}

}  // namespace

Decoder::Decoder(const std::string& folder, const std::string& plugins, int64_t max_context) {
  const std::string path = folder + "/engine.plan";
  const std::vector<char> plan = contents(path);
  runtime_.reset(nvinfer1::createInferRuntime(logger_));
  require(runtime_ != nullptr, "TensorRT does not start: " + logger_.take_errors());
  // The global registry: engines look their plugins up there.
  require(getPluginRegistry()->loadLibrary(plugins.c_str()) != nullptr,
          plugins + ": TensorRT cannot load it as a plugin library: " + logger_.take_errors());
  engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
  require(engine_ != nullptr, path + ": TensorRT " + std::to_string(getInferLibVersion()) +
                                  " refuses it: " + logger_.take_errors());
  require(engine_->getNbOptimizationProfiles() == 2, path + ": is not an engine of hqmq-trt");
  measure(path, max_context);
  const size_t chunk = static_cast<size_t>(chunk_);
  ids_ = device_memory(8 * chunk, "token ids");
  lengths_ = device_memory(3 * 4, "lengths");
  index_ = device_memory(8, "the row of logits");
  logits_ = device_memory(4 * vocabulary_, "logits");
  sum_ = device_memory(4, "the sum of the logits");
  host_ids_ = pinned_memory(8 * chunk);
  host_lengths_ = pinned_memory(2 * 4);
  host_index_ = pinned_memory(8);
  host_logits_ = pinned_memory(4 * vocabulary_);
  host_sum_ = pinned_memory(4);
  // Both contexts run on one stream, never at once: they share their scratch memory.
  const int64_t scratch = engine_->getDeviceMemorySizeV2();
  scratch_ = device_memory(static_cast<size_t>(scratch), "scratch memory");
  prefill_ = context(kPrefillProfile, scratch);
  decode_ = context(kDecodeProfile, scratch);
  shapes(*decode_, 1);
}

int64_t Decoder::prefill(const std::vector<int64_t>& prompt) {
  for (size_t start = 0; start < prompt.size(); start += static_cast<size_t>(chunk_)) {
    const size_t count = std::min(prompt.size() - start, static_cast<size_t>(chunk_));
    shapes(*prefill_, static_cast<int64_t>(count));
    stage(prompt.data() + start, count);
    enqueue(*prefill_, count);
    stream_.wait();
    length_ += static_cast<int64_t>(count);
  }
  return best();
}

int64_t Decoder::decode(int64_t token) {
  stage(&token, 1);
  if (graph_.captured()) {
    graph_.launch(stream_);
  } else {
    // The first run prepares what cannot be captured.
    enqueue(*decode_, 1);
    stream_.wait();
    graph_.capture(stream_, [this] { enqueue(*decode_, 1); });
  }
  stream_.wait();
  ++length_;
  return best();
}

void Decoder::measure(const std::string& path, int64_t max_context) {
  std::set<std::string> names;
  for (int i = 0; i < engine_->getNbIOTensors(); ++i) names.insert(engine_->getIOTensorName(i));
  for (const char* name : {"input_ids", "past_length", "new_length", "logits_index", "logits",
                           "logits_sum", "present_length", "past.0.key.codes"}) {
    require(names.count(name) == 1,
            path + ": has no tensor '" + name + "'; build it again with this hqmq-trt");
  }
  chunk_ = most("input_ids", kPrefillProfile).d[1];
  const int64_t page_size = least("past.0.key.codes", kDecodeProfile).d[2];
  const int64_t limit = most("past.0.key.codes", kDecodeProfile).d[2];
  require(max_context <= limit, "--max-context " + std::to_string(max_context) +
                                    " exceeds the engine's " + std::to_string(limit) +
                                    "; build it with --max-context");
  const int64_t pages = ((max_context ? max_context : limit) + page_size - 1) / page_size;
  max_context_ = pages * page_size;
  for (const char* name : {"logits", "logits_sum"}) {
    require(engine_->getTensorDataType(name) == DataType::kFLOAT,
            path + ": its " + name + " are not float32; build it again with this hqmq-trt");
  }
  const Dims logits = engine_->getTensorShape("logits");
  require(logits.nbDims == 3 && logits.d[2] > 0, path + ": its logits have no fixed vocabulary");
  vocabulary_ = static_cast<size_t>(logits.d[2]);
  for (const std::string& name : names) {
    if (name.rfind("past.", 0) != 0) continue;
    Tensor tensor{name.substr(5), engine_->getTensorShape(name.c_str()), nullptr};
    require(names.count("present." + tensor.name) == 1, path + ": has no present." + tensor.name);
    tensor.shape.d[0] = 1;
    // Rows by token or by page: the smallest cache has one page.
    if (tensor.shape.d[2] < 0) tensor.shape.d[2] = least(name, kDecodeProfile).d[2] * pages;
    const size_t bytes = elements(tensor.shape) * size_of(engine_->getTensorDataType(name.c_str()));
    tensor.memory =
        device_memory(bytes, "the cache of " + std::to_string(max_context_) + " tokens");
    cuda(cudaMemset(tensor.memory.get(), 0, bytes), "clear the cache");
    cache_bytes_ += bytes;
    cache_.push_back(std::move(tensor));
  }
  cuda(cudaDeviceSynchronize(), "clear the cache");
}

Dims Decoder::most(const std::string& name, int profile) const {
  return engine_->getProfileShape(name.c_str(), profile, OptProfileSelector::kMAX);
}
Dims Decoder::least(const std::string& name, int profile) const {
  return engine_->getProfileShape(name.c_str(), profile, OptProfileSelector::kMIN);
}

void Decoder::check(bool done, const std::string& action) {
  require(done, "cannot " + action + ": " + (done ? "" : logger_.take_errors()));
}

std::unique_ptr<nvinfer1::IExecutionContext> Decoder::context(int profile, int64_t scratch) {
  std::unique_ptr<nvinfer1::IExecutionContext> made(
      engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
  check(made != nullptr, "make an execution context");
  check(made->setOptimizationProfileAsync(profile, stream_), "select a profile");
  stream_.wait();
  made->setDeviceMemoryV2(scratch_.get(), scratch);
  for (const Tensor& tensor : cache_) {
    const std::string past = "past." + tensor.name, present = "present." + tensor.name;
    check(made->setInputShape(past.c_str(), tensor.shape), "give " + past + " its shape");
    check(made->setTensorAddress(past.c_str(), tensor.memory.get()), "bind " + past);
    check(made->setTensorAddress(present.c_str(), tensor.memory.get()), "bind " + present);
  }
  auto* lengths = static_cast<int32_t*>(lengths_.get());
  check(made->setTensorAddress("input_ids", ids_.get()), "bind input_ids");
  check(made->setTensorAddress("past_length", lengths), "bind past_length");
  check(made->setTensorAddress("new_length", lengths + 1), "bind new_length");
  check(made->setTensorAddress("present_length", lengths + 2), "bind present_length");
  check(made->setTensorAddress("logits_index", index_.get()), "bind logits_index");
  check(made->setTensorAddress("logits", logits_.get()), "bind logits");
  check(made->setTensorAddress("logits_sum", sum_.get()), "bind logits_sum");
  return made;
}

void Decoder::shapes(nvinfer1::IExecutionContext& context, int64_t tokens) {
  check(context.setInputShape("input_ids", nvinfer1::Dims2(1, tokens)), "set the tokens of a run");
  check(context.setInputShape("logits_index", nvinfer1::Dims2(1, 1)), "set the rows of logits");
  Dims one{};
  one.nbDims = 1;
  one.d[0] = 1;
  for (const char* name : {"past_length", "new_length"}) {
    check(context.setInputShape(name, one), std::string("set the shape of ") + name);
  }
}

void Decoder::stage(const int64_t* tokens, size_t count) {
  std::memcpy(host_ids_.get(), tokens, 8 * count);
  auto* lengths = static_cast<int32_t*>(host_lengths_.get());
  lengths[0] = static_cast<int32_t>(length_);
  lengths[1] = static_cast<int32_t>(count);
  *static_cast<int64_t*>(host_index_.get()) = static_cast<int64_t>(count) - 1;
}

void Decoder::enqueue(nvinfer1::IExecutionContext& context, size_t tokens) {
  upload(ids_.get(), host_ids_.get(), 8 * tokens);
  upload(lengths_.get(), host_lengths_.get(), 2 * 4);
  upload(index_.get(), host_index_.get(), 8);
  check(context.enqueueV3(stream_), "run the engine");
  download(host_logits_.get(), logits_.get(), 4 * vocabulary_);
  download(host_sum_.get(), sum_.get(), 4);
}

void Decoder::upload(void* device, const void* host, size_t bytes) {
  cuda(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_),
       "copy inputs to the GPU");
}

void Decoder::download(void* host, const void* device, size_t bytes) {
  cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_),
       "copy logits to the host");
}

int64_t Decoder::best() const {
  const auto* first = static_cast<const float*>(host_logits_.get());
  const float* last = first + vocabulary_;
  // A finite sum has finite terms. One that is not may be that of finite logits beyond 1e33.
  const bool finite = std::isfinite(*static_cast<const float*>(host_sum_.get())) ||
                      std::all_of(first, last, [](float value) { return std::isfinite(value); });
  require(finite, "the logits are not finite: the model overflows its type");
  return std::max_element(first, last) - first;
}
