// The part of ONNX Runtime's C ABI this library uses. ONNX Runtime's wheels ship no headers, and
// the ABI is append-only: function i of the OrtApi table stays function i. ort_abi_check.cpp
// compares every index and offset with the official onnxruntime_c_api.h when CMake is given
// HQMQ_ORT_INCLUDE_DIR.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hqmq::ort {

// The oldest API version that has every function below (GetScratchBuffer came with 1.18).
constexpr uint32_t kApiVersion = 18;
// Of struct CustomOp below.
constexpr uint32_t kCustomOpVersion = 17;

struct Api;  // OrtApi: a table of function pointers
struct Status;
struct Value;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct OpAttr;
struct Allocator;
struct MemoryInfo;

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kInvalidGraph = 10 };
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kInt32 = 6,
  kFloat16 = 10,
  kBfloat16 = 16,
};
enum Characteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum OpAttrType : int { kAttrInt = 1, kAttrFloat = 3 };
enum MemoryType : int { kDefaultMemory = 0 };  // of the node's execution provider

// Index in the OrtApi table, name, result, arguments.
#define HQMQ_ORT_FUNCTIONS(X)                                                                      \
  X(0, CreateStatus, Status*, (int code, const char* message))                                     \
  X(2, GetErrorMessage, const char*, (const Status*))                                              \
  X(26, CreateCustomOpDomain, Status*, (const char* domain, CustomOpDomain** out))                 \
  X(27, CustomOpDomain_Add, Status*, (CustomOpDomain*, const struct CustomOp*))                    \
  X(28, AddCustomOpDomain, Status*, (SessionOptions*, CustomOpDomain*))                            \
  X(51, GetTensorMutableData, Status*, (Value*, void** out))                                       \
  X(57, CreateTensorTypeAndShapeInfo, Status*, (TensorInfo * *out))                                \
  X(58, SetTensorElementType, Status*, (TensorInfo*, int type))                                    \
  X(59, SetDimensions, Status*, (TensorInfo*, const int64_t* dims, size_t count))                  \
  X(60, GetTensorElementType, Status*, (const TensorInfo*, int* out))                              \
  X(61, GetDimensionsCount, Status*, (const TensorInfo*, size_t* out))                             \
  X(62, GetDimensions, Status*, (const TensorInfo*, int64_t* dims, size_t count))                  \
  X(63, GetSymbolicDimensions, Status*, (const TensorInfo*, const char** names, size_t count))     \
  X(65, GetTensorTypeAndShape, Status*, (const Value*, TensorInfo** out))                          \
  X(75, AllocatorAlloc, Status*, (Allocator*, size_t bytes, void** out))                           \
  X(76, AllocatorFree, Status*, (Allocator*, void* memory))                                        \
  X(77, AllocatorGetInfo, Status*, (const Allocator*, const MemoryInfo** out))                     \
  X(85, KernelInfoGetAttribute_float, Status*, (const KernelInfo*, const char* name, float* out))  \
  X(86, KernelInfoGetAttribute_int64, Status*,                                                     \
    (const KernelInfo*, const char* name, int64_t* out))                                           \
  X(88, KernelContext_GetInputCount, Status*, (const KernelContext*, size_t* out))                 \
  X(89, KernelContext_GetOutputCount, Status*, (const KernelContext*, size_t* out))                \
  X(90, KernelContext_GetInput, Status*, (const KernelContext*, size_t index, const Value** out))  \
  X(91, KernelContext_GetOutput, Status*,                                                          \
    (KernelContext*, size_t index, const int64_t* dims, size_t count, Value** out))                \
  X(93, ReleaseStatus, void, (Status*))                                                            \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (TensorInfo*))                                        \
  X(101, ReleaseCustomOpDomain, void, (CustomOpDomain*))                                           \
  X(132, ReleaseAllocator, void, (Allocator*))                                                     \
  X(193, KernelContext_GetGPUComputeStream, Status*, (const KernelContext*, void** out))           \
  X(230, KernelInfo_GetInputCount, Status*, (const KernelInfo*, size_t* out))                      \
  X(231, KernelInfo_GetOutputCount, Status*, (const KernelInfo*, size_t* out))                     \
  X(244, KernelInfo_GetNodeName, Status*, (const KernelInfo*, char* out, size_t* size))            \
  X(249, KernelInfoGetConstantInput_tensor, Status*,                                               \
    (const KernelInfo*, size_t index, int* is_constant, const Value** out))                        \
  X(267, ShapeInferContext_GetInputCount, Status*, (const ShapeInferContext*, size_t* out))        \
  X(268, ShapeInferContext_GetInputTypeShape, Status*,                                             \
    (const ShapeInferContext*, size_t index, TensorInfo** out))                                    \
  X(269, ShapeInferContext_GetAttribute, Status*,                                                  \
    (const ShapeInferContext*, const char* name, const OpAttr** out))                              \
  X(270, ShapeInferContext_SetOutputTypeShape, Status*,                                            \
    (const ShapeInferContext*, size_t index, const TensorInfo*))                                   \
  X(271, SetSymbolicDimensions, Status*, (TensorInfo*, const char** names, size_t count))          \
  X(272, ReadOpAttr, Status*, (const OpAttr*, int type, void* data, size_t size, size_t* out))     \
  X(274, KernelContext_ParallelFor, Status*,                                                       \
    (const KernelContext*, void (*fn)(void*, size_t), size_t total, size_t num_batch, void* user)) \
  X(277, KernelContext_GetScratchBuffer, Status*,                                                  \
    (const KernelContext*, const MemoryInfo*, size_t bytes, void** out))                           \
  X(278, KernelInfoGetAllocator, Status*, (const KernelInfo*, int memory_type, Allocator** out))

// The functions above, read from an OrtApi table.
struct Functions {
#define X(index, name, result, arguments) result(*name) arguments = nullptr;
  HQMQ_ORT_FUNCTIONS(X)
#undef X
  void load(const Api* api) {
    void* const* table = reinterpret_cast<void* const*>(api);
#define X(index, name, result, arguments) \
  name = reinterpret_cast<result(*) arguments>(table[index]);
    HQMQ_ORT_FUNCTIONS(X)
#undef X
  }
};

// OrtCustomOp of API version 17. Later versions append callbacks, which ONNX Runtime reads only
// from an operator whose `version` has them.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace hqmq::ort
