// What the decoder holds on the GPU, freed by destructors; CUDA's errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

inline void cuda(cudaError_t status, const char* action) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("cannot ") + action + ": " + cudaGetErrorString(status));
  }
}

struct FreeDevice {
  void operator()(void* memory) const { cudaFree(memory); }
};
struct FreePinned {
  void operator()(void* memory) const { cudaFreeHost(memory); }
};
using DeviceMemory = std::unique_ptr<void, FreeDevice>;
using PinnedMemory = std::unique_ptr<void, FreePinned>;

inline DeviceMemory device_memory(size_t bytes, const std::string& use) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
  require(status == cudaSuccess, "no room on the GPU for " + use + " (" + std::to_string(bytes) +
                                     " bytes): " + cudaGetErrorString(status) +
                                     "; lower --max-context");
  return DeviceMemory(memory);
}

inline PinnedMemory pinned_memory(size_t bytes) {
  void* memory = nullptr;
  cuda(cudaMallocHost(&memory, std::max<size_t>(bytes, 1)), "allocate pinned host memory");
  return PinnedMemory(memory);
}

class Stream {
 public:
  Stream() {
    // Capture forbids the implicit order with the default stream.
    cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }
  void wait() const { cuda(cudaStreamSynchronize(stream_), "run the engine"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// Work on a stream, recorded once and launched as a whole.
class Graph {
 public:
  Graph() = default;
  ~Graph() {
    if (executable_) cudaGraphExecDestroy(executable_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  template <typename Work>
  void capture(const Stream& stream, Work work) {
    cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin a capture");
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph) cudaGraphDestroy(graph);
      throw;
    }
    cuda(cudaStreamEndCapture(stream, &graph), "capture a decode step");
    const cudaError_t status = cudaGraphInstantiateWithFlags(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    cuda(status, "make a graph of a decode step");
  }
  bool captured() const { return executable_ != nullptr; }
  void launch(const Stream& stream) const {
    cuda(cudaGraphLaunch(executable_, stream), "launch a decode step");
  }

 private:
  cudaGraphExec_t executable_ = nullptr;
};
