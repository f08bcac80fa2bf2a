// The part of Foundation that ferrum uses, over GCC's libobjc: manual retain and release, no ARC, no exceptions of Objective-C.
// Declares nothing that Apple's headers do not; instance variables aside.
#pragma once
#include <objc/objc.h>
#include <objc/runtime.h>
#include <stddef.h>
#include <stdint.h>

typedef unsigned long NSUInteger;
typedef long NSInteger;
typedef double CFTimeInterval;
typedef double NSTimeInterval;
#define NS_ENUM(type, name) enum name : type name; enum name : type
#define NS_OPTIONS(type, name) enum name : type name; enum name : type
#ifdef __cplusplus
#define FOUNDATION_EXPORT extern "C"
#else
#define FOUNDATION_EXPORT extern
#endif

@class NSString, NSError;
typedef struct _NSZone NSZone;
typedef NSString *NSErrorDomain;
typedef struct _NSRange { NSUInteger location, length; } NSRange;
static inline NSRange NSMakeRange(NSUInteger location, NSUInteger length) { return (NSRange){location, length}; }

@protocol NSObject
- (instancetype)retain;
- (oneway void)release;
- (instancetype)autorelease;
- (NSUInteger)retainCount;
- (Class)class;
- (BOOL)isKindOfClass:(Class)aClass;
- (BOOL)respondsToSelector:(SEL)selector;
- (BOOL)conformsToProtocol:(Protocol *)protocol;
- (BOOL)isEqual:(id)object;
- (NSUInteger)hash;
@property(readonly, copy) NSString *description;
@end

@protocol NSCopying
- (id)copyWithZone:(NSZone *)zone;
@end

__attribute__((objc_root_class)) @interface NSObject <NSObject> {
  Class isa;
  int _references;
}
+ (void)initialize;
+ (instancetype)alloc;
+ (instancetype)new;
+ (Class)class;
- (instancetype)init;
- (void)dealloc;
- (id)copy;
@end

@interface NSString : NSObject <NSCopying>
+ (instancetype)stringWithUTF8String:(const char *)text;
+ (instancetype)stringWithFormat:(NSString *)format, ...;
- (BOOL)isEqualToString:(NSString *)other;
@property(readonly) const char *UTF8String;
@property(readonly) NSUInteger length;
@end

@interface NSError : NSObject {
  NSErrorDomain _domain;
  NSInteger _code;
  NSString *_description;
}
@property(readonly, copy) NSErrorDomain domain;
@property(readonly) NSInteger code;
@property(readonly, copy) NSString *localizedDescription;
@end

@interface NSURL : NSObject {
  NSString *_path;
}
+ (NSURL *)fileURLWithPath:(NSString *)path;
@property(readonly, copy) NSString *path;
@end

@interface NSAutoreleasePool : NSObject {
  NSAutoreleasePool *_outer;
  id *_objects;
  size_t _count, _capacity;
}
+ (void)addObject:(id)object;
- (void)drain;
@end
