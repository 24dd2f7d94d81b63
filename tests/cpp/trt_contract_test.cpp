// Checks libhqmq_trt.so against the operators' contract without TensorRT's libraries and without a
// GPU:  trt_contract_test LIBRARY CASES VERSION
// TensorRT's side is played by this program; without a GPU, enqueue is checked too.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "contract_table.h"
#include "trt_contract_cases.h"

namespace hqmq::test {
namespace {

using namespace nvinfer1;

template <class Function>
Function* Find(void* library, const char* name) {
  void* const found = dlsym(library, name);
  if (!found) throw std::runtime_error(std::string(name) + " is not exported");
  return reinterpret_cast<Function*>(found);
}

std::vector<IPluginCreatorV3One*> Creators(void* library, Report* report) {
  const auto get = Find<IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators");
  int32_t count = -1, again = -1;
  IPluginCreatorInterface* const* const list = get(count);
  const contract::Operator* const ops[] = {&contract::kQuantize, &contract::kDequantize,
                                           &contract::kAttention};
  report->Check(count == 3 && get(again) == list && again == 3, "three creators, always the same");
  std::vector<IPluginCreatorV3One*> creators;
  for (int32_t i = 0; i < 3 && i < count; ++i) {
    report->Check(!strcmp(list[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE"),
                  std::string("kind of creator ") + list[i]->getInterfaceInfo().kind);
    auto* const creator = static_cast<IPluginCreatorV3One*>(list[i]);
    report->Check(!strcmp(creator->getPluginName(), ops[i]->name) &&
                      !strcmp(creator->getPluginVersion(), contract::kPluginVersion) &&
                      !strcmp(creator->getPluginNamespace(), contract::kDomain),
                  std::string("names of creator ") + ops[i]->name);
    const PluginFieldCollection* const fields = creator->getFieldNames();
    bool same = fields && fields->nbFields == ops[i]->num_attributes;
    for (int k = 0; same && k < fields->nbFields; ++k) {
      const auto type = ops[i]->attributes[k].kind == contract::Kind::kInt
                            ? PluginFieldType::kINT32
                            : PluginFieldType::kFLOAT32;
      same = !strcmp(fields->fields[k].name, ops[i]->attributes[k].name) &&
             fields->fields[k].type == type && fields->fields[k].length == 1;
    }
    report->Check(same, std::string("field names of ") + ops[i]->name);
    creators.push_back(creator);
  }
  return creators;
}

void TestLibrary(void* library, const char* version, Report* report) {
  report->Check(Find<int32_t()>(library, "hqmq_trt_format_version")() == HQMQ_FORMAT_VERSION,
                "format version");
  report->Check(!strcmp(Find<const char*()>(library, "hqmq_trt_version")(), version), "version");
  report->Check(strchr(Find<const char*()>(library, "hqmq_trt_tensorrt_headers")(), '.') != nullptr,
                "version of TensorRT's headers");
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    report->Check(line.find("libnvinfer") == std::string::npos, "it loads TensorRT: " + line);
}

int Main(const char* path, const char* case_file, const char* version) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  Report report;
  report.At("library");
  TestLibrary(library, version, &report);
  static Log log;
  const auto use_log = Find<void(ILoggerFinder*)>(library, "setLoggerFinder");
  use_log(&log);
  const std::vector<IPluginCreatorV3One*> creators = Creators(library, &report);
  for (const Case& node : ReadCases(case_file)) {
    Context context = {nullptr, &report, &log};
    for (IPluginCreatorV3One* creator : creators) {
      if (node.op == creator->getPluginName()) context.creator = creator;
    }
    if (!context.creator) throw std::runtime_error("no creator " + node.op);
    for (const DataType activation : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
      report.At(node.name + " " + node.op + " " + std::to_string(static_cast<int>(activation)));
      TestPlugin(context, node, activation);
    }
    TestAttributeErrors(context, node);
    log.Clear();
  }
  use_log(nullptr);  // then stderr: an error must not crash it
  report.At("library");
  report.Check(!creators[0]->createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD), "no fields");
  std::printf("%d checks, %d failed\n", report.checks(), report.failures());
  return report.failures() ? 1 : 0;
}

}  // namespace
}  // namespace hqmq::test

int main(int argc, char** argv) {
  if (argc != 4) return std::puts("usage: trt_contract_test LIBRARY CASES VERSION"), 2;
  try {
    return hqmq::test::Main(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 2;
  }
}
