// Makes one call of a step fail, to prove that a failed step changes nothing.
#pragma once
#include "forwarding_backend.h"

namespace ferrum {

/// Throws Error(Device) in place of call number `fail_at` (from 0, counted over all steps), once; every other call goes through.
class FailingBackend final : public ForwardingBackend {
 public:
  FailingBackend(std::unique_ptr<Backend> inner, int64_t fail_at) : ForwardingBackend(std::move(inner)), fail_at_(fail_at) {}

 protected:
  void around(const char* op, const std::function<void()>& call) override {
    if (calls_++ == fail_at_) throw Error(ErrorKind::Device, std::string("injected failure of ") + op + ".");
    call();
  }

 private:
  const int64_t fail_at_;
  int64_t calls_ = 0;
};

}  // namespace ferrum
