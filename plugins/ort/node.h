// What the operators of all execution providers share: a node's attributes, codebooks and cache
// tensors (hqmq_trt/contract.py). Reads types and shapes only, never a tensor's data, which may lie
// on a GPU.
#pragma once

#include <string>

#include "attention_kernels.h"
#include "ort_support.h"
#include "status.h"

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
  const KernelInfo* info() const { return info_; }

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

  bool packed() const { return params_.storage == Storage::kHqmq; }
  int radius_bits() const { return params_.radius_bits; }
  size_t codebook_inputs() const { return packed() ? 2 : 0; }
  size_t cache_tensors() const;
  // Whether the codebook at first_input is constant; its tensors, checked.
  bool ConstantCodebook(const NodeInfo& node, size_t first_input, Tensor* secondaries,
                        Tensor* levels) const;

  // A call's view of the role.
  struct View {
    RoleParams params;
    int batch, heads, num_pages;
    RoleCache cache;
    Tensor secondaries, levels;   // data null for storage fp16
    std::vector<Tensor> tensors;  // of the cache

    const float* secondary_data() const { return static_cast<const float*>(secondaries.data); }
    const float* level_data() const { return static_cast<const float*>(levels.data); }
  };
  // Reads and checks codebook and cache inputs of a call.
  View Read(const KernelContext* context, size_t first_codebook, size_t first_cache) const;

 private:
  void CheckCodebook(const Tensor& secondaries, const Tensor& levels) const;

  RoleParams params_ = {};  // head_dim and secondaries come with a call
  std::string name_;
};

// The present tensors of a call. Whoever makes them copies `past` into those whose buffer is
// another one.
class Present {
 public:
  // Allocates outputs first_output…; nothing is copied yet.
  Present(KernelContext* context, size_t first_output, const Role::View& past);
  RoleCache cache() const;
  // function(to, from, bytes) for each tensor with a buffer of its own.
  template <class Function>
  void ForEachCopy(Function function) const {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].data != past_.tensors[i].data)
        function(tensors_[i].data, past_.tensors[i].data, tensors_[i].bytes());
    }
  }

 private:
  const Role::View& past_;
  std::vector<Tensor> tensors_;
};

// Pointers of cache tensors in contract order.
RoleCache CacheOf(const RoleParams& params, const std::vector<Tensor>& tensors);

// enum hqmq_dtype of activations
int32_t DtypeOf(const Tensor& tensor, const char* name);
// Refuses activations that do not fit a cache's batch, heads and head_dim.
void CheckRows(const Tensor& x, const Role::View& cache, const char* name);
// Activations [B, H, T, D], contiguous.
hqmq_rows RowsOf(const Tensor& tensor, const char* name);
// int32 [batch]
const int32_t* Lengths(const Tensor& tensor, int batch, const char* name);
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
