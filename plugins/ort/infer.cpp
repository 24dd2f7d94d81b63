// Types and shapes of the operators' outputs, so that models load without value_info.
#include "operators.h"
#include "ort_support.h"

namespace hqmq::ort {
namespace {

// One tensor's type and shape during inference, owned by the context: releasing it would free it
// twice. Dimensions: a size, or -1 and perhaps a name.
class Shape {
 public:
  Shape(const ShapeInferContext* context, size_t input) {
    Check(api.ShapeInferContext_GetInputTypeShape(context, input, &info_));
  }

  const TensorInfo* get() const { return info_; }

  void Dimensions(Dims* sizes, std::vector<const char*>* names) const {
    size_t count = 0;
    Check(api.GetDimensionsCount(info_, &count));
    sizes->resize(count);
    names->resize(count);
    Check(api.GetDimensions(info_, sizes->data(), count));
    Check(api.GetSymbolicDimensions(info_, names->data(), count));
  }

 private:
  TensorInfo* info_ = nullptr;  // belongs to the context
};

size_t Inputs(const ShapeInferContext* context) {
  size_t count = 0;
  Check(api.ShapeInferContext_GetInputCount(context, &count));
  return count;
}

// A missing or malformed attribute is for the kernel to report.
int64_t Attribute(const ShapeInferContext* context, const std::string& name) {
  const OpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t size = 0;
  if (!Works(api.ShapeInferContext_GetAttribute(context, name.c_str(), &attribute))) return 0;
  return Works(api.ReadOpAttr(attribute, kAttrInt, &value, sizeof(value), &size)) ? value : 0;
}

size_t CacheTensors(const ShapeInferContext* context, const std::string& prefix) {
  if (!Attribute(context, prefix + "storage")) return 2;
  return 3 + (Attribute(context, prefix + "page_mean") ? 1 : 0) +
         (Attribute(context, prefix + "outlier_capacity") > 0 ? 2 : 0);
}

void SameAsInput(const ShapeInferContext* context, size_t input, size_t output) {
  Check(api.ShapeInferContext_SetOutputTypeShape(context, output, Shape(context, input).get()));
}

size_t CodebookInputs(const ShapeInferContext* context, const std::string& prefix) {
  return Attribute(context, prefix + "storage") ? 2 : 0;
}

// Whether the node has the inputs its attributes ask for. If not, its outputs stay unknown: ONNX
// Runtime does not check the index of an output that is set, so nothing may be set on a guess.
bool Consistent(const ShapeInferContext* context, size_t expected) {
  return Inputs(context) == expected;
}

// The last `count` inputs are the cache; the outputs from first_output on are like them.
void CacheOutputs(const ShapeInferContext* context, size_t count, size_t first_output) {
  const size_t inputs = Inputs(context);
  for (size_t i = 0; i < count; ++i) SameAsInput(context, inputs - count + i, first_output + i);
}

}  // namespace

Status* InferQuantize(const CustomOp*, ShapeInferContext* context) {
  return Guard([&] {
    const size_t count = CacheTensors(context, "");
    if (!Consistent(context, 3 + CodebookInputs(context, "") + count)) return;
    CacheOutputs(context, count, 0);
  });
}

Status* InferAttention(const CustomOp*, ShapeInferContext* context) {
  return Guard([&] {
    const size_t count = CacheTensors(context, "k_") + CacheTensors(context, "v_");
    const size_t codebooks = CodebookInputs(context, "k_") + CodebookInputs(context, "v_");
    if (!Consistent(context, 5 + (Attribute(context, "has_sinks") ? 1 : 0) + codebooks + count))
      return;
    SameAsInput(context, 0, 0);
    CacheOutputs(context, count, 1);
  });
}

Status* InferDequantize(const CustomOp*, ShapeInferContext* context) {
  return Guard([&] {
    const size_t count = CacheTensors(context, ""), inputs = Inputs(context);
    if (!Consistent(context, 1 + CodebookInputs(context, "") + count)) return;
    Dims rows, sizes;
    std::vector<const char*> row_names, names;
    const Shape codes(context, inputs - count), tail(context, inputs - 1);
    codes.Dimensions(&rows, &row_names);
    tail.Dimensions(&sizes, &names);
    TensorInfo* out = nullptr;
    Check(api.CreateTensorTypeAndShapeInfo(&out));
    Status* status = api.SetTensorElementType(out, kFloat);
    if (!status && rows.size() == 4 && sizes.size() == 4) {
      sizes[2] = rows[2];
      names[2] = row_names[2];
      status = api.SetDimensions(out, sizes.data(), 4);
      if (!status) status = api.SetSymbolicDimensions(out, names.data(), 4);
    }
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, out);
    api.ReleaseTensorTypeAndShapeInfo(out);
    Check(status);
  });
}

}  // namespace hqmq::ort
