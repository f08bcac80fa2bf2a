"""What tests ask of the Metal stand-in inside the extension: its objects, its failures, the order in which it runs lanes."""
import contextlib
import ctypes
import functools
import gc

from ferrum_native import _native

# MTLCommandBufferError
INTERNAL, TIMEOUT, PAGE_FAULT, ACCESS_REVOKED, NOT_PERMITTED, OUT_OF_MEMORY, INVALID_RESOURCE, DEVICE_REMOVED = 1, 2, 3, 4, 7, 8, 9, 11


@functools.cache
def _library():
    """The extension itself, or None where it was built without the stand-in."""
    library = ctypes.CDLL(_native.__file__)
    if not hasattr(library, "ferrum_metal_compat_live_objects"):
        return None
    library.ferrum_metal_compat_live_objects.restype = ctypes.c_long
    library.ferrum_metal_compat_allocated_bytes.restype = ctypes.c_size_t
    library.ferrum_metal_compat_committed.restype = ctypes.c_int64
    return library


def is_built_in():
    return _library() is not None


def live_objects():
    """Objective-C objects that are alive in this process."""
    gc.collect()
    return _library().ferrum_metal_compat_live_objects()


def allocated_bytes():
    """Of buffers that are alive, no-copy ones aside."""
    return _library().ferrum_metal_compat_allocated_bytes()


def committed_command_buffers():
    return _library().ferrum_metal_compat_committed()


@contextlib.contextmanager
def failing_command_buffer(number, code=INTERNAL):
    """Within it, command buffer `number` of those committed from now on, from 0, fails after half of its dispatches."""
    _library().ferrum_metal_compat_fail(ctypes.c_int64(number), ctypes.c_long(code))
    try:
        yield
    finally:
        _library().ferrum_metal_compat_fail(ctypes.c_int64(-1), ctypes.c_long(0))


@contextlib.contextmanager
def executor(seed=0, threads=0):
    """Within it, lanes and threadgroups run in the order of `seed`, on `threads` workers (0: one per core)."""
    _library().ferrum_metal_compat_set_executor(ctypes.c_uint64(seed), threads)
    try:
        yield
    finally:
        _library().ferrum_metal_compat_set_executor(ctypes.c_uint64(0), 0)
