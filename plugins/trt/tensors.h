// What a node's tensors must be: type and shape of each, and the sizes that follow from shapes.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>
#include <vector>

#include "codec/params.h"
#include "contract_table.h"

namespace hqmq::trt {

// Sizes that tensors share. Those of one role come twice: key (or the only role) and value.
enum Size {
  kBatch,
  kHeads,
  kQueryHeads,
  kTokens,
  kHeadDim,
  kCapacity,  // M*P
  kPages,     // M
  kSecondaries,
  kValueSecondaries,
  kNumSizes,
  // Follow from others:
  kWords = kNumSizes,
  kValueWords,
  kMaskWords,
  kFixed,
};

struct Dim {
  Size size;
  int64_t fixed = 0;  // of kFixed
};

using contract::Type;

struct TensorSpec {
  const char* name;
  Type type;
  std::vector<Dim> dims;
};

// Values of enum Size; -1 where not known.
struct Sizes : std::array<int64_t, kNumSizes> {
  Sizes() { fill(-1); }
  int32_t Int(Size size) const { return static_cast<int32_t>((*this)[size]); }
};

using Shape = std::vector<int64_t>;  // -1: not known

// Sizes from the shapes of all tensors, which are checked against each other and the roles (one or
// two, head_dim and secondaries unset). Throws Error.
Sizes Solve(const std::vector<TensorSpec>& specs, const std::vector<Shape>& shapes,
            const std::vector<RoleParams>& roles);

// The largest of each size, from the upper bounds of all shapes, which are not compared: TensorRT
// may bound one tensor more loosely than another. Throws Error where Solve would for one shape.
Sizes Largest(const std::vector<TensorSpec>& specs, const std::vector<Shape>& shapes,
              const std::vector<RoleParams>& roles);

Shape ShapeOf(const nvinfer1::Dims& dims);
Shape ShapeOf(const nvinfer1::DimsExprs& dims);
const char* TypeName(nvinfer1::DataType type);
bool Fits(Type wanted, nvinfer1::DataType type, nvinfer1::DataType activation);
bool IsActivation(nvinfer1::DataType type);
size_t Bytes(const nvinfer1::PluginTensorDesc& tensor);

}  // namespace hqmq::trt
