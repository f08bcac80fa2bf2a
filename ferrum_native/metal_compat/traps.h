// Turns a kernel's bad access or trap into a fault of its dispatch instead of the end of the process.
#pragma once

namespace ferrum::fibers {

/// Installs the handlers, once; signals that no fiber raised go on to whoever handled them before.
void catch_traps();
/// A stack for the calling thread's signal handlers, until it ends.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  void* memory_;
};

}  // namespace ferrum::fibers
