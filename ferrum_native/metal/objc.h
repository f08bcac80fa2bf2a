// Ownership of Objective-C objects: one reference in one owner, and pools that exceptions drain too.
#pragma once
#import <Foundation/Foundation.h>

#include <string>
#include <utility>

namespace ferrum::metal {

/// Holds one reference to an object and gives it back; `T` is a pointer type such as id<MTLBuffer>.
template <class T> class Owned {
 public:
  Owned() = default;
  /// Takes over a reference that the caller owns: of a method whose name begins with new, alloc or copy.
  explicit Owned(T taken) : object_(taken) {}
  /// Holds an object that somebody else owns.
  static Owned retained(T object) { return Owned([object retain]); }
  ~Owned() { [object_ release]; }
  Owned(Owned&& other) noexcept : object_(std::exchange(other.object_, nil)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  T get() const { return object_; }
  explicit operator bool() const { return object_ != nil; }

 private:
  T object_ = nil;
};

/// Releases what was autoreleased within a scope, however the scope is left; an @autoreleasepool would not on an exception.
class AutoreleaseScope {
 public:
  AutoreleaseScope() : pool_([NSAutoreleasePool new]) {}
  ~AutoreleaseScope() { [pool_ drain]; }
  AutoreleaseScope(const AutoreleaseScope&) = delete;
  AutoreleaseScope& operator=(const AutoreleaseScope&) = delete;

 private:
  NSAutoreleasePool* pool_;
};

inline NSString* to_ns(const std::string& text) { return [NSString stringWithUTF8String:text.c_str()]; }
inline std::string to_text(NSString* text) { return text ? [text UTF8String] : ""; }
/// An error's own words, without their full stop.
inline std::string reason(NSError* error) {
  std::string text = error ? to_text([error localizedDescription]) : "Metal gave no reason";
  while (!text.empty() && (text.back() == '.' || text.back() == '\n')) text.pop_back();
  return text;
}

}  // namespace ferrum::metal
