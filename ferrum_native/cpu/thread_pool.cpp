#include "thread_pool.h"

#include <string>
#include <system_error>

#include "../core/error.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ferrum::cpu {
namespace {

/// How long a thread watches for news before it sleeps: tens of microseconds, the gap between two ops, not between two steps.
constexpr int spins = 4000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Waits until `value` is no longer `old`; returns what it is then.
template <class T> T wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0; i < spins; ++i) {
    const T now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
  return value.load(std::memory_order_acquire);
}

}  // namespace

void ThreadPool::start() {
  try {
    for (int i = static_cast<int>(workers_.size()) + 1; i < threads_; ++i) workers_.emplace_back([this, i] { work(i); });
  } catch (const std::system_error&) {
    const size_t started = workers_.size() + 1;
    stop();
    throw Error(ErrorKind::OutOfMemory, "the system refused more than " + std::to_string(started) + " of " + std::to_string(threads_) + " threads. Lower threads.");
  }
}

void ThreadPool::stop() {
  stop_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void ThreadPool::dispatch(int tasks, Call call, void* function) {
  call_ = call;
  function_ = function;
  unfinished_.store(tasks, std::memory_order_relaxed);
  const auto share = [&](size_t thread) { return static_cast<uint64_t>(tasks) * thread / ranges_.size(); };
  for (size_t i = 0; i < ranges_.size(); ++i) ranges_[i].tasks.store(share(i) << 32 | share(i + 1), std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  do_tasks(0);
  for (int left = unfinished_.load(std::memory_order_acquire); left != 0;) left = wait_while(unfinished_, left);
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0; !stop_;) {
    seen = wait_while(generation_, seen);
    do_tasks(thread);
  }
}

void ThreadPool::do_tasks(int thread) {
  for (int task; (task = claim(thread)) >= 0;) {
    call_(function_, task, thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

int ThreadPool::claim(int thread) {
  const auto begin_of = [](uint64_t tasks) { return static_cast<uint32_t>(tasks >> 32); };
  const auto end_of = [](uint64_t tasks) { return static_cast<uint32_t>(tasks); };
  std::atomic<uint64_t>& own = ranges_[static_cast<size_t>(thread)].tasks;
  uint64_t tasks = own.load(std::memory_order_acquire);
  while (begin_of(tasks) < end_of(tasks))
    if (own.compare_exchange_weak(tasks, tasks + (uint64_t{1} << 32), std::memory_order_acq_rel, std::memory_order_acquire)) return static_cast<int>(begin_of(tasks));
  for (;;) {
    std::atomic<uint64_t>* longest = nullptr;
    uint32_t most = 0;
    for (Range& range : ranges_) {
      const uint64_t left = range.tasks.load(std::memory_order_acquire);
      if (begin_of(left) < end_of(left) && end_of(left) - begin_of(left) > most) longest = &range.tasks, most = end_of(left) - begin_of(left), tasks = left;
    }
    if (!longest) return -1;
    if (longest->compare_exchange_weak(tasks, tasks - 1, std::memory_order_acq_rel, std::memory_order_acquire)) return static_cast<int>(end_of(tasks)) - 1;
  }
}

}  // namespace ferrum::cpu
