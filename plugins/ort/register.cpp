// The entry points of libhqmq_ort.
#include "cuda_library.h"
#include "operators.h"
#include "ort_support.h"

#define HQMQ_EXPORT extern "C" __attribute__((visibility("default")))

using namespace hqmq::ort;

// Called by SessionOptions.register_custom_ops_library.
HQMQ_EXPORT Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  const Api* table = base->GetApi(kApiVersion);
  if (table == nullptr) {  // the oldest table has CreateStatus, its first function
    const Api* oldest = base->GetApi(1);
    const auto create = *reinterpret_cast<decltype(api.CreateStatus) const*>(oldest);
    const std::string version = base->GetVersionString();
    return create(kFail,
                  ("libhqmq_ort needs ONNX Runtime 1.18 or newer, this is " + version).c_str());
  }
  api.load(table);
  return Guard([&] {
    // ONNX Runtime keeps pointers to the domain in every session: one, for the life of the process.
    static CustomOpDomain* const domain = [] {
      CustomOpDomain* out = nullptr;
      Check(api.CreateCustomOpDomain("com.hqmq", &out));
      for (const CustomOp* op : {QuantizeOp(), DequantizeOp(), AttentionOp(), CudaQuantizeOp(),
                                 CudaDequantizeOp(), CudaAttentionOp()}) {
        Check(api.CustomOpDomain_Add(out, op));
      }
      return out;
    }();
    Check(api.AddCustomOpDomain(options, domain));
  });
}

HQMQ_EXPORT int32_t hqmq_ort_format_version() { return HQMQ_FORMAT_VERSION; }
HQMQ_EXPORT const char* hqmq_ort_version() { return HQMQ_VERSION; }

// Why nodes cannot run on the CUDA execution provider, or null if the CUDA library is there and
// fits. The text stays until the thread's next call.
HQMQ_EXPORT const char* hqmq_ort_cuda_problem() {
  static thread_local std::string text;
  try {
    LoadCudaLibrary();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}
