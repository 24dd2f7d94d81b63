// What libhqmq_trt.so exports. Load it with IPluginRegistry::loadLibrary, which calls the first
// two.
#pragma once

#include <NvInferRuntime.h>

#include "hqmq_host.h"

extern "C" {
HQMQ_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept;
HQMQ_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Of the cache's format, of this library, and of the TensorRT headers it was compiled with.
HQMQ_API int32_t hqmq_trt_format_version(void) noexcept;
HQMQ_API const char* hqmq_trt_version(void) noexcept;
HQMQ_API const char* hqmq_trt_tensorrt_headers(void) noexcept;
}
