#include "log.h"

#include <atomic>
#include <cstdio>

namespace hqmq::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};

}  // namespace

void UseLoggerFinder(nvinfer1::ILoggerFinder* to) noexcept { finder = to; }

void Log(Severity severity, const std::string& text) noexcept {
  try {
    nvinfer1::ILoggerFinder* const from = finder;
    nvinfer1::ILogger* const logger = from ? from->findLogger() : nullptr;
    if (logger) {
      logger->log(severity == Severity::kError ? nvinfer1::ILogger::Severity::kERROR
                                               : nvinfer1::ILogger::Severity::kWARNING,
                  text.c_str());
      return;
    }
  } catch (...) {  // a logger that fails: stderr is left
  }
  std::fprintf(stderr, "%s: %s\n", severity == Severity::kError ? "error" : "warning",
               text.c_str());
}

}  // namespace hqmq::trt
