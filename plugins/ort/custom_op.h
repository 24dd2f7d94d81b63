// An OrtCustomOp from a C++ kernel: a class with kName, kProvider (null: the CPU's), kLeastOutputs,
// a constructor from NodeInfo and Compute(KernelContext*).
#pragma once

#include "calls.h"
#include "operators.h"

namespace hqmq::ort {

template <class Kernel>
struct Made {
  std::string title;
  Kernel kernel;
};

// ONNX Runtime allows one variadic parameter, and it must be the last: all inputs are one, all
// outputs another.
template <class Kernel>
CustomOp MakeOp(Status* (*infer)(const CustomOp*, ShapeInferContext*)) {
  CustomOp op = {};
  op.version = kCustomOpVersion;
  op.GetName = [](const CustomOp*) -> const char* { return Kernel::kName; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return Kernel::kProvider; };
  op.GetInputType = [](const CustomOp*, size_t) -> int { return kUndefined; };
  op.GetOutputType = op.GetInputType;
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetOutputTypeCount = op.GetInputTypeCount;
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return kVariadic; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const CustomOp*, size_t) -> int { return kDefaultMemory; };
  op.GetVariadicInputMinArity = [](const CustomOp*) -> int { return 1; };
  op.GetVariadicOutputMinArity = [](const CustomOp*) -> int { return Kernel::kLeastOutputs; };
  op.GetVariadicInputHomogeneity = [](const CustomOp*) -> int { return 0; };
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputHomogeneity;
  op.CreateKernelV2 = [](const CustomOp*, const Api*, const KernelInfo* info,
                         void** kernel) -> Status* {
    return Guard([&] {
      const NodeInfo node(Kernel::kName, info);
      Titled(node.Message(""), [&] { *kernel = new Made<Kernel>{node.Message(""), Kernel(node)}; });
    });
  };
  op.KernelComputeV2 = [](void* kernel, KernelContext* context) -> Status* {
    return Guard([&] {
      const auto* made = static_cast<const Made<Kernel>*>(kernel);
      Titled(made->title, [&] { made->kernel.Compute(context); });
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Made<Kernel>*>(kernel); };
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const CustomOp*) -> int { return 1; };
  op.GetEndVersion = [](const CustomOp*) -> int { return INT32_MAX; };
  return op;
}

}  // namespace hqmq::ort
