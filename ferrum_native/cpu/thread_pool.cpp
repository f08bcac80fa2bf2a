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
  claims_.store(static_cast<uint64_t>(tasks) << 32, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  claim(0);
  for (int left = unfinished_.load(std::memory_order_acquire); left != 0;) left = wait_while(unfinished_, left);
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0; !stop_;) {
    seen = wait_while(generation_, seen);
    claim(thread);
  }
}

void ThreadPool::claim(int thread) {
  uint64_t claims = claims_.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(claims) < claims >> 32) {
    if (!claims_.compare_exchange_weak(claims, claims + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    call_(function_, static_cast<int>(static_cast<uint32_t>(claims)), thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    claims = claims_.load(std::memory_order_acquire);
  }
}

}  // namespace ferrum::cpu
