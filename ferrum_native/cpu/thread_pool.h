// The threads of one engine: a fixed set that shares out the tasks of one op at a time.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace ferrum::cpu {

/// `run` hands task numbers to the calling thread and, once started, to threads - 1 workers. Workers spin briefly for the next op, then sleep.
///
/// Each thread begins with an equal range of neighbouring tasks, which it does in rising order, so that it reads memory on where it is; a
/// thread whose range is empty takes the last task of the longest one.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) : threads_(threads), ranges_(static_cast<size_t>(threads)) {}
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  int threads() const { return threads_; }
  void start();  // throws Error(OutOfMemory) where the system refuses a thread

  /// Calls f(task, thread) for every task in 0 .. tasks - 1, each once; returns when all are done.
  template <class F> void run(int tasks, F&& f) {
    if (tasks <= 1 || workers_.empty()) {
      for (int task = 0; task < tasks; ++task) f(task, 0);
      return;
    }
    dispatch(tasks, [](void* function, int task, int thread) { (*static_cast<std::remove_reference_t<F>*>(function))(task, thread); }, &f);
  }

 private:
  using Call = void (*)(void* function, int task, int thread);
  /// Tasks that are not claimed yet, begin << 32 | end.
  struct alignas(64) Range { std::atomic<uint64_t> tasks{0}; };
  void dispatch(int tasks, Call call, void* function);
  void stop();
  void work(int thread);
  void do_tasks(int thread);
  int claim(int thread);  // a task, or -1

  // The op under way. `call_` and `function_` are read only after a task was claimed: the op cannot end before that task is done, so a
  // worker that wakes late finds either nothing to claim or a later op, whole.
  Call call_ = nullptr;
  void* function_ = nullptr;
  alignas(64) std::atomic<int> unfinished_{0};  // tasks
  alignas(64) std::atomic<uint32_t> generation_{0};
  const int threads_;
  std::vector<Range> ranges_;  // [threads]
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace ferrum::cpu
