"""Compiles one .metal file and runs one of its kernels on numpy arrays, on CPU fibers: how tests look at a single kernel.

    from metal_runner import run
    run("metal_src/linear.metal", "linear_gemv_q4_k", args_bytes, [weight, x, out], grid=(8, 1, 1), threads=(64, 1, 1), threadgroup_bytes=0,
        constants={"KV_F16": True}, seed=1, checks="race")

`args_bytes` goes to buffer(0), array i to buffer(i + 1); arrays are updated in place. Each lies between stretches of memory without
access. A fault of the kernel raises KernelFault. Builds are kept in build/metal, by content.

From the command line, `python tests/metal_runner.py metal_src/linear.metal` compiles a file in all its builds and lists its kernels.
"""
import ctypes
import functools
import hashlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / "ferrum_native" / "metal_compat"
BUILD = ROOT / "build" / "metal"
sys.path.insert(0, str(COMPAT))
import mslc  # noqa: E402

EXECUTOR = ("fiber.cpp", "machine.cpp", "shadow.cpp", "traps.cpp", "executor.cpp", "kernel_library.cpp")
CHECKS = {"": {}, "race": {"race": True}, "undefined": {"undefined": True}, "all": {"race": True, "undefined": True}}
CONSTANT_TYPES = {"bool": np.bool_, "short": np.int16, "ushort": np.uint16, "int": np.int32, "uint": np.uint32, "float": np.float32}
PAGE = mmap.PAGESIZE
GUARD = 1 << 20


class KernelFault(RuntimeError):
    """What the executor or a detector found wrong with a dispatch."""


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class _Constant(ctypes.Structure):
    _fields_ = [("index", ctypes.c_uint32), ("value", ctypes.c_ubyte * 8)]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p), ("buffers", ctypes.POINTER(_Buffer)), ("threadgroup_bytes", ctypes.POINTER(ctypes.c_size_t)),
        ("constants", ctypes.POINTER(_Constant)), ("buffer_count", ctypes.c_uint32), ("constant_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32 * 3), ("seed", ctypes.c_uint64), ("workers", ctypes.c_int),
    ]  # fmt: skip


def _digest(paths, *words):
    digest = hashlib.sha256(" ".join(map(str, words)).encode())
    for path in sorted(map(Path, paths)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _executor():
    sources = [COMPAT / name for name in EXECUTOR] + [ROOT / "tests" / "metal_runner.cpp"]
    output = BUILD / f"executor-{_digest([*sources, *COMPAT.glob('*.h')], mslc.clang())}.so"
    if not output.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        subprocess.run([mslc.clang(), "-std=c++20", "-O2", "-g1", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility-inlines-hidden",
                        f"-I{ROOT / 'ferrum_native'}", *map(str, sources), "-o", str(partial), "-ldl", "-lpthread"], check=True)  # fmt: skip
        partial.replace(output)
    library = ctypes.CDLL(str(output))
    library.ferrum_metal_open.restype = ctypes.c_void_p
    library.ferrum_metal_name.restype = ctypes.c_char_p
    library.ferrum_metal_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


def library_path(metal_file, checks=""):
    """The compiled library of one .metal file, built if its text or the compiler's has changed."""
    metal_file = Path(metal_file)
    if not metal_file.is_absolute():
        metal_file = ROOT / metal_file
    inputs = [metal_file, *metal_file.parent.rglob("*.h"), *COMPAT.glob("msl/*"), COMPAT / "mslc.py", COMPAT / "kernel_library.h", COMPAT / "access_hooks.cpp"]
    output = BUILD / f"{metal_file.stem}-{_digest(inputs, checks, metal_file, mslc.clang())}.metallib"
    if not output.exists():
        mslc.build([metal_file], output, **CHECKS[checks])
    return output


@functools.cache
def _open(path):
    error = ctypes.create_string_buffer(4096)
    library = _executor().ferrum_metal_open(str(path).encode(), error, len(error))
    if not library:
        raise KernelFault(error.value.decode())
    return ctypes.c_void_p(library)


def kernel_names(metal_file, checks=""):
    library, names = _open(library_path(metal_file, checks)), []
    while (name := _executor().ferrum_metal_name(library, len(names))) is not None:
        names.append(name.decode())
    return names


class _Guarded:
    """Bytes at the end of a page, 16-aligned, between two stretches without access."""

    def __init__(self, values):
        self.bytes = len(values)
        padded = -(-self.bytes // 16) * 16
        length = -(-max(padded, 1) // PAGE) * PAGE
        self.map = mmap.mmap(-1, length + 2 * GUARD)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        protect = ctypes.CDLL(None).mprotect
        protect(ctypes.c_void_p(base), ctypes.c_size_t(GUARD), 0)
        protect(ctypes.c_void_p(base + GUARD + length), ctypes.c_size_t(GUARD), 0)
        self.address = base + GUARD + length - padded
        ctypes.memmove(self.address, bytes(values), self.bytes)

    def copy_to(self, array):
        ctypes.memmove(array.ctypes.data, self.address, self.bytes)


def run(metal_file, kernel, args, buffers, grid, threads, threadgroup_bytes=0, constants=None, seed=0, checks="", workers=0):
    """Runs one dispatch. `args`: bytes of buffer(0), or None to leave it to the arrays; `threadgroup_bytes`: of threadgroup(0), or a list;
    `constants`: by name or index; `seed`: order of lanes and threadgroups, 0 rising; `checks`: "", "race", "undefined" or "all"."""
    library = _open(library_path(metal_file, checks))
    for array in buffers:
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise TypeError("buffers are contiguous numpy arrays")
    held = [_Guarded(args)] if args is not None else []
    held += [_Guarded(array.tobytes()) for array in buffers]
    listed = (_Buffer * max(len(held), 1))(*[_Buffer(item.address, item.bytes) for item in held])
    sizes = [threadgroup_bytes] if isinstance(threadgroup_bytes, int) else list(threadgroup_bytes)
    constant_list = (_Constant * max(len(constants or {}), 1))()
    for place, (name, value) in enumerate((constants or {}).items()):
        index, kind = ctypes.c_uint32(name if isinstance(name, int) else 0), ctypes.c_char_p()
        named = None if isinstance(name, int) else name.encode()
        if not _executor().ferrum_metal_constant(library, kernel.encode(), named, ctypes.byref(index), ctypes.byref(kind)):
            raise KeyError(f"{kernel} has no function constant {name}")
        constant_list[place].index = index.value
        data = np.array(value, dtype=CONSTANT_TYPES[kind.value.decode()]).tobytes()
        ctypes.memmove(constant_list[place].value, data, len(data))
    triple = lambda values: (ctypes.c_uint32 * 3)(*(list(np.atleast_1d(values)) + [1, 1, 1])[:3])
    dispatch = _Dispatch(kernel.encode(), listed, (ctypes.c_size_t * 8)(*sizes), constant_list, len(held), len(constants or {}),
                         triple(grid), triple(threads), seed, workers)  # fmt: skip
    error = ctypes.create_string_buffer(4096)
    _executor().ferrum_metal_run(library, ctypes.byref(dispatch), error, ctypes.c_size_t(len(error)))
    if error.value:
        raise KernelFault(error.value.decode())
    for item, array in zip(held[args is not None :], buffers):
        if array.flags.writeable:
            item.copy_to(array)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for checks in CHECKS:
            print(path, checks or "plain", *kernel_names(path, checks), sep="\n    ")
