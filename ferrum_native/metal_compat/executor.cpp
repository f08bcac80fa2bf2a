#include "executor.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

#include "lanes.h"
#include "machine.h"
#include "traps.h"

namespace ferrum::fibers {

namespace {

/// What the workers of one dispatch share.
struct Job {
  const Dispatch* dispatch;
  uint64_t seed;
  std::vector<uint32_t> order;  // of threadgroups, where it is not the rising one
  uint32_t threadgroups;
  std::atomic<uint32_t> next{0};
  std::atomic<bool> stopped{false};
  std::mutex mutex;
  std::string fault;

  void work(Machine& own) {
    own.prepare(*dispatch, seed);
    const uint32_t* grid = dispatch->grid;
    for (uint32_t claimed; !stopped && (claimed = next++) < threadgroups;) {
      const uint32_t number = order.empty() ? claimed : order[claimed];
      own.run_threadgroup(number % grid[0], number / grid[0] % grid[1], number / (grid[0] * grid[1]));
      if (own.fault().empty()) continue;
      stopped = true;
      const std::lock_guard<std::mutex> lock(mutex);
      if (fault.empty()) fault = own.fault();
    }
  }
};

/// Threads that stand by for dispatches. One dispatch runs at a time: function constants are variables of the library.
class Workers {
 public:
  static Workers& instance() {
    static Workers* workers = new Workers;  // never destroyed: a thread may outlive static destructors
    return *workers;
  }
  void run(Job& job, int threads) {
    const std::lock_guard<std::mutex> dispatching(dispatching_);
    for (const ConstantValue& value : job.dispatch->constants)
      for (uint32_t i = 0; i < job.dispatch->kernel->file->constant_count; ++i)
        if (const msl::FunctionConstant& constant = job.dispatch->kernel->file->constants[i]; constant.index == value.index) {
          std::memcpy(constant.value, value.value, constant.bytes);
          *constant.defined = true;
        }
    std::unique_lock<std::mutex> lock(mutex_);
    while (int(started_) < threads) std::thread(&Workers::work, this, started_++).detach();
    job_ = &job;
    wanted_ = threads;
    busy_ = threads;
    ++generation_;
    begin_.notify_all();
    end_.wait(lock, [&] { return busy_ == 0; });
    job_ = nullptr;
    for (uint32_t i = 0; i < job.dispatch->kernel->file->constant_count; ++i) *job.dispatch->kernel->file->constants[i].defined = false;
  }

 private:
  void work(uint32_t number) {
    Machine own;
    const SignalStack signal_stack;
    machine = &own;
    uint64_t seen = 0;
    for (std::unique_lock<std::mutex> lock(mutex_);;) {
      begin_.wait(lock, [&] { return generation_ != seen && job_; });
      seen = generation_;
      if (number >= wanted_) continue;
      lock.unlock();
      job_->work(own);
      lock.lock();
      if (--busy_ == 0) end_.notify_all();
    }
  }

  std::mutex dispatching_, mutex_;
  std::condition_variable begin_, end_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  uint32_t wanted_ = 0, busy_ = 0, started_ = 0;
};

std::string sized(const char* format, const std::string& name, size_t a, size_t b, size_t c) {
  char line[256];
  snprintf(line, sizeof line, format, name.c_str(), a, b, c);
  return line;
}

}  // namespace

std::string missing_constant(const Kernel& kernel, const std::vector<ConstantValue>& values) {
  for (uint32_t i = 0; i < kernel.file->constant_count; ++i) {
    const msl::FunctionConstant& constant = kernel.file->constants[i];
    const bool given = std::any_of(values.begin(), values.end(), [&](const ConstantValue& value) { return value.index == constant.index; });
    if ((kernel.entry->constants >> i & 1) && !given)
      return std::string("kernel ") + kernel.entry->name + " reads function constant " + constant.name + " (" + std::to_string(constant.index) + "), which has no value.";
  }
  return "";
}

std::string refused(const Dispatch& dispatch) {
  const msl::KernelEntry& entry = *dispatch.kernel->entry;
  const std::string name = std::string("kernel ") + entry.name;
  const size_t threads = size_t(dispatch.threads[0]) * dispatch.threads[1] * dispatch.threads[2];
  if (threads == 0 || threads > MAX_THREADS || threads % 32) return sized("%s: %zu threads per threadgroup; it must be a multiple of 32, at most 1024.", name, threads, 0, 0);
  if (size_t(dispatch.grid[0]) * dispatch.grid[1] * dispatch.grid[2] == 0) return name + ": an empty grid.";
  size_t threadgroup_bytes = 0;
  for (uint32_t i = 0; i < msl::MAX_THREADGROUP_ARGS; ++i) {
    threadgroup_bytes += dispatch.threadgroup_bytes[i];
    if (dispatch.threadgroup_bytes[i] % 16) return sized("%s: threadgroup(%zu) has %zu bytes, not a multiple of 16.", name, i, dispatch.threadgroup_bytes[i], 0);
  }
  if (threadgroup_bytes > THREADGROUP_MEMORY) return sized("%s: %zu bytes of threadgroup memory; there are 32768.", name, threadgroup_bytes, 0, 0);
  for (uint32_t i = 0; i < entry.slot_count; ++i) {
    const uint32_t index = entry.slots[i].index;
    if (entry.slots[i].kind == msl::ArgKind::ThreadgroupMemory && dispatch.threadgroup_bytes[index] == 0)
      return sized("%s: threadgroup(%zu) has no length.", name, index, 0, 0);
    if (entry.slots[i].kind != msl::ArgKind::Buffer) continue;
    if (!dispatch.buffers[index].data) return sized("%s: buffer(%zu) is not bound.", name, index, 0, 0);
    if (dispatch.buffers[index].bytes < entry.smallest[i])
      return sized("%s: buffer(%zu) has %zu bytes, the kernel's argument %zu.", name, index, dispatch.buffers[index].bytes, entry.smallest[i]);
  }
  return "";
}

std::string run(const Dispatch& dispatch, const Options& options) {
  if (std::string why = refused(dispatch); !why.empty()) return why;
  if (std::string why = missing_constant(*dispatch.kernel, dispatch.constants); !why.empty()) return why;
  catch_traps();
  static std::atomic<uint32_t> counter{0};
  Dispatch numbered = dispatch;
  numbered.number = ++counter;
  Job job;
  job.dispatch = &numbered;
  job.seed = options.seed ? options.seed * 0x9E3779B97F4A7C15ull | 1 : 0;
  job.threadgroups = dispatch.grid[0] * dispatch.grid[1] * dispatch.grid[2];
  if (options.seed) {
    uint64_t state = job.seed;
    job.order.resize(job.threadgroups);
    for (uint32_t i = 0; i < job.threadgroups; ++i) job.order[i] = i;
    for (uint32_t i = job.threadgroups; i > 1; --i) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(job.order[i - 1], job.order[(state >> 33) % i]);
    }
  }
  const uint32_t cores = options.threads > 0 ? uint32_t(options.threads) : std::max(1u, std::thread::hardware_concurrency());
  Workers::instance().run(job, dispatch.instrumented ? 1 : int(std::min(cores, job.threadgroups)));
  return job.fault;
}

}  // namespace ferrum::fibers
