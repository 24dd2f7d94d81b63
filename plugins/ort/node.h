// What the three operators share: a node's attributes, codebooks and cache tensors
// (hqmq_trt/contract.py).
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "attention.h"
#include "ort_support.h"

namespace hqmq::ort {

// A node as ONNX Runtime describes it to a kernel being made.
class NodeInfo {
 public:
  NodeInfo(const char* op, const KernelInfo* info);

  int Int(const std::string& name, int low, int high) const;
  float Float(const std::string& name) const;
  // Refuses a node with other counts of inputs or outputs, or made for another format version.
  void CheckInterface(size_t inputs, size_t outputs) const;
  // A constant input, if it is one.
  bool Constant(size_t index, Tensor* out) const;
  // "HqmqAttention node 'name': " + text
  std::string Message(const std::string& text) const { return title_ + text; }

 private:
  std::string title_;
  const KernelInfo* info_;
};

// One role of a node. Tensors of its codebook and cache are at fixed places among the node's
// inputs.
class Role {
 public:
  // prefix: of the attributes, "", "k_" or "v_"; name: "", "key " or "value ", for messages.
  Role(const NodeInfo& node, std::string prefix, std::string name, int page_size);

  size_t codebook_inputs() const { return packed() ? 2 : 0; }
  size_t cache_tensors() const;
  // Reads the codebook now if it is constant, so that its table is made once.
  void BindCodebook(const NodeInfo& node, size_t first_input);

  // A call's view of the role.
  struct View {
    RoleParams params;
    int batch, heads, num_pages;
    RoleCache cache;
    const float *secondaries, *levels;
    std::shared_ptr<const Words> words;
    std::vector<Tensor> tensors;  // of the cache
  };
  // Reads and checks codebook and cache inputs of a call.
  View Read(const KernelContext* context, size_t first_codebook, size_t first_cache) const;

 private:
  struct Codebook {
    std::vector<float> secondaries, levels;
    std::shared_ptr<const Words> words;
  };

  bool packed() const { return params_.storage == Storage::kHqmq; }
  Codebook MakeCodebook(const Tensor& secondaries, const Tensor& levels) const;
  void CheckCodebook(const Tensor& secondaries, const Tensor& levels) const;
  std::shared_ptr<const Words> WordsOf(const RoleParams& params, int heads,
                                       const Tensor& secondaries, const Tensor& levels) const;

  RoleParams params_ = {};  // head_dim and secondaries come with a call
  std::string name_;
  bool constant_ = false;
  mutable std::mutex mutex_;
  mutable Codebook codebook_;
};

// Gives the present tensors of a call: the outputs, with `past` copied where a buffer is not the
// same.
class Present {
 public:
  // Allocates outputs first_output…; nothing is copied yet.
  Present(KernelContext* context, size_t first_output, const Role::View& past);
  RoleCache cache() const;
  void CopyPast(const Threads& threads) const;

 private:
  const Role::View& past_;
  std::vector<Tensor> tensors_;
};

// Pointers of cache tensors in contract order.
RoleCache CacheOf(const RoleParams& params, const std::vector<Tensor>& tensors);

// Refuses activations that do not fit a cache's batch, heads and head_dim.
void CheckRows(const Tensor& x, const Role::View& cache, const char* name);
// Elements of any float type as float32.
std::vector<float> Floats(const Tensor& tensor);
// Activations [B, H, T, D], contiguous.
hqmq_rows RowsOf(const Tensor& tensor, const char* name);
Rows WritableRows(const Tensor& tensor);
// int32 [batch]
const int32_t* Lengths(const Tensor& tensor, int batch, const char* name);
// Loops on ONNX Runtime's threads.
Threads ThreadsOf(KernelContext* context);
// Raises what `status` tells.
void Check(const hqmq::Status& status);

// Runs a function; what it throws gets `title` in front.
template <class Function>
void Titled(const std::string& title, Function function) {
  try {
    function();
  } catch (const Error& error) {
    throw Error(title + error.what(), error.code());
  } catch (const std::exception& error) {
    throw Error(title + error.what(), kRuntimeException);
  }
}

}  // namespace hqmq::ort
