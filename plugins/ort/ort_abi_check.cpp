// Compiled only with HQMQ_ORT_INCLUDE_DIR: ort_abi.h against the official header, at compile time.
#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace hqmq::ort {

#define X(index, name, result, arguments) \
  static_assert(offsetof(OrtApi, name) == (index) * sizeof(void*), "OrtApi index of " #name);
HQMQ_ORT_FUNCTIONS(X)
#undef X

#define HQMQ_SAME_OFFSET(field) \
  static_assert(offsetof(CustomOp, field) == offsetof(OrtCustomOp, field), "offset of " #field)
HQMQ_SAME_OFFSET(version);
HQMQ_SAME_OFFSET(CreateKernel);
HQMQ_SAME_OFFSET(GetName);
HQMQ_SAME_OFFSET(GetExecutionProviderType);
HQMQ_SAME_OFFSET(GetInputType);
HQMQ_SAME_OFFSET(GetInputTypeCount);
HQMQ_SAME_OFFSET(GetOutputType);
HQMQ_SAME_OFFSET(GetOutputTypeCount);
HQMQ_SAME_OFFSET(KernelCompute);
HQMQ_SAME_OFFSET(KernelDestroy);
HQMQ_SAME_OFFSET(GetInputCharacteristic);
HQMQ_SAME_OFFSET(GetOutputCharacteristic);
HQMQ_SAME_OFFSET(GetInputMemoryType);
HQMQ_SAME_OFFSET(GetVariadicInputMinArity);
HQMQ_SAME_OFFSET(GetVariadicInputHomogeneity);
HQMQ_SAME_OFFSET(GetVariadicOutputMinArity);
HQMQ_SAME_OFFSET(GetVariadicOutputHomogeneity);
HQMQ_SAME_OFFSET(CreateKernelV2);
HQMQ_SAME_OFFSET(KernelComputeV2);
HQMQ_SAME_OFFSET(InferOutputShapeFn);
HQMQ_SAME_OFFSET(GetStartVersion);
HQMQ_SAME_OFFSET(GetEndVersion);
#undef HQMQ_SAME_OFFSET

static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ApiBase, GetApi));
static_assert(ORT_API_VERSION >= kApiVersion && kApiVersion >= kCustomOpVersion);
static_assert(int{kFail} == int{ORT_FAIL} && int{kInvalidArgument} == int{ORT_INVALID_ARGUMENT});
static_assert(int{kRuntimeException} == int{ORT_RUNTIME_EXCEPTION} &&
              int{kInvalidGraph} == int{ORT_INVALID_GRAPH});
static_assert(int{kFloat} == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT});
static_assert(int{kInt32} == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32});
static_assert(int{kFloat16} == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16});
static_assert(int{kBfloat16} == int{ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16});
static_assert(int{kVariadic} == int{INPUT_OUTPUT_VARIADIC} &&
              int{kOptional} == int{INPUT_OUTPUT_OPTIONAL});
static_assert(int{kAttrInt} == int{ORT_OP_ATTR_INT} && int{kAttrFloat} == int{ORT_OP_ATTR_FLOAT});
static_assert(int{kDefaultMemory} == int{OrtMemTypeDefault});

}  // namespace hqmq::ort
