#include "machine.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "lanes.h"

namespace ferrum::fibers {

thread_local Machine* machine __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr size_t GUARD_BYTES = 16384;  // a multiple of every page size in use but 64 KiB
enum : uint32_t { FLAG_DEVICE = 1, FLAG_THREADGROUP = 2 };

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return line;
}

std::string shown(const msl::Site& site) {
  const std::string path = site.file;
  return text("%s in %s:%d", site.operation, path.substr(path.rfind('/') + 1).c_str(), site.line);
}

void raise(Generations& generations, uint32_t memory) {
  if (memory & FLAG_THREADGROUP) ++generations.threadgroup;
  if (memory & FLAG_DEVICE) ++generations.device;
}

char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

/// A number for the chain of calls that led here, from the frame records of kernel code up to the fiber's first: lanes in uniform flow share it.
inline uintptr_t path_of(const void* frame) {
  struct Record { const Record* caller; uintptr_t code; };
  uintptr_t path = 0;
  for (const Record* record = static_cast<const Record*>(frame); record; record = record->caller) path = path * 31 + record->code;
  return path;
}
const unsigned char* exchange(const void* value, uint32_t bytes, uint32_t memory, const msl::Site* site) {
  return machine->exchange(value, bytes, memory, site, path_of(__builtin_frame_address(0)));
}
void threadgroup_barrier(uint32_t memory, const msl::Site* site) { machine->threadgroup_barrier(memory, site, path_of(__builtin_frame_address(0))); }
uint32_t lane() { return machine->lane(); }
void access(const void* address, uint32_t bytes, uint32_t kind, const void* code) {
  machine->access(static_cast<const char*>(address), bytes, AccessKind(kind), code);
}
constexpr msl::Runtime RUNTIME{exchange, threadgroup_barrier, lane, access};

}  // namespace

const msl::Runtime* runtime() { return &RUNTIME; }

std::string source_line(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info)) return "unknown code";
  const size_t offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase);
  std::string found;
  if (FILE* tool = popen(text("addr2line -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset).c_str(), "r")) {
    char line[256];
    if (fgets(line, sizeof line, tool)) found = line;
    pclose(tool);
  }
  found = found.substr(0, found.find_first_of(" \n"));
  if (!found.empty() && found[0] != '?') return found;
  const std::string path = info.dli_fname;
  return text("%s+0x%zx", path.substr(path.rfind('/') + 1).c_str(), offset);
}

Machine::Machine() {
  fibers_ = static_cast<Fiber*>(std::aligned_alloc(64, MAX_THREADS * sizeof(Fiber)));
  contexts_ = static_cast<msl::ThreadContext*>(std::calloc(MAX_THREADS, sizeof(msl::ThreadContext)));
  if (!fibers_ || !contexts_) throw std::bad_alloc();
  std::memset(static_cast<void*>(fibers_), 0, MAX_THREADS * sizeof(Fiber));
  stacks_ = reserve(MAX_THREADS * (STACK_BYTES + GUARD_BYTES));
  for (uint32_t i = 0; i < MAX_THREADS; ++i) {
    char* guard = stacks_ + i * (STACK_BYTES + GUARD_BYTES);
    mprotect(guard, GUARD_BYTES, PROT_NONE);
    fibers_[i] = {nullptr, guard + GUARD_BYTES, contexts_ + i, nullptr, i, i / 32, false};
  }
  threadgroup_memory_ = reserve(THREADGROUP_MEMORY + GUARD_BYTES);
  mprotect(threadgroup_memory_ + THREADGROUP_MEMORY, GUARD_BYTES, PROT_NONE);
#ifdef FERRUM_FIBER_ASAN
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &scheduler_stack_.bytes);
  pthread_attr_destroy(&attributes);
  scheduler_stack_.bottom = bottom;
#endif
}

Machine::~Machine() {
  munmap(stacks_, MAX_THREADS * (STACK_BYTES + GUARD_BYTES));
  munmap(threadgroup_memory_, THREADGROUP_MEMORY + GUARD_BYTES);
  std::free(fibers_);
  std::free(contexts_);
}

void Machine::prepare(const Dispatch& dispatch, uint64_t seed) {
  dispatch_ = &dispatch;
  threads_ = dispatch.threads[0] * dispatch.threads[1] * dispatch.threads[2];
  seed_ = seed;
  fault_.clear();
  if (dispatch.instrumented && !shadow_) shadow_ = std::make_unique<Shadow>();
  if (shadow_) shadow_->begin();
  note_read_only_buffers();
  threadgroup_bytes_ = 0;
  for (size_t bytes : dispatch.threadgroup_bytes) threadgroup_bytes_ += bytes;
  char* memory = threadgroup_memory_ + THREADGROUP_MEMORY - threadgroup_bytes_;
  void* threadgroup[msl::MAX_THREADGROUP_ARGS];
  for (uint32_t i = 0; i < msl::MAX_THREADGROUP_ARGS; ++i) {
    threadgroup[i] = memory;
    memory += dispatch.threadgroup_bytes[i];
  }
  for (uint32_t i = 0; i < threads_; ++i) {
    msl::ThreadContext& c = contexts_[i];
    std::memcpy(c.threadgroup, threadgroup, sizeof threadgroup);
    for (uint32_t b = 0; b < msl::MAX_BUFFERS; ++b) c.buffers[b] = dispatch.buffers[b].data;
    const uint32_t position[3] = {i % dispatch.threads[0], i / dispatch.threads[0] % dispatch.threads[1], i / (dispatch.threads[0] * dispatch.threads[1])};
    for (int k = 0; k < 3; ++k) {
      c.thread_position_in_threadgroup[k] = position[k];
      c.threads_per_threadgroup[k] = dispatch.threads[k];
      c.threadgroups_per_grid[k] = dispatch.grid[k];
      c.threads_per_grid[k] = dispatch.grid[k] * dispatch.threads[k];
    }
    c.thread_index_in_threadgroup = i;
    c.thread_index_in_simdgroup = i & 31;
    c.simdgroup_index_in_threadgroup = i / 32;
    c.simdgroups_per_threadgroup = threads_ / 32;
  }
}

void Machine::note_read_only_buffers() {
  last_buffer_ = 0;
  bool written[msl::MAX_BUFFERS] = {};
  const msl::KernelEntry& entry = *dispatch_->kernel->entry;
  for (uint32_t i = 0; i < entry.slot_count; ++i)
    if (entry.slots[i].kind == msl::ArgKind::Buffer && !entry.only_read[i]) written[entry.slots[i].index] = true;
  for (uint32_t i = 0; i < msl::MAX_BUFFERS; ++i) {
    const Span& mine = dispatch_->buffers[i];
    only_read_[i] = true;
    for (uint32_t k = 0; k < msl::MAX_BUFFERS; ++k) {
      const Span& other = dispatch_->buffers[k];
      if (written[k] && mine.data < other.data + other.bytes && other.data < mine.data + mine.bytes) only_read_[i] = false;
    }
  }
}

void Machine::run_threadgroup(uint32_t x, uint32_t y, uint32_t z) {
  group_[0] = x, group_[1] = y, group_[2] = z;
  random_ = seed_ ? (seed_ + group_number()) * 0x9E3779B97F4A7C15ull | 1 : 0;  // whichever worker runs it
  returned_ = arrived_ = head_ = tail_ = 0;
  generations_ = {};
  std::memset(threadgroup_memory_ + THREADGROUP_MEMORY - threadgroup_bytes_, 0xff, threadgroup_bytes_);  // NaNs
  for (uint32_t s = 0; s < threads_ / 32; ++s) {
    simdgroups_[s].arrived = simdgroups_[s].parity = 0;
    simdgroups_[s].generations = {};
  }
  for (uint32_t i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.returned = false;
    fiber.waits_at = nullptr;
    for (int k = 0; k < 3; ++k) {
      fiber.context->threadgroup_position_in_grid[k] = group_[k];
      fiber.context->thread_position_in_grid[k] = group_[k] * dispatch_->threads[k] + fiber.context->thread_position_in_threadgroup[k];
    }
    // Tops at equal offsets of their stacks would fight for the same sets of the first cache.
    fiber.sp = new_fiber(fiber.stack + STACK_BYTES - 64 - i % 64 * 448, entry);
    push(i);
  }
  if (random_) shuffle(0);
  while (head_ != tail_ && fault_.empty()) {
    current_ = fibers_ + ready_[head_++ % (2 * MAX_THREADS)];
    switch_to(&scheduler_sp_, current_->sp, {current_->stack, STACK_BYTES}, false);
    current_ = nullptr;
  }
  if (returned_ == threads_ || !fault_.empty()) return;
  for (uint32_t i = 0; i < threads_; ++i)
    if (fibers_[i].waits_at)
      return stop(text("barrier in divergent flow: %u of %u threads returned, thread %u waits for ever at %s", returned_, threads_, i, shown(*fibers_[i].waits_at).c_str()));
}

void Machine::entry() {
  entered();
  asm volatile("" : : "r"(__builtin_frame_address(0)));  // keeps a frame record, whose caller is null
  machine->dispatch_->kernel->entry->invoke(*machine->current_->context);
  machine->finish();
}

void Machine::finish() {
  current_->returned = true;
  ++returned_;
  const Simdgroup& group = simdgroups_[current_->simdgroup];
  if (group.arrived) stop(text("divergent flow: thread %u returned, another lane of its simdgroup is at %s", current_->thread, shown(*group.site).c_str()));
  leave(true);
  std::abort();
}

void Machine::leave(bool dying) {
  Fiber* from = current_;
  if (head_ != tail_ && fault_.empty()) {
    current_ = fibers_ + ready_[head_++ % (2 * MAX_THREADS)];
    switch_to(&from->sp, current_->sp, {current_->stack, STACK_BYTES}, dying);
  } else {
    switch_to(&from->sp, scheduler_sp_, scheduler_stack_, dying);
  }
}

void Machine::stop(const std::string& what) {
  if (!fault_.empty()) return;
  fault_ = text("kernel %s, threadgroup (%u, %u, %u): ", dispatch_->kernel->entry->name, group_[0], group_[1], group_[2]) + what;
}

uint64_t Machine::random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  return random_ ^= random_ << 17;
}

void Machine::shuffle(uint32_t from) {
  for (uint32_t i = tail_ - from; i > 1; --i)
    std::swap(ready_[(from + i - 1) % (2 * MAX_THREADS)], ready_[(from + random() % i) % (2 * MAX_THREADS)]);
}

void Machine::wake(uint32_t from, uint32_t to) {
  const uint32_t first = tail_;
  for (uint32_t i = from; i < to; ++i)
    if (fibers_[i].waits_at) {
      fibers_[i].waits_at = nullptr;
      push(i);
    }
  if (random_) shuffle(first);
}

const unsigned char* Machine::exchange(const void* value, uint32_t bytes, uint32_t memory, const msl::Site* site, uintptr_t path) {
  Fiber& me = *current_;
  Simdgroup& group = simdgroups_[me.simdgroup];
  unsigned char* slots = group.slots[group.parity];
  if (bytes) std::memcpy(slots + msl::EXCHANGE_BYTES * (me.thread & 31), value, bytes);
  if (group.arrived == 0) {
    group.site = site;
    group.path = path;
  } else if (__builtin_expect(group.path != path, 0)) {
    stop(text("divergent flow: lane %u of simdgroup %u is at %s, another lane at %s", me.thread & 31, me.simdgroup, shown(*site).c_str(), shown(*group.site).c_str()) +
         (group.site->line == site->line ? ", reached by another branch" : ""));
    leave(false);
  }
  if (++group.arrived == msl::SIMD_WIDTH) {
    group.arrived = 0;
    group.parity ^= 1;
    raise(group.generations, memory);
    wake(me.simdgroup * 32, me.simdgroup * 32 + 32);
    return slots;
  }
  me.waits_at = site;
  leave(false);
  return slots;
}

void Machine::threadgroup_barrier(uint32_t memory, const msl::Site* site, uintptr_t path) {
  Fiber& me = *current_;
  if (arrived_ == 0) {
    barrier_site_ = site;
    barrier_path_ = path;
  } else if (barrier_path_ != path) {
    stop(text("divergent flow: thread %u is at %s, another thread at %s", me.thread, shown(*site).c_str(), shown(*barrier_site_).c_str()));
    leave(false);
  }
  if (++arrived_ == threads_) {
    arrived_ = 0;
    raise(generations_, memory);
    wake(0, threads_);
    return;
  }
  me.waits_at = site;
  leave(false);
}

std::string Machine::who() const { return text("thread %u", current_->thread); }

std::string Machine::where_in_memory(const char* address, uint32_t bytes) const {
  const char* memory = threadgroup_memory_ + THREADGROUP_MEMORY - threadgroup_bytes_;
  if (address >= threadgroup_memory_ - GUARD_BYTES && address < threadgroup_memory_ + THREADGROUP_MEMORY + GUARD_BYTES)
    return text("at byte %td of %zu bytes of threadgroup memory", address - memory, threadgroup_bytes_);
  ptrdiff_t nearest = PTRDIFF_MAX;
  std::string found = "far from every buffer";
  for (uint32_t i = 0; i < msl::MAX_BUFFERS; ++i) {
    const Span& buffer = dispatch_->buffers[i];
    if (!buffer.data) continue;
    const bool past = address + bytes > buffer.data + buffer.bytes && address >= buffer.data;
    const ptrdiff_t distance = past ? address + bytes - (buffer.data + buffer.bytes) : buffer.data - address;
    if (distance <= 0 || distance >= nearest) continue;
    nearest = distance;
    if (distance < (1 << 24)) found = text("%td bytes %s buffer(%u) of %zu bytes", distance, past ? "past the end of" : "before", i, buffer.bytes);
  }
  return found;
}

/// Memory that no other thread can touch or that never changes: stacks, what the executor hands out, the library's own constants.
bool Machine::is_known_apart(const char* address) {
  const auto within = [address](const void* begin, size_t bytes) { return size_t(address - static_cast<const char*>(begin)) < bytes; };
  if (within(stacks_, MAX_THREADS * (STACK_BYTES + GUARD_BYTES)) || within(this, sizeof *this) || within(contexts_, MAX_THREADS * sizeof *contexts_)) return true;
  const uintptr_t page = reinterpret_cast<uintptr_t>(address) / 4096;
  if (library_pages_[page % 64] == page) return true;
  if (buffer_of(address, 1) || within(threadgroup_memory_, THREADGROUP_MEMORY)) return false;
  Dl_info info;
  if (!dladdr(address, &info)) return false;
  library_pages_[page % 64] = page;
  return true;
}

const Span* Machine::buffer_of(const char* address, uint32_t bytes) {
  const auto holds = [&](const Span& buffer) { return address >= buffer.data && address + bytes <= buffer.data + buffer.bytes; };
  if (holds(dispatch_->buffers[last_buffer_])) return &dispatch_->buffers[last_buffer_];
  for (uint32_t i = 0; i < msl::MAX_BUFFERS; ++i)
    if (holds(dispatch_->buffers[i])) return &dispatch_->buffers[last_buffer_ = i];
  return nullptr;
}

void Machine::access(const char* address, uint32_t bytes, AccessKind kind, const void* code) {
  if (!current_ || !fault_.empty() || is_known_apart(address)) return;
  const char* verb = kind == AccessKind::Read ? "reads" : kind == AccessKind::Write ? "writes" : "updates";
  const char* memory = threadgroup_memory_ + THREADGROUP_MEMORY - threadgroup_bytes_;
  const bool threadgroup = address >= memory && address + bytes <= memory + threadgroup_bytes_;
  const Span* buffer = threadgroup ? nullptr : buffer_of(address, bytes);
  const auto line = [code] { return ", in " + source_line(static_cast<const char*>(code) - 1); };
  if (!threadgroup && !buffer) {
    stop("out of bounds: " + who() + text(" %s %u bytes, ", verb, bytes) + where_in_memory(address, bytes) + line());
    return leave(false);
  }
  if (buffer && kind == AccessKind::Read && only_read_[buffer - dispatch_->buffers]) return;
  const Simdgroup& group = simdgroups_[current_->simdgroup];
  const uint32_t number = group_number();
  const Toucher by{dispatch_->number, number, threadgroup ? generations_.threadgroup : generations_.device,
                   threadgroup ? group.generations.threadgroup : group.generations.device, uint16_t(current_->thread), 0, kind};
  const Toucher* other = shadow_->touch(address, bytes, by, !threadgroup);
  if (!other) return;
  const char* did = other->kind == AccessKind::Read ? "read" : other->kind == AccessKind::Write ? "wrote" : "updated";
  const std::string place = threadgroup ? text("threadgroup memory, byte %td", address - memory) : text("buffer(%td), byte %td", buffer - dispatch_->buffers, address - buffer->data);
  const std::string whose = other->threadgroup == number ? text("thread %u", other->thread) : text("thread %u of threadgroup %u", other->thread, other->threadgroup);
  stop("race: " + who() + " " + verb + " " + place + ", which " + whose + " " + did + "; no barrier between" + line());
  leave(false);
}

void* Machine::caught(const Trap& trap) {
  trap_ = trap;
  return current_->stack + STACK_BYTES - 64;  // what the fiber had there is dead
}

void Machine::land() {
  const std::string place = source_line(trap_.code);
  if (trap_.signal == SIGILL)
    stop("undefined behaviour: " + who() + " does a misaligned access, a shift out of range or the like, in " + place);
  else if (trap_.signal == SIGFPE)
    stop("undefined behaviour: " + who() + " divides by zero, in " + place);
  else if (trap_.address >= current_->stack - GUARD_BYTES && trap_.address < current_->stack)
    stop("stack overflow: " + who() + text(" uses more than %zu bytes, in ", size_t(STACK_BYTES)) + place);
  else
    stop("out of bounds: " + who() + (trap_.write ? " writes " : " reads ") + where_in_memory(trap_.address, 1) + ", in " + place);
  leave(true);
  std::abort();
}

}  // namespace ferrum::fibers
