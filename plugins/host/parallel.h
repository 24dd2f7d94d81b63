// Parallel loops on a caller's threads or on the library's own.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

#include "hqmq_host.h"

namespace hqmq {

int NumThreads();
void SetNumThreads(int count);  // 0: HQMQ_NUM_THREADS, or the processors this process may use

// hqmq_parallel_for on the library's own threads; pool is not used. Loops that start while another
// runs are serial.
void OwnParallelFor(void* pool, int64_t n, void (*body)(void* ctx, int64_t i), void* ctx);

// Where loops run: a caller's threads, or our own if `run` is null.
struct Threads {
  hqmq_parallel_for run = nullptr;
  void* pool = nullptr;

  // function(i) for i in 0…n-1; rethrows the first exception.
  template <class Function>
  void For(int64_t n, const Function& function) const {
    struct Context {
      const Function* function;
      std::atomic<bool> failed{false};
      std::exception_ptr error;
    };
    Context context{&function, {}, {}};
    auto body = [](void* ctx, int64_t i) {
      auto* context = static_cast<Context*>(ctx);
      try {
        (*context->function)(i);
      } catch (...) {
        if (!context->failed.exchange(true)) context->error = std::current_exception();
      }
    };
    if (n == 1) {
      body(&context, 0);
    } else if (n > 1) {
      (run ? run : OwnParallelFor)(pool, n, body, &context);
    }
    if (context.error) std::rethrow_exception(context.error);
  }
};

}  // namespace hqmq
