// What stands in for a GPU's threads: kernels run as functions of the host, each thread of a block
// in a fiber. One block runs at a time, and its threads in random order; they change at collectives
// and barriers only. scheduler.cpp has the fibers, shared_memory.cpp the block's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace emulation {

// Where a kernel calls something: two threads that meet must call it at the same place.
struct Site {
  const char* file;
  int line;
};
// A last parameter that is not given: the caller's place.
#define HQMQ_HERE ::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

// Ends the launch, which reports `text`. In a kernel only.
[[noreturn]] void Fail(const std::string& text);
[[noreturn]] void Fail(const std::string& text, Site site);

// The emulated GPU.
struct Gpu {
  uint64_t seed;  // of the order of threads, blocks and copies
  int multiprocessors, shared_limit, major;
};
Gpu& CurrentGpu();

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;

// Threads.

int Thread();  // of the block
inline int Lane() { return Thread() % kWarp; }

// What the 32 lanes of a warp meet in.
enum class Meeting { kSyncwarp, kShuffle, kVote, kReduce, kMma, kTranspose, kLoadMatrices, kElect };

// Bytes a lane shows to the others.
constexpr int kSlot = 64;

// Waits for the warp; all lanes must call it for the same reason at the same site. Returns what
// lane i showed at i * kSlot: valid until this lane meets the others for the second time from here.
const char* Meet(Meeting meeting, const void* mine, size_t bytes, Site site);
// How many meetings the thread has been in: the same number for the lanes of one meeting.
int Meetings();

template <class T>
T Shown(const char* all, int lane, int index = 0) {
  T x;
  memcpy(&x, all + lane * kSlot + index * sizeof(T), sizeof(T));
  return x;
}

// __syncthreads and its kinds. Returns whether any (or), all (and) gave true.
enum class Sync { kPlain, kAnd, kOr };
bool Syncthreads(Sync kind, bool mine, Site site);

// bar.sync with an id of `count` threads of the block.
void NamedBarrier(int id, int count, Site site);

// Sleeps until `done`, which other threads or copies bring about.
void SleepUntil(const std::function<bool()>& done, const char* what, Site site);
// Lets all sleepers look again.
void WakeSleepers();

// True one time in n.
bool Chance(int n);

// Shared memory: addresses of the shared window, as PTX has them.

constexpr uint32_t kSharedStart = 1024;

char* DynamicShared();
uint32_t AddressOf(const void* pointer, Site site);
// What is loaded and stored: within the block's dynamic memory, aligned, not under a copy.
void Load(uint32_t address, void* to, uint32_t bytes, Site site);
void Store(uint32_t address, const void* from, uint32_t bytes, Site site);
// The same for products, which see only stores with a fence after them.
void LoadOperand(uint32_t address, void* to, uint32_t bytes, Site site);

// Asynchronous copies of this thread: the data comes when the thread waits for the group, and until
// then nobody may load or store there.
void CopyAsync(uint32_t to, const void* from, uint32_t bytes, Site site);
void CopyCommit();
void CopyWait(int groups);

// Products of this thread's warp, in groups: made when the thread waits for their group.
void AddProduct(const std::function<void()>& product);
void CommitProducts();
void WaitProducts(int groups);

// mbarriers and bulk copies, which come at any time.
void BarrierInit(uint32_t barrier, uint32_t count, Site site);
void BarrierArrive(uint32_t barrier, uint32_t bytes, Site site);
void BarrierWait(uint32_t barrier, uint32_t parity, Site site);
void BulkCopy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Site site);
// Lets bulk copies overwrite what this thread stored.
void ProxyFence();

// Fails unless a global address is a multiple of `bytes`.
void CheckAligned(const void* pointer, uint32_t bytes, Site site);

// Between shared_memory.cpp and scheduler.cpp.
void BeginShared(uint32_t bytes);  // of a block; holds what is NaN in every type
std::string EndShared();           // what is wrong after its last thread; empty: nothing
void ForgetCopies(int thread);
bool DeliverBulkCopy();  // one of those under way, in random order; false: there is none
std::string SharedFault(const void* address);  // of a signal: what a thread did
uint32_t RandomBelow(uint32_t n);

// Runs all blocks. Returns what is wrong, empty if nothing.
std::string RunGrid(uint32_t grid_x, uint32_t grid_y, uint32_t threads, uint32_t shared,
                    const std::function<void()>& kernel);

}  // namespace emulation
