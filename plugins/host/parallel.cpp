#include "parallel.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace hqmq {
namespace {

int DefaultThreads() {
  if (const char* text = std::getenv("HQMQ_NUM_THREADS")) {
    const int count = std::atoi(text);
    if (count > 0) return std::min(count, 1024);
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

class Pool {
 public:
  explicit Pool(int count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this] { Work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void Run(int64_t n, void (*body)(void*, int64_t), void* ctx) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      n_ = n;
      body_ = body;
      ctx_ = ctx;
      next_ = 0;
      busy_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    Drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void Drain() {
    for (int64_t i; (i = next_.fetch_add(1)) < n_;) body_(ctx_, i);
  }

  void Work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      if (stop_) return;
      seen = generation_;
      lock.unlock();
      Drain();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stop_ = false;
  uint64_t generation_ = 0;
  int busy_ = 0;
  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  void (*body_)(void*, int64_t) = nullptr;
  void* ctx_ = nullptr;
};

std::atomic<int> wanted{0};
// One loop at a time. Leaked on purpose: joining threads while a process exits can hang.
std::mutex* const running = new std::mutex;
Pool* pool = nullptr;
pid_t pool_owner = 0;

}  // namespace

int NumThreads() {
  const int count = wanted;
  return count > 0 ? count : DefaultThreads();
}

void SetNumThreads(int count) { wanted = count; }

void OwnParallelFor(void*, int64_t n, void (*body)(void* ctx, int64_t i), void* ctx) {
  const int count = NumThreads();
  std::unique_lock<std::mutex> lock(*running, std::try_to_lock);
  if (count == 1 || !lock.owns_lock()) {
    for (int64_t i = 0; i < n; ++i) body(ctx, i);
    return;
  }
  if (pool_owner !=
      getpid()) {  // first use, or a forked child, which has none of its parent's threads
    pool = nullptr;
    pool_owner = getpid();
  }
  if (pool && pool->size() != count) {
    delete pool;
    pool = nullptr;
  }
  if (!pool) pool = new Pool(count);
  pool->Run(n, body, ctx);
}

}  // namespace hqmq
