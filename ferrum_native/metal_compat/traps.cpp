#include "traps.h"

#include <csignal>
#include <cstdlib>
#include <mutex>
#include <new>

#include <ucontext.h>

#include "lanes.h"
#include "machine.h"

namespace ferrum::fibers {

namespace {

enum : size_t { SIGNAL_STACK_BYTES = 64 * 1024 };
constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
struct sigaction previous[NSIG];

void landing() { machine->land(); }

void handle(int signal, siginfo_t* info, void* raw) {
  ucontext_t* context = static_cast<ucontext_t*>(raw);
  if (!machine || !machine->running()) {
    const struct sigaction& before = previous[signal];
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, raw);
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
    sigaction(signal, &before, nullptr);  // and the instruction faults again
    return;
  }
  Machine::Trap trap{signal, static_cast<const char*>(info->si_addr), nullptr, false};
#if defined(__x86_64__)
  greg_t* registers = context->uc_mcontext.gregs;
  trap.code = reinterpret_cast<const void*>(registers[REG_RIP]);
  trap.write = registers[REG_ERR] & 2;
  registers[REG_RSP] = reinterpret_cast<greg_t>(machine->caught(trap)) - 8;  // as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&landing);
#else
  trap.code = reinterpret_cast<const void*>(context->uc_mcontext.pc);
  context->uc_mcontext.sp = reinterpret_cast<uintptr_t>(machine->caught(trap));
  context->uc_mcontext.pc = reinterpret_cast<uintptr_t>(&landing);
#endif
}

}  // namespace

void catch_traps() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int signal : SIGNALS) sigaction(signal, &action, &previous[signal]);
  });
}

SignalStack::SignalStack() : memory_(std::malloc(SIGNAL_STACK_BYTES)) {
  if (!memory_) throw std::bad_alloc();
  stack_t stack = {};
  stack.ss_sp = memory_;
  stack.ss_size = SIGNAL_STACK_BYTES;
  sigaltstack(&stack, nullptr);
}

SignalStack::~SignalStack() {
  stack_t off = {};
  off.ss_flags = SS_DISABLE;
  sigaltstack(&off, nullptr);
  std::free(memory_);
}

}  // namespace ferrum::fibers
