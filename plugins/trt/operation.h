// What one node does, apart from TensorRT's plugin interface: its tensors and its kernels.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "attributes.h"
#include "hqmq_cuda.h"
#include "tensors.h"

namespace hqmq::trt {

// A call, its shapes checked. Aliased outputs already hold what their inputs hold.
struct Call {
  Sizes sizes;
  nvinfer1::DataType activation;  // of input 0, if that is one
  const void* const* inputs;
  void* const* outputs;
  void* workspace;
  cudaStream_t stream;
};

// Made once a node and shared by the copies TensorRT makes of its plugin; never changes.
class Operation {
 public:
  struct InputDim {
    size_t input;
    int dim;
  };
  struct Output {
    int alike;                   // the input it has shape and type of; -1: float32 of `dims`
    bool in_place;               // it is that input's memory
    std::vector<InputDim> dims;  // where its dimensions come from
  };

  virtual ~Operation() = default;
  // Bytes of workspace for any batch, tokens and pages up to `most`. Throws Error if no GPU kernel
  // takes them.
  virtual size_t Workspace(const Sizes& most) const = 0;
  // Enqueues the kernels.
  virtual void Run(const Call& call) const = 0;

  const contract::Operator& op() const { return op_; }
  const nvinfer1::PluginFieldCollection* fields() const { return attributes_.fields(); }
  const std::vector<TensorSpec>& inputs() const { return inputs_; }
  const std::vector<Output>& outputs() const { return outputs_; }
  const std::vector<RoleParams>& roles() const { return roles_; }

 protected:
  // Throws Error if the fields do not fit the operator. Roles: 1, or 2 for attributes k_… and v_….
  Operation(const contract::Operator& op, const nvinfer1::PluginFieldCollection* fields, int roles);

  // The place of an input the node has.
  size_t Input(const std::string& name) const;

  // As the C interface takes them; sizes of `from` that are not known stay 0.
  hqmq_role_params Params(size_t role, const Sizes& from) const;
  const float* Secondaries(size_t role, const Call& call) const;
  const float* Levels(size_t role, const Call& call) const;
  hqmq_role_cache Past(size_t role, const Call& call) const;
  hqmq_role_cache Present(size_t role, const Call& call) const;
  // Activations [B, heads, T, D], contiguous.
  static hqmq_rows Rows(const void* data, nvinfer1::DataType type, const Sizes& sizes, Size heads,
                        Size tokens, const char* name);
  // Throws Error if a function of hqmq_cuda.h failed.
  static void Check(int status);

  const contract::Operator& op_;
  Attributes attributes_;

 private:
  hqmq_role_cache Cache(size_t role, void* const* tensors) const;
  // Where a role's tensors are among inputs and outputs.
  struct RoleTensors {
    size_t codebook, cache, present;
  };
  RoleParams MakeRole(const std::string& prefix) const;
  std::vector<Dim> DimsOf(const contract::Tensor& tensor) const;
  Output MakeOutput(const contract::Tensor& tensor) const;

  std::vector<RoleParams> roles_;
  std::vector<RoleTensors> tensors_;
  std::vector<TensorSpec> inputs_;
  std::vector<Output> outputs_;
};

std::shared_ptr<const Operation> MakeQuantize(const nvinfer1::PluginFieldCollection* fields);
std::shared_ptr<const Operation> MakeDequantize(const nvinfer1::PluginFieldCollection* fields);
std::shared_ptr<const Operation> MakeAttention(const nvinfer1::PluginFieldCollection* fields);

}  // namespace hqmq::trt
