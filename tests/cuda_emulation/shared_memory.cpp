// A block's dynamic shared memory: its bounds, and what is under way into it.
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <deque>
#include <vector>

#include "emulation.h"

namespace emulation {
namespace {

constexpr uint32_t kMostShared = 228 * 1024;
constexpr uint32_t kGranule = 4;  // bytes that have one state
constexpr uint8_t kPending = 1;   // a copy is under way
constexpr uint8_t kUnfenced = 2;  // stored, and not fenced for bulk copies

// [nothing] [kMostShared and a page] [nothing]: a block's bytes end where nothing begins, so that
// loads and stores behind them by pointers fault. Stores a little before them change kUnused.
constexpr char kUnused = 0x5A;
constexpr ptrdiff_t kUnusedBytes = 4096;
char* mapped = nullptr;
size_t mapped_bytes = 0, page_bytes = 0;
char* memory = nullptr;  // of the block
char* unused = nullptr;
uint32_t memory_bytes = 0;
std::vector<uint8_t> states;

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, barrier;
};
// What a thread has begun, in groups that it ends and waits for.
template <class T>
class Groups {
 public:
  void Add(const T& x) { open_.push_back(x); }
  void Commit() {
    ended_.push_back(std::move(open_));
    open_.clear();
  }
  // Finishes all but the last `most` groups.
  template <class Finish>
  void Wait(int most, const Finish& finish) {
    while (ended_.size() > static_cast<size_t>(most)) {
      for (const T& x : ended_.front()) finish(x);
      ended_.pop_front();
    }
  }

 private:
  std::deque<std::vector<T>> ended_;
  std::vector<T> open_;
};
using Product = std::function<void()>;
struct UnderWay {
  Groups<Copy> copies;
  Groups<Product> products;
  std::vector<std::pair<uint32_t, uint32_t>> unfenced;  // addresses and bytes of its stores
};
std::array<UnderWay, kMostThreads> under_way;
std::vector<Copy> bulk;

// In 8 bytes of shared memory.
struct Barrier {
  uint16_t count, missing;  // threads that arrive in a phase, and those that have not
  int32_t state;            // 2 * bytes that have not come + parity of the phase
};

void Map() {
  page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t inner = (kMostShared + 2 * page_bytes - 1) / page_bytes * page_bytes;
  mapped_bytes = inner + 2 * page_bytes;
  void* at =
      mmap(nullptr, mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  mapped = static_cast<char*>(at);
  if (mprotect(mapped + page_bytes, inner, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
}

char* Begin() { return mapped + page_bytes; }
char* End() { return mapped + mapped_bytes - page_bytes; }

std::string Range(uint32_t address, uint32_t bytes) {
  return std::to_string(bytes) + " bytes at " +
         std::to_string(static_cast<int64_t>(address) - kSharedStart) + " of " +
         std::to_string(memory_bytes) + " bytes of shared memory";
}

// Where the bytes lie, if they are the block's.
char* Inside(uint32_t address, uint32_t bytes, uint32_t alignment, Site site) {
  const uint64_t end = uint64_t{address} + bytes;
  if (address < kSharedStart || end > uint64_t{kSharedStart} + memory_bytes)
    Fail("it reaches beyond the block: " + Range(address, bytes), site);
  if (address % alignment) Fail("it is not aligned: " + Range(address, bytes), site);
  return memory + (address - kSharedStart);
}

template <class F>
void EachState(uint32_t address, uint32_t bytes, F f) {
  for (uint32_t i = (address - kSharedStart) / kGranule;
       i <= (address + bytes - 1 - kSharedStart) / kGranule; ++i)
    f(states[i]);
}

void CheckSettled(uint32_t address, uint32_t bytes, const char* what, Site site) {
  EachState(address, bytes, [&](uint8_t state) {
    if (state & kPending)
      Fail(std::string(what) + " where a copy has not been waited for: " + Range(address, bytes),
           site);
  });
}

// What comes later is no value that a kernel could use.
void Announce(const Copy& copy, char* to) {
  memset(to, 0xFF, copy.bytes);
  EachState(copy.to, copy.bytes, [](uint8_t& state) { state |= kPending; });
}

void Deliver(const Copy& copy) {
  memcpy(memory + (copy.to - kSharedStart), copy.from, copy.bytes);
  EachState(copy.to, copy.bytes, [](uint8_t& state) { state &= static_cast<uint8_t>(~kPending); });
}

void MarkUnfenced(uint32_t address, uint32_t bytes) {
  EachState(address, bytes, [](uint8_t& state) { state |= kUnfenced; });
  under_way[Thread()].unfenced.emplace_back(address, bytes);
}

Barrier* BarrierAt(uint32_t address, Site site) {
  return reinterpret_cast<Barrier*>(Inside(address, sizeof(Barrier), sizeof(Barrier), site));
}

void EndPhase(Barrier* barrier) {
  if (barrier->missing || barrier->state >> 1) return;
  barrier->missing = barrier->count;
  barrier->state ^= 1;
  WakeSleepers();
}

}  // namespace

char* DynamicShared() { return memory; }

uint32_t AddressOf(const void* pointer, Site site) {
  const char* at = static_cast<const char*>(pointer);
  if (at < memory || at > memory + memory_bytes)
    Fail("the address of what is not the block's dynamic shared memory", site);
  return static_cast<uint32_t>(at - memory) + kSharedStart;
}

void Load(uint32_t address, void* to, uint32_t bytes, Site site) {
  const char* from = Inside(address, bytes, bytes, site);
  CheckSettled(address, bytes, "it reads", site);
  memcpy(to, from, bytes);
}

void Store(uint32_t address, const void* from, uint32_t bytes, Site site) {
  char* to = Inside(address, bytes, bytes, site);
  CheckSettled(address, bytes, "it writes", site);
  memcpy(to, from, bytes);
  MarkUnfenced(address, bytes);
}

void LoadOperand(uint32_t address, void* to, uint32_t bytes, Site site) {
  EachState(address, bytes, [&](uint8_t state) {
    if (state & kUnfenced)
      Fail("a product of what a thread stored without a fence after it: " + Range(address, bytes),
           site);
  });
  Load(address, to, bytes, site);
}

void CheckAligned(const void* pointer, uint32_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes)
    Fail("a global address is no multiple of " + std::to_string(bytes), site);
}

void CopyAsync(uint32_t to, const void* from, uint32_t bytes, Site site) {
  char* at = Inside(to, bytes, bytes, site);
  CheckAligned(from, bytes, site);
  CheckSettled(to, bytes, "it copies to", site);
  const Copy copy = {to, from, bytes, 0};
  Announce(copy, at);
  MarkUnfenced(to, bytes);
  under_way[Thread()].copies.Add(copy);
}

void CopyCommit() { under_way[Thread()].copies.Commit(); }

void CopyWait(int groups) { under_way[Thread()].copies.Wait(groups, Deliver); }

void AddProduct(const Product& product) { under_way[Thread()].products.Add(product); }

void CommitProducts() { under_way[Thread()].products.Commit(); }

void WaitProducts(int groups) {
  under_way[Thread()].products.Wait(groups, [](const Product& make) { make(); });
}

void BarrierInit(uint32_t barrier, uint32_t count, Site site) {
  if (count == 0 || count > kMostThreads) Fail("a barrier that no thread could end", site);
  Barrier* at = BarrierAt(barrier, site);
  *at = {static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0};
}

void BarrierArrive(uint32_t barrier, uint32_t bytes, Site site) {
  Barrier* at = BarrierAt(barrier, site);
  if (at->count > kMostThreads || at->missing == 0 || at->missing > at->count)
    Fail("a barrier that is not initialised, or that more threads arrive at than it was told",
         site);
  at->state += 2 * static_cast<int32_t>(bytes);
  --at->missing;
  EndPhase(at);
}

void BarrierWait(uint32_t barrier, uint32_t parity, Site site) {
  const Barrier* at = BarrierAt(barrier, site);
  if (at->count == 0 || at->count > kMostThreads) Fail("a barrier that is not initialised", site);
  SleepUntil([=] { return static_cast<uint32_t>(at->state & 1) != (parity & 1); },
             "a phase of a barrier", site);
}

void BulkCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Site site) {
  if (bytes == 0 || bytes % 16) Fail("a bulk copy of " + std::to_string(bytes) + " bytes", site);
  char* at = Inside(to, bytes, 16, site);
  CheckAligned(from, 16, site);
  BarrierAt(barrier, site);
  CheckSettled(to, bytes, "it copies to", site);
  EachState(to, bytes, [&](uint8_t state) {
    if (state & kUnfenced)
      Fail("a bulk copy to where a thread stored without a fence after it: " + Range(to, bytes),
           site);
  });
  const Copy copy = {to, from, bytes, barrier};
  Announce(copy, at);
  bulk.push_back(copy);
}

bool DeliverBulkCopy() {
  if (bulk.empty()) return false;
  std::swap(bulk[RandomBelow(static_cast<uint32_t>(bulk.size()))], bulk.back());
  const Copy copy = bulk.back();
  bulk.pop_back();
  Deliver(copy);
  Barrier* barrier = reinterpret_cast<Barrier*>(memory + (copy.barrier - kSharedStart));
  barrier->state -= 2 * static_cast<int32_t>(copy.bytes);
  EndPhase(barrier);
  return true;
}

void ProxyFence() {
  UnderWay& own = under_way[Thread()];
  for (const auto& [address, bytes] : own.unfenced)
    EachState(address, bytes, [](uint8_t& state) { state &= static_cast<uint8_t>(~kUnfenced); });
  own.unfenced.clear();
}

void BeginShared(uint32_t bytes) {
  if (!mapped) Map();
  memory_bytes = bytes;
  memory = End() - (bytes + 15) / 16 * 16;
  unused = memory - Begin() < kUnusedBytes ? Begin() : memory - kUnusedBytes;
  memset(unused, kUnused, static_cast<size_t>(memory - unused));
  memset(memory, 0xFF, bytes);
  states.assign(bytes / kGranule + 1, 0);
  bulk.clear();
}

std::string EndShared() {
  for (const char* at = unused; at < memory; ++at) {
    if (*at != kUnused)
      return "a thread wrote " + std::to_string(memory - at) + " bytes before the shared memory";
  }
  return {};
}

void ForgetCopies(int thread) { under_way[thread] = {}; }

std::string SharedFault(const void* address) {
  const char* at = static_cast<const char*>(address);
  std::string text = "thread " + std::to_string(Thread()) + ": ";
  if (mapped && at >= mapped && at < mapped + mapped_bytes) {
    return text + "it reads or writes " + std::to_string(at - memory) +
           " bytes from the beginning of " + std::to_string(memory_bytes) +
           " bytes of shared memory";
  }
  return text + "it reads or writes memory that is not there, or its stack is too small";
}

}  // namespace emulation
