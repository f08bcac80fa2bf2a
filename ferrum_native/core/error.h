// Errors of the native core: one exception type; the kind decides the Python class.
#pragma once
#include <stdexcept>
#include <string>

namespace ferrum {

enum class ErrorKind {
  InvalidArgument,
  UnknownSequence,
  KvPoolExhausted,
  ContextFull,
  LogitRowsExceeded,
  BadModelFile,
  UnsupportedModel,
  OutOfMemory,
  Cancelled,
  Closed,
  Device,
};

/// What happened, why, and what to do, in one to three lines.
struct Error : std::runtime_error {
  Error(ErrorKind k, const std::string& message) : std::runtime_error(message), kind(k) {}
  ErrorKind kind;
};

}  // namespace ferrum
