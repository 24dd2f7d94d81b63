#include "cuda_library.h"

#include <dlfcn.h>

#include "codec/params.h"

namespace hqmq::ort {
namespace {

constexpr const char* kBuild =
    "build and install it there with the CMake preset cuda-release, or use CPUExecutionProvider";

// Path of libhqmq_cuda.so in the folder of this library.
std::string CudaLibraryPath() {
  Dl_info info = {};
  const std::string own = dladdr(reinterpret_cast<void*>(&LoadCudaLibrary), &info) && info.dli_fname
                              ? info.dli_fname
                              : "";
  const size_t slash = own.rfind('/');
  return (slash == std::string::npos ? "" : own.substr(0, slash + 1)) + "libhqmq_cuda.so";
}

CudaLibrary Load() {
  const std::string path = CudaLibraryPath();
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* const why = dlerror();  // names the path
    throw Error("CUDAExecutionProvider needs libhqmq_cuda.so: " +
                    std::string(why ? why : path + " cannot be loaded") + "; " + kBuild,
                kFail);
  }
  const auto mismatch = [&](const std::string& what) {
    dlclose(handle);
    return Error("CUDAExecutionProvider cannot use " + path + ": " + what + "; " + kBuild, kFail);
  };
  CudaLibrary out;
#define X(name)                                                          \
  out.name = reinterpret_cast<decltype(out.name)>(dlsym(handle, #name)); \
  if (out.name == nullptr) throw mismatch("it has no function " + std::string(#name));
  HQMQ_CUDA_FUNCTIONS(X)
#undef X
  if (const int32_t found = out.hqmq_cuda_format_version(); found != HQMQ_FORMAT_VERSION) {
    throw mismatch("it is made for cache format version " + std::to_string(found) + ", not " +
                   std::to_string(HQMQ_FORMAT_VERSION));
  }
  if (const std::string found = out.hqmq_cuda_version(); found != HQMQ_VERSION) {
    throw mismatch("its version is " + found + ", not " HQMQ_VERSION);
  }
  if (out.hqmq_cuda_role_params_size() != sizeof(RoleParams) ||
      out.hqmq_cuda_role_cache_size() != sizeof(RoleCache)) {
    throw mismatch("its structs have other sizes");
  }
  return out;
}

}  // namespace

const CudaLibrary& LoadCudaLibrary() {
  static const CudaLibrary library = Load();  // tried again if it threw
  return library;
}

}  // namespace hqmq::ort
