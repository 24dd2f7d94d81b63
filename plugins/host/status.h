// Error codes with a one-line text, as the C interface reports them.
#pragma once

#include <string>
#include <utility>

#include "hqmq_host.h"

namespace hqmq {

struct Status {
  int code = HQMQ_OK;
  std::string text;

  bool ok() const { return code == HQMQ_OK; }
};

inline Status Invalid(std::string text) { return {HQMQ_INVALID, std::move(text)}; }

// Makes `status` what hqmq_last_error() tells this thread; returns its code.
int Report(const Status& status);

// Runs a function that returns Status and reports it; exceptions become HQMQ_INTERNAL.
template <class Function>
int Guard(Function function) {
  try {
    return Report(function());
  } catch (const std::exception& error) {
    return Report({HQMQ_INTERNAL, error.what()});
  } catch (...) {
    return Report({HQMQ_INTERNAL, "unknown failure"});
  }
}

}  // namespace hqmq
