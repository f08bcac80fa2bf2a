#import <Foundation/Foundation.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "metal_compat.h"
#include "objects.h"

// Clang compiles Objective-C++ for GCC's runtime with the personality of C, under which no C++ catch clause ever matches. There is no @try
// here: every frame of a .mm file goes to the personality of C++ instead.
extern "C" int __gxx_personality_v0(...);
extern "C" __attribute__((visibility("hidden"), naked)) int __gnu_objc_personality_v0(...) {
#if defined(__x86_64__)
  asm("jmp *__gxx_personality_v0@GOTPCREL(%rip)");
#else
  asm("b __gxx_personality_v0");
#endif
}

namespace {
std::atomic<long> live{0};
thread_local NSAutoreleasePool* pool = nil;
}  // namespace
long ferrum::metal_compat::live_objects() { return live; }

@implementation NSObject
+ (void)initialize {}
+ (instancetype)alloc {
  NSObject* object = class_createInstance(self, 0);
  object->_references = 1;
  ++live;
  return object;
}
+ (instancetype)new { return [[self alloc] init]; }
+ (Class)class { return self; }
- (instancetype)init { return self; }
- (instancetype)retain {
  __atomic_fetch_add(&_references, 1, __ATOMIC_RELAXED);
  return self;
}
- (oneway void)release {
  const int before = __atomic_fetch_sub(&_references, 1, __ATOMIC_ACQ_REL);
  if (before == 1) [self dealloc];
  if (before < 1) {
    fprintf(stderr, "metal_compat: %s %p is released too often\n", class_getName(object_getClass(self)), static_cast<void*>(self));
    abort();
  }
}
- (instancetype)autorelease {
  [NSAutoreleasePool addObject:self];
  return self;
}
- (NSUInteger)retainCount { return static_cast<NSUInteger>(_references); }
- (void)dealloc {
  --live;
  object_dispose(self);
}
- (id)copy { return [static_cast<id>(self) copyWithZone:nullptr]; }
- (Class)class { return object_getClass(self); }
- (BOOL)isKindOfClass:(Class)aClass {
  for (Class c = object_getClass(self); c; c = class_getSuperclass(c))
    if (c == aClass) return YES;
  return NO;
}
- (BOOL)respondsToSelector:(SEL)selector { return class_respondsToSelector(object_getClass(self), selector); }
- (BOOL)conformsToProtocol:(Protocol*)protocol {
  for (Class c = object_getClass(self); c; c = class_getSuperclass(c))
    if (class_conformsToProtocol(c, protocol)) return YES;
  return NO;
}
- (BOOL)isEqual:(id)object { return object == self; }
- (NSUInteger)hash { return reinterpret_cast<NSUInteger>(self) >> 4; }
- (NSString*)description { return [NSString stringWithFormat:@"<%s %p>", class_getName(object_getClass(self)), static_cast<void*>(self)]; }
@end

/// A string that owns its text.
@interface CompatString : NSString {
 @public
  std::string* _text;
}
@end
@implementation CompatString
- (const char*)UTF8String { return _text->c_str(); }
- (NSUInteger)length { return _text->size(); }
- (void)dealloc {
  delete _text;
  [super dealloc];
}
@end

NSString* compat_string(const std::string& text) {
  CompatString* string = [[CompatString alloc] autorelease];
  string->_text = new std::string(text);
  return string;
}

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)text { return compat_string(text); }
/// printf's formats, and %@.
+ (instancetype)stringWithFormat:(NSString*)format, ... {
  std::string text;
  va_list arguments;
  va_start(arguments, format);
  for (const char* p = [format UTF8String]; *p;) {
    if (*p != '%') {
      text += *p++;
      continue;
    }
    const char* end = p + 1;
    while (*end && !strchr("@diouxXeEfgGcsp%", *end)) ++end;
    const std::string spec(p, end + (*end != 0));
    const bool wide = spec.find_first_of("lzq") != std::string::npos;
    char piece[512] = "";
    switch (*end) {
      case '%': text += '%'; break;
      case '@': {
        const id object = va_arg(arguments, id);
        text += object ? [[object description] UTF8String] : "(null)";
        break;
      }
      case 's': {
        const char* string = va_arg(arguments, const char*);
        text += string ? string : "(null)";
        break;
      }
      case 'p': snprintf(piece, sizeof piece, spec.c_str(), va_arg(arguments, void*)); break;
      case 'e': case 'E': case 'f': case 'g': case 'G': snprintf(piece, sizeof piece, spec.c_str(), va_arg(arguments, double)); break;
      default:
        if (wide) snprintf(piece, sizeof piece, spec.c_str(), va_arg(arguments, long));
        else snprintf(piece, sizeof piece, spec.c_str(), va_arg(arguments, int));
    }
    text += piece;
    p = *end ? end + 1 : end;
  }
  va_end(arguments);
  return compat_string(text);
}
- (const char*)UTF8String { return ""; }
- (NSUInteger)length { return 0; }
- (BOOL)isEqualToString:(NSString*)other { return other && strcmp([self UTF8String], [other UTF8String]) == 0; }
- (BOOL)isEqual:(id)object { return [object isKindOfClass:[NSString class]] && [self isEqualToString:object]; }
- (NSUInteger)hash {
  NSUInteger hash = 5381;
  for (const char* c = [self UTF8String]; *c; ++c) hash = hash * 33 + static_cast<unsigned char>(*c);
  return hash;
}
- (NSString*)description { return self; }
- (id)copyWithZone:(NSZone*)zone { return [self retain]; }
@end

/// The compiler lays out @"..." as this class: isa, text, length. Such strings live for ever and are not counted.
@interface NSConstantString : NSString
@end
@implementation NSConstantString
namespace {
struct ConstantString {
  Class isa;
  const char* text;
  unsigned length;
};
}  // namespace
- (const char*)UTF8String { return reinterpret_cast<const ConstantString*>(self)->text; }
- (NSUInteger)length { return reinterpret_cast<const ConstantString*>(self)->length; }
- (instancetype)retain { return self; }
- (oneway void)release {}
- (instancetype)autorelease { return self; }
- (NSUInteger)retainCount { return ~0ul; }
@end

@interface NSError ()
- (instancetype)initWithDomain:(NSErrorDomain)domain code:(NSInteger)code text:(NSString*)text;
@end
@implementation NSError
- (instancetype)initWithDomain:(NSErrorDomain)domain code:(NSInteger)code text:(NSString*)text {
  _domain = [domain retain];
  _code = code;
  _description = [text retain];
  return self;
}
- (void)dealloc {
  [_domain release];
  [_description release];
  [super dealloc];
}
- (NSErrorDomain)domain { return _domain; }
- (NSInteger)code { return _code; }
- (NSString*)localizedDescription { return _description; }
- (NSString*)description { return _description; }
@end
NSError* compat_error(NSErrorDomain domain, NSInteger code, const std::string& text) {
  return [[[NSError alloc] initWithDomain:domain code:code text:compat_string(text)] autorelease];
}
id compat_fail(NSError** error, NSErrorDomain domain, NSInteger code, const std::string& text) {
  if (error) *error = compat_error(domain, code, text);
  return nil;
}

@implementation NSURL
+ (NSURL*)fileURLWithPath:(NSString*)path {
  NSURL* url = [[self alloc] autorelease];
  url->_path = [path retain];
  return url;
}
- (NSString*)path { return _path; }
- (void)dealloc {
  [_path release];
  [super dealloc];
}
@end

@implementation NSAutoreleasePool
- (instancetype)init {
  _outer = pool;
  pool = self;
  return self;
}
+ (void)addObject:(id)object {
  if (!pool) {
    fprintf(stderr, "metal_compat: %s is autoreleased without a pool and leaks\n", class_getName(object_getClass(object)));
    return;
  }
  if (pool->_count == pool->_capacity) {
    pool->_capacity = pool->_capacity ? 2 * pool->_capacity : 32;
    pool->_objects = static_cast<id*>(realloc(pool->_objects, pool->_capacity * sizeof(id)));
    if (!pool->_objects) abort();
  }
  pool->_objects[pool->_count++] = object;
}
- (void)drain { [self release]; }
- (void)dealloc {
  while (pool != self) [pool release];  // inner ones that an exception left behind
  while (_count) [_objects[--_count] release];
  free(_objects);
  pool = _outer;
  [super dealloc];
}
@end

@implementation CompatObject
- (instancetype)initWithDevice:(id<MTLDevice>)device {
  _device = [device retain];
  return self;
}
- (id<MTLDevice>)device { return _device; }
- (NSString*)label { return _label; }
- (void)setLabel:(NSString*)label {
  NSString* copy = [label copy];
  [_label release];
  _label = copy;
}
- (void)dealloc {
  [_label release];
  [_device release];
  [super dealloc];
}
@end
