#include "tensors.h"

#include <algorithm>

#include "codec/layout.h"
#include "log.h"

namespace hqmq::trt {
namespace {

using nvinfer1::DataType;

const char* Symbol(Size size) {
  static const char* const symbols[] = {"B", "H", "Hq", "T", "D", "M*P",
                                        "M", "S", "S",  "W", "W", "words"};
  return symbols[size];
}

std::string Text(const Shape& shape) {
  std::string out;
  for (const int64_t size : shape) {
    out += (out.empty() ? "" : ", ") + (size < 0 ? std::string("?") : std::to_string(size));
  }
  return "[" + out + "]";
}

// The value a dimension must have; -1: not known.
int64_t Wanted(const Dim& dim, const Sizes& sizes, const std::vector<RoleParams>& roles) {
  if (dim.size == kFixed) return dim.fixed;
  if (dim.size < kNumSizes) return sizes[dim.size];
  const bool second = dim.size == kValueWords;
  RoleParams role = roles[second ? 1 : 0];
  role.head_dim = sizes.Int(kHeadDim);
  role.secondaries = sizes.Int(second ? kValueSecondaries : kSecondaries);
  if (role.head_dim < 0) return -1;
  if (dim.size == kMaskWords) return MaskWords(role);
  if (role.storage == Storage::kHqmq && role.secondaries < 0) return -1;
  return MakeLayout(role).words;
}

std::string Expected(const TensorSpec& spec, const Sizes& sizes,
                     const std::vector<RoleParams>& roles) {
  std::string out;
  for (const Dim& dim : spec.dims) {
    const int64_t wanted = Wanted(dim, sizes, roles);
    if (!out.empty()) out += ", ";
    if (dim.size != kFixed) out += Symbol(dim.size);
    if (dim.size != kFixed && wanted >= 0) out += "=";
    if (wanted >= 0) out += std::to_string(wanted);
  }
  return "[" + out + "]";
}

[[noreturn]] void Refuse(const TensorSpec& spec, const Shape& shape, const Sizes& sizes,
                         const std::vector<RoleParams>& roles) {
  throw Error("input '" + std::string(spec.name) + "' is " + Text(shape) + ", expected " +
              Expected(spec, sizes, roles) + "; check the optimisation profile and the shapes set");
}

void CheckHeadDim(int64_t head_dim, const std::vector<RoleParams>& roles) {
  if (head_dim % 4 || head_dim < 4 || head_dim > 256) {
    throw Error("head_dim is " + std::to_string(head_dim) +
                ": the GPU kernels take multiples of 4 up to 256");
  }
  for (const RoleParams& role : roles) {
    if (role.hadamard && (head_dim & (head_dim - 1))) {
      throw Error("head_dim is " + std::to_string(head_dim) +
                  ": the Hadamard rotation needs a power of two; export with another scheme");
    }
    if (role.outlier_capacity > role.page_size * (head_dim / 4)) {
      throw Error("outlier_capacity is " + std::to_string(role.outlier_capacity) +
                  ", more than the chunks of a page; export the model again");
    }
  }
}

void CheckSecondaries(int64_t count) {
  if (count >= 0 && (count < 1 || count > 1024)) {
    throw Error("a codebook has " + std::to_string(count) +
                " secondaries, expected 1…1024; export the model again");
  }
}

void CheckHeads(const Sizes& sizes) {
  const int64_t heads = sizes[kHeads], query_heads = sizes[kQueryHeads];
  if (query_heads >= 0 && heads >= 0 && (heads == 0 || query_heads % heads)) {
    throw Error("q has " + std::to_string(query_heads) + " heads, no multiple of the " +
                std::to_string(heads) + " of its cache; export the model again");
  }
}

}  // namespace

Sizes Solve(const std::vector<TensorSpec>& specs, const std::vector<Shape>& shapes,
            const std::vector<RoleParams>& roles) {
  Sizes sizes;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (shapes[i].size() != specs[i].dims.size()) Refuse(specs[i], shapes[i], sizes, roles);
    for (size_t k = 0; k < shapes[i].size(); ++k) {
      const int64_t size = shapes[i][k];
      const Size axis = specs[i].dims[k].size;
      if (size < 0 || axis >= kNumSizes) continue;
      if (sizes[axis] < 0) sizes[axis] = size;
      if (sizes[axis] != size || size > 0x7FFFFFFF) Refuse(specs[i], shapes[i], sizes, roles);
    }
  }
  if (sizes[kHeadDim] >= 0) CheckHeadDim(sizes[kHeadDim], roles);
  CheckSecondaries(sizes[kSecondaries]);
  CheckSecondaries(sizes[kValueSecondaries]);
  for (size_t i = 0; i < specs.size(); ++i) {
    for (size_t k = 0; k < shapes[i].size(); ++k) {
      const int64_t wanted = Wanted(specs[i].dims[k], sizes, roles);
      if (wanted >= 0 && shapes[i][k] >= 0 && wanted != shapes[i][k])
        Refuse(specs[i], shapes[i], sizes, roles);
    }
  }
  const int64_t page = roles[0].page_size, capacity = sizes[kCapacity];
  if (capacity >= 0 && capacity % page) {
    throw Error("the cache holds " + std::to_string(capacity) +
                " tokens, which is no multiple of its page of " + std::to_string(page) +
                "; round the context up");
  }
  if (capacity >= 0 && sizes[kPages] >= 0 && sizes[kPages] * page != capacity) {
    throw Error("the cache holds " + std::to_string(capacity) + " tokens but " +
                std::to_string(sizes[kPages]) + " pages of " + std::to_string(page) +
                "; give all tensors of the cache one context");
  }
  if (capacity >= 0 && sizes[kPages] < 0) sizes[kPages] = capacity / page;
  CheckHeads(sizes);
  return sizes;
}

Sizes Largest(const std::vector<TensorSpec>& specs, const std::vector<Shape>& shapes,
              const std::vector<RoleParams>& roles) {
  Sizes sizes;
  for (size_t i = 0; i < specs.size(); ++i) {
    if (shapes[i].size() != specs[i].dims.size()) Refuse(specs[i], shapes[i], sizes, roles);
    for (size_t k = 0; k < shapes[i].size(); ++k) {
      const Size axis = specs[i].dims[k].size;
      if (shapes[i][k] > 0x7FFFFFFF) Refuse(specs[i], shapes[i], sizes, roles);
      if (axis < kNumSizes) sizes[axis] = std::max(sizes[axis], shapes[i][k]);
    }
  }
  CheckHeadDim(sizes[kHeadDim], roles);
  CheckHeads(sizes);
  const int64_t page = roles[0].page_size;
  sizes[kPages] = std::max(sizes[kPages], (sizes[kCapacity] + page - 1) / page);
  return sizes;
}

Shape ShapeOf(const nvinfer1::Dims& dims) {
  return dims.nbDims > 0 ? Shape(dims.d, dims.d + dims.nbDims) : Shape();
}

Shape ShapeOf(const nvinfer1::DimsExprs& dims) {
  Shape out;
  for (int i = 0; i < dims.nbDims; ++i) {
    out.push_back(dims.d[i] && dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1);
  }
  return out;
}

const char* TypeName(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    default:
      return "another type";
  }
}

bool IsActivation(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

bool Fits(Type wanted, DataType type, DataType activation) {
  switch (wanted) {
    case Type::kActivation:
      return type == activation && IsActivation(type);
    case Type::kInt32:
      return type == DataType::kINT32;
    case Type::kFloat16:
      return type == DataType::kHALF;
    case Type::kFloat32:
      return type == DataType::kFLOAT;
  }
  return false;
}

size_t Bytes(const nvinfer1::PluginTensorDesc& tensor) {
  size_t bytes = tensor.type == DataType::kHALF || tensor.type == DataType::kBF16 ? 2 : 4;
  for (int i = 0; i < tensor.dims.nbDims; ++i) bytes *= static_cast<size_t>(tensor.dims.d[i]);
  return bytes;
}

}  // namespace hqmq::trt
