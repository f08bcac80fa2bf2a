// One worker's machine: the fibers of the threadgroup that it runs, and how their lanes meet.
#pragma once
#include <cstdint>
#include <string>

#include "executor.h"
#include "fiber.h"
#include "shadow.h"

namespace ferrum::fibers {

constexpr uint32_t MAX_THREADS = 1024, MAX_SIMDGROUPS = MAX_THREADS / 32;
constexpr size_t THREADGROUP_MEMORY = 32 * 1024;

struct alignas(64) Fiber {
  void* sp;
  char* stack;                 // lowest address
  msl::ThreadContext* context;
  const msl::Site* waits_at;   // null while it runs or is ready
  uint32_t thread, simdgroup;
  bool returned;
};

/// A rendezvous of the 32 lanes of a simdgroup. Two sets of slots: late readers of one meeting overlap with the next.
struct Simdgroup {
  uint32_t arrived, parity;
  const msl::Site* site;
  uintptr_t path;
  Generations generations;
  alignas(16) unsigned char slots[2][msl::SIMD_WIDTH * msl::EXCHANGE_BYTES];
};

class Machine {
 public:
  Machine();
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  void prepare(const Dispatch&, uint64_t seed);  // before the first threadgroup of a dispatch
  void run_threadgroup(uint32_t x, uint32_t y, uint32_t z);
  const std::string& fault() const { return fault_; }  // the first of this dispatch, or ""

  // What kernels call, on their fibers.
  const unsigned char* exchange(const void* value, uint32_t bytes, uint32_t memory, const msl::Site*, uintptr_t path);
  void threadgroup_barrier(uint32_t memory, const msl::Site*, uintptr_t path);
  uint32_t lane() const { return current_->thread & 31; }
  void access(const char* address, uint32_t bytes, AccessKind, const void* code);

  // What the signal handler and its landing use.
  bool running() const { return current_ != nullptr; }
  struct Trap { int signal; const char* address; const void* code; bool write; };
  void* caught(const Trap&);  // notes it; returns the stack pointer to land on
  [[noreturn]] void land();

 private:
  static void entry();
  [[noreturn]] void finish();
  void note_read_only_buffers();
  void leave(bool dying);
  void stop(const std::string& what);  // notes a fault; every fiber of the threadgroup is abandoned
  void wake(uint32_t from, uint32_t to);
  void push(uint32_t thread) { ready_[tail_++ % (2 * MAX_THREADS)] = uint16_t(thread); }
  void shuffle(uint32_t from);
  uint64_t random();
  uint32_t group_number() const { return group_[0] + dispatch_->grid[0] * (group_[1] + dispatch_->grid[1] * group_[2]); }
  std::string who() const;
  bool is_known_apart(const char* address);
  const Span* buffer_of(const char* address, uint32_t bytes);
  std::string where_in_memory(const char* address, uint32_t bytes) const;

  Fiber* fibers_;
  msl::ThreadContext* contexts_;
  char* stacks_;
  char* threadgroup_memory_;  // ends at a page without access
  Simdgroup simdgroups_[MAX_SIMDGROUPS];
  uint16_t ready_[2 * MAX_THREADS];
  uint32_t head_ = 0, tail_ = 0, threads_ = 0, returned_ = 0, arrived_ = 0;
  const msl::Site* barrier_site_ = nullptr;
  uintptr_t barrier_path_ = 0;
  Generations generations_{};
  Fiber* current_ = nullptr;
  void* scheduler_sp_ = nullptr;
  Stack scheduler_stack_;
  uint64_t seed_ = 0, random_ = 0;
  uint32_t group_[3] = {};
  const Dispatch* dispatch_ = nullptr;
  size_t threadgroup_bytes_ = 0;
  std::unique_ptr<Shadow> shadow_;
  bool only_read_[msl::MAX_BUFFERS] = {};      // and shares no byte with a buffer that is written
  uint32_t last_buffer_ = 0;
  uintptr_t library_pages_[64] = {};           // recently seen pages of the library's own constants
  Trap trap_{};
  std::string fault_;
};

/// "file:line" of an address in a kernel library, or "library+offset".
std::string source_line(const void* code);

}  // namespace ferrum::fibers
