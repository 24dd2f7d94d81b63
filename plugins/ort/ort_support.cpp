#include "ort_support.h"

namespace hqmq::ort {

Functions api;

namespace {

size_t ElementSize(int type) {
  switch (type) {
    case kFloat:
    case kInt32:
      return 4;
    case kFloat16:
    case kBfloat16:
      return 2;
    default:
      throw Error("element type " + TypeName(type) + " is not one this operator takes");
  }
}

class Info {
 public:
  explicit Info(const Value* value) { Check(api.GetTensorTypeAndShape(value, &info_)); }
  ~Info() { api.ReleaseTensorTypeAndShapeInfo(info_); }
  Info(const Info&) = delete;
  Info& operator=(const Info&) = delete;

  int type() const {
    int out = kUndefined;
    Check(api.GetTensorElementType(info_, &out));
    return out;
  }

  Dims dims() const {
    size_t count = 0;
    Check(api.GetDimensionsCount(info_, &count));
    Dims out(count);
    Check(api.GetDimensions(info_, out.data(), count));
    return out;
  }

 private:
  TensorInfo* info_ = nullptr;
};

}  // namespace

std::string Text(const Dims& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

std::string TypeName(int element_type) {
  switch (element_type) {
    case kFloat:
      return "float32";
    case kFloat16:
      return "float16";
    case kBfloat16:
      return "bfloat16";
    case kInt32:
      return "int32";
    default:
      return "ONNX type " + std::to_string(element_type);
  }
}

size_t Tensor::bytes() const {
  size_t count = ElementSize(type);
  for (const int64_t dim : dims) count *= static_cast<size_t>(dim);
  return count;
}

Tensor ReadTensor(const Value* value) {
  const Info info(value);
  Tensor out{info.type(), info.dims(), nullptr};
  Check(api.GetTensorMutableData(const_cast<Value*>(value), &out.data));
  return out;
}

Tensor Input(const KernelContext* context, size_t index) {
  const Value* value = nullptr;
  Check(api.KernelContext_GetInput(context, index, &value));
  if (value == nullptr) throw Error("input " + std::to_string(index) + " is missing");
  return ReadTensor(value);
}

Tensor Output(KernelContext* context, size_t index, int type, const Dims& dims) {
  Value* value = nullptr;
  Check(api.KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
  if (value == nullptr) throw Error("output " + std::to_string(index) + " is missing");
  Tensor out = ReadTensor(value);
  if (out.type != type) {
    throw Error("output " + std::to_string(index) + " is " + TypeName(out.type) + ", expected " +
                TypeName(type));
  }
  return out;
}

}  // namespace hqmq::ort
