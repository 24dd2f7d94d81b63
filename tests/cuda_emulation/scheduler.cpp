// Threads of a block as fibers, and what they meet at.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class State { kReady, kMeets, kSyncs, kSleeps, kDone };

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  char* stack = nullptr;
  bool begun = false;  // it is in Run's loop
  State state = State::kDone;
  int meetings = 0;
  // Where and why it waits.
  Site site{};
  int kind = 0;
  const std::function<bool()>* awaited = nullptr;
  const char* what = nullptr;
};

struct WarpMeeting {
  char slots[2][kWarp * kSlot];
  int arrived = 0;
  int absent = 0;  // lanes that have ended or are at __syncthreads
  int first = 0;   // thread that arrived first
};

struct BlockMeeting {
  int arrived = 0;
  int generation = 0;
  bool any[2], all[2];
};

struct NamedMeeting {
  int count = 0, arrived = 0, generation = 0;
};

std::array<Fiber, kMostThreads> fibers;
std::array<WarpMeeting, kMostThreads / kWarp> warps;
BlockMeeting syncs;
std::array<NamedMeeting, 16> named;
jmp_buf scheduler;
ucontext_t scheduler_start;
int current = -1;  // thread that runs; -1: the scheduler
int threads = 0, live = 0;
std::string failure;
const std::function<void()>* body = nullptr;
// Threads that can go on, by warp; a favoured warp runs far ahead of the others now and then.
std::array<std::vector<int>, kMostThreads / kWarp> ready;
std::vector<int> sleepers;
int ready_count = 0, favourite = 0;
bool late_copies = false;  // bulk copies come when no thread can go on, not at any time
std::mt19937 random_numbers;

const char* NameOf(Meeting meeting) {
  static const char* const kNames[] = {"__syncwarp", "a shuffle", "a vote",   "a reduction",
                                       "an MMA",     "movmatrix", "ldmatrix", "elect"};
  return kNames[static_cast<int>(meeting)];
}

std::string At(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string Describe(const Fiber& fiber) {
  switch (fiber.state) {
    case State::kMeets:
      return std::string("at ") + NameOf(static_cast<Meeting>(fiber.kind)) + ", " + At(fiber.site);
    case State::kSyncs:
      return "at __syncthreads, " + At(fiber.site);
    case State::kSleeps:
      return std::string("waiting for ") + fiber.what + ", " + At(fiber.site);
    case State::kDone:
      return "at its end";
    default:
      return "running";
  }
}

void MakeReady(int thread) {
  fibers[thread].state = State::kReady;
  ready[thread / kWarp].push_back(thread);
  ++ready_count;
}

int TakeReady() {
  const int count = threads / kWarp;
  if (Chance(40)) favourite = static_cast<int>(RandomBelow(count));
  int warp =
      ready[favourite].empty() || Chance(8) ? static_cast<int>(RandomBelow(count)) : favourite;
  while (ready[warp].empty()) warp = (warp + 1) % count;
  std::vector<int>& list = ready[warp];
  std::swap(list[RandomBelow(static_cast<uint32_t>(list.size()))], list.back());
  const int thread = list.back();
  list.pop_back();
  --ready_count;
  return thread;
}

// From a fiber to the scheduler, which goes on with another.
void Leave(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  if (state == State::kSyncs || state == State::kDone) ++warps[current / kWarp].absent;
  if (_setjmp(fiber.context) == 0) _longjmp(scheduler, 1);
}

void RunThread() {
  try {
    (*body)();
  } catch (const Failure& error) {
    if (failure.empty()) failure = error.what();
  }
}

// A fiber runs one thread of each block.
void Loop() {
  for (;;) {
    RunThread();
    Leave(State::kDone);
  }
}

void Begin(int thread) {
  Fiber& fiber = fibers[thread];
  if (!fiber.stack) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(memory) + page;
    if (mprotect(fiber.stack, kStackBytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  }
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, Loop, 0);
}

// Runs a thread until it waits or ends. Jumps, as swapcontext calls the kernel each time.
void Resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread), 0, 0);
  if (_setjmp(scheduler) == 0) {
    if (fiber.begun) _longjmp(fiber.context, 1);
    fiber.begun = true;
    swapcontext(&scheduler_start, &fiber.start);
  }
  current = -1;
}

// A thread that touched memory which is not there.
void OnSignal(int, siginfo_t* info, void*) {
  if (current < 0) {
    signal(SIGSEGV, SIG_DFL);
    return;  // and it comes again
  }
  failure = SharedFault(info->si_addr);
  _longjmp(scheduler, 1);
}

struct SignalGuard {
  SignalGuard() {
    static char stack[1 << 16];
    stack_t mine = {};
    mine.ss_sp = stack;
    mine.ss_size = sizeof(stack);
    struct sigaction action = {};
    action.sa_sigaction = OnSignal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&mine, &old_stack);
    sigaction(SIGSEGV, &action, &old_action);
  }
  ~SignalGuard() {
    sigaction(SIGSEGV, &old_action, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
  stack_t old_stack;
  struct sigaction old_action;
};

// The thread that runs is at a meeting that another one of its warp does not come to.
[[noreturn]] void Diverged(int other) {
  const Fiber& fiber = fibers[current];
  Fail(std::string("its warp diverges: it is at ") + NameOf(static_cast<Meeting>(fiber.kind)) +
       ", " + At(fiber.site) + ", and thread " + std::to_string(other) + " " +
       Describe(fibers[other]));
}

std::string Deadlock() {
  std::map<std::string, std::vector<int>> places;
  for (int i = 0; i < threads; ++i) places[Describe(fibers[i])].push_back(i);
  std::string text = "no thread can go on:";
  for (const auto& [place, who] : places) {
    text += " " + std::to_string(who.size()) + " (thread " + std::to_string(who[0]) +
            (who.size() > 1 ? " …) " : ") ") + place + ";";
  }
  text.pop_back();
  return text;
}

std::string RunBlock(uint32_t shared) {
  BeginShared(shared);
  failure.clear();
  sleepers.clear();
  ready_count = 0;
  for (auto& list : ready) list.clear();
  for (auto& warp : warps) warp.arrived = warp.absent = 0;
  syncs = {};
  named = {};
  syncs.all[0] = syncs.all[1] = true;
  live = threads;
  for (int i = 0; i < threads; ++i) {
    fibers[i].meetings = 0;
    ForgetCopies(i);
    if (!fibers[i].begun) Begin(i);
    MakeReady(i);
  }
  while (live > 0 && failure.empty()) {
    if (!late_copies && Chance(16)) DeliverBulkCopy();
    while (ready_count == 0 && DeliverBulkCopy()) {
    }
    if (ready_count == 0) {
      failure = Deadlock();
      break;
    }
    const int thread = TakeReady();
    Resume(thread);
    if (fibers[thread].state == State::kDone) --live;
  }
  if (failure.empty()) {
    while (DeliverBulkCopy()) {
    }
    failure = EndShared();
  }
  if (failure.empty()) return {};
  // What other threads have on their stacks is given up: nothing there owns anything.
  for (int i = 0; i < threads; ++i) fibers[i].begun = false;
  return failure + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
         ")";
}

}  // namespace

void Fail(const std::string& text) {
  throw Failure("thread " + std::to_string(current) + ": " + text);
}
void Fail(const std::string& text, Site site) { Fail(text + ", " + At(site)); }

uint32_t RandomBelow(uint32_t n) { return n < 2 ? 0 : random_numbers() % n; }
bool Chance(int n) { return RandomBelow(static_cast<uint32_t>(n)) == 0; }

int Thread() { return current; }
int Meetings() { return fibers[current].meetings; }

const char* Meet(Meeting meeting, const void* mine, size_t bytes, Site site) {
  const unsigned number = static_cast<unsigned>(current) / kWarp;
  const int me = current, first = static_cast<int>(number) * kWarp;
  Fiber& fiber = fibers[me];
  WarpMeeting& warp = warps[number];
  char* slots = warp.slots[fiber.meetings++ & 1];
  if (bytes) memcpy(slots + (me - first) * kSlot, mine, bytes);
  fiber.site = site;
  fiber.kind = static_cast<int>(meeting);
  const Fiber& earliest = fibers[warp.first];
  if (warp.arrived == 0) {
    warp.first = me;
  } else if (earliest.kind != fiber.kind || earliest.site.line != site.line) {
    Diverged(warp.first);
  }
  for (int i = first; warp.absent && i < first + kWarp; ++i)
    if (fibers[i].state == State::kDone || fibers[i].state == State::kSyncs) Diverged(i);
  if (++warp.arrived < kWarp) {
    Leave(State::kMeets);
    return slots;
  }
  warp.arrived = 0;
  for (int i = first; i < first + kWarp; ++i)
    if (i != me) MakeReady(i);
  if (Chance(2)) {
    MakeReady(me);
    Leave(State::kReady);
  }
  return slots;
}

bool Syncthreads(Sync kind, bool mine, Site site) {
  const int side = syncs.generation & 1;
  syncs.any[side] = syncs.any[side] || mine;
  syncs.all[side] = syncs.all[side] && mine;
  Fiber& fiber = fibers[current];
  fiber.site = site;
  fiber.kind = static_cast<int>(kind);
  if (++syncs.arrived < threads) {
    Leave(State::kSyncs);
  } else {
    for (int i = 0; i < threads; ++i) {
      const Fiber& other = fibers[i];
      if (other.kind == fiber.kind && other.site.line == site.line) continue;
      Fail("it is at __syncthreads, " + At(site) + ", and thread " + std::to_string(i) +
           " at another, " + At(other.site));
    }
    ++syncs.generation;
    syncs.arrived = 0;
    syncs.any[side ^ 1] = false;
    syncs.all[side ^ 1] = true;
    for (WarpMeeting& warp : warps) warp.absent = 0;
    for (int i = 0; i < threads; ++i)
      if (i != current) MakeReady(i);
  }
  return kind == Sync::kOr ? syncs.any[side] : syncs.all[side];
}

void SleepUntil(const std::function<bool()>& done, const char* what, Site site) {
  while (!done()) {
    Fiber& fiber = fibers[current];
    fiber.site = site;
    fiber.what = what;
    sleepers.push_back(current);
    Leave(State::kSleeps);
  }
}

void NamedBarrier(int id, int count, Site site) {
  NamedMeeting& meeting = named.at(id);
  if (meeting.arrived == 0) meeting.count = count;
  if (count % kWarp || meeting.count != count)
    Fail("threads name other numbers of threads at a barrier", site);
  const int generation = meeting.generation;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
    WakeSleepers();
  } else {
    SleepUntil([&] { return meeting.generation != generation; }, "a barrier of some threads", site);
  }
}

void WakeSleepers() {
  for (const int thread : sleepers) MakeReady(thread);
  sleepers.clear();
}

std::string RunGrid(uint32_t grid_x, uint32_t grid_y, uint32_t block, uint32_t shared,
                    const std::function<void()>& kernel) {
  if (current >= 0) return "a launch within a kernel";
  const SignalGuard guard;
  random_numbers.seed(static_cast<uint32_t>(CurrentGpu().seed++));
  late_copies = Chance(2);
  body = &kernel;
  threads = static_cast<int>(block);
  blockDim = dim3(block);
  gridDim = dim3(grid_x, grid_y);
  std::vector<uint64_t> order(uint64_t{grid_x} * grid_y);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (const uint64_t index : order) {
    blockIdx = dim3(static_cast<unsigned>(index % grid_x), static_cast<unsigned>(index / grid_x));
    blockIdx.z = 0;
    if (std::string text = RunBlock(shared); !text.empty()) return text;
  }
  return {};
}

}  // namespace emulation
