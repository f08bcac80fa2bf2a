// Shared by the files of the stand-in: helpers that Apple's headers do not declare.
#pragma once
#import <Metal/Metal.h>

#include <string>

extern "C" void* _Block_copy(const void* literal);
extern "C" void _Block_release(const void* literal);

/// A string of UTF-8 text.
NSString* compat_string(const std::string& text);
/// An autoreleased error.
NSError* compat_error(NSErrorDomain domain, NSInteger code, const std::string& text);
/// Sets *error, if the caller wants it; returns nil.
id compat_fail(NSError** error, NSErrorDomain domain, NSInteger code, const std::string& text);

/// An object with a label, of a device.
@interface CompatObject : NSObject {
  NSString* _label;
  id<MTLDevice> _device;
}
- (instancetype)initWithDevice:(id<MTLDevice>)device;
@property(copy, atomic) NSString* label;
@property(readonly) id<MTLDevice> device;
@end
