"""Builds the one native extension, ferrum_native._native, and beside it the Metal kernels; everything else is in pyproject.toml.

Environment of the build: FERRUM_METAL=auto|on|off says whether Metal is built in (auto: where the tools for it are found), FERRUM_WERROR=1
makes warnings errors (CI), FERRUM_SANITIZE=1 builds with ASan and UBSan.
"""

import functools
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Compiler flags of the files that hold one instruction set's kernels; the rest runs everywhere.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {
    "x86-64": {"isa_avx2.cpp": AVX2, "isa_avx512.cpp": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]},
    "arm64": {"isa_neon.cpp": [], "isa_neon_dotprod.cpp": ["-march=armv8.2-a+dotprod"], "isa_neon_i8mm.cpp": ["-march=armv8.2-a+dotprod+i8mm"]},
}
ARCHITECTURE = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine().lower())
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
COMPAT = "ferrum_native/metal_compat"
MAC = sys.platform == "darwin"
PACKAGES = "apt-get install --no-install-recommends clang-19 libobjc-12-dev (or neighbouring versions: clang of 15 or later, libobjc of any)"


def mslc():
    """The kernel compiler, as a module."""
    spec = importlib.util.spec_from_file_location("mslc", f"{COMPAT}/mslc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_libobjc():
    """GCC's folder that holds libobjc and the headers of it, the newest one, or None."""
    folders = [Path(path).parents[2] for path in glob("/usr/lib/gcc*/*/*/include/objc/objc.h")]
    folders = [folder for folder in folders if (folder / "libobjc.so").exists()]
    return max(folders, key=lambda folder: [int(part) for part in folder.name.split(".") if part.isdigit()], default=None)


class MetalToolchain:
    """How .mm files are compiled, and what they are linked with."""

    def __init__(self, compiler, flags, link_flags):
        self.compiler, self.flags, self.link_flags = compiler, flags, link_flags


def find_toolchain():
    """A MetalToolchain, or the reason why there is none."""
    common = ["-std=c++20", "-fno-objc-arc", "-fvisibility=hidden", "-Wno-unused-parameter"]
    if MAC:
        return MetalToolchain("clang++", common, ["-framework", "Foundation", "-framework", "Metal"])
    clang, libobjc = mslc().find_clang(), find_libobjc()
    if not clang:
        return "there is no clang++ of version 15 or later"
    if not libobjc:
        return "there is no libobjc with its headers"
    if os.environ.get("FERRUM_SANITIZE") == "1":
        common.append("-fno-sanitize=function")  # GCC's runtime, which the extension is linked with, lacks it
    flags = [*common, "-fobjc-runtime=gcc", "-fconstant-string-class=NSConstantString", "-fblocks", f"-I{COMPAT}/include", "-isystem", f"{libobjc}/include"]
    link_flags = [f"-L{libobjc}", "-lobjc", "-ldl"]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.mm"
        probe.write_text("#import <Metal/Metal.h>\n@interface Probe : NSObject\n@end\n@implementation Probe\n@end\n")
        tried = subprocess.run([clang, "-fPIC", *flags, "-shared", str(probe), "-o", f"{folder}/probe.so", *link_flags], capture_output=True, text=True)
    return MetalToolchain(clang, flags, link_flags) if tried.returncode == 0 else f"{clang} does not build a small Objective-C++ file:\n{tried.stderr}"


@functools.cache
def metal():
    """The MetalToolchain of this build, or None."""
    wanted = os.environ.get("FERRUM_METAL", "auto")
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"FERRUM_METAL={wanted} is not one of auto, on, off.")
    if wanted == "off":
        return None
    found = find_toolchain()
    if isinstance(found, MetalToolchain):
        return found
    if wanted == "on":
        sys.exit(f"FERRUM_METAL=on: {found}. Install the tools, on Debian and Ubuntu by\n    {PACKAGES}\nor build without Metal: FERRUM_METAL=off.")
    print(f"ferrum is built without Metal: {found}.")
    return None


class BuildExtension(build_ext):
    """Adds the flags of each file's instruction set, compiles Objective-C++, and puts the Metal kernels beside the extension."""

    def build_extension(self, ext):
        compiler = self.compiler
        compile_one = compiler._compile

        def compile_with_flags(obj, src, ext_suffix, cc_args, extra_postargs, pp_opts):
            if ext_suffix == ".mm":
                command = [metal().compiler, "-fPIC", *cc_args, src, "-o", obj, *extra_postargs, *metal().flags]
                if subprocess.run(command).returncode:
                    raise CompileError(f"{src} does not compile: {' '.join(command)}")
                return
            extra = INSTRUCTION_SETS.get(ARCHITECTURE, {}).get(os.path.basename(src), [])
            compile_one(obj, src, ext_suffix, cc_args, [*extra_postargs, *extra], pp_opts)

        if ".mm" not in compiler.src_extensions:
            compiler.src_extensions = [*compiler.src_extensions, ".mm"]
        compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            compiler._compile = compile_one
        self.build_kernels(Path(self.get_ext_fullpath(ext.name)).parent)

    def build_kernels(self, folder):
        """kernels.metal is one source for Metal's own compiler; kernels.metallib, on Linux, what the stand-in runs."""
        kernels = sorted(glob("metal_src/*.metal"))
        if not metal() or not kernels:
            return
        inputs = [*kernels, *glob("metal_src/**/*.h", recursive=True), *glob(f"{COMPAT}/msl/*"), *glob(f"{COMPAT}/*.h"), f"{COMPAT}/mslc.py"]
        newest = max(os.path.getmtime(path) for path in inputs)
        folder.mkdir(parents=True, exist_ok=True)
        compiler = mslc()
        makers = {"kernels.metal": compiler.amalgamate} | ({} if MAC else {"kernels.metallib": compiler.build})
        for name, make in makers.items():
            if self.force or not (folder / name).exists() or os.path.getmtime(folder / name) < newest:
                try:
                    make(kernels, folder / name)
                except compiler.KernelError as error:
                    sys.exit(f"the Metal kernels do not compile:\n{error}")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        for ext in self.extensions:
            source = Path(self.get_ext_fullpath(ext.name)).parent
            was, self.inplace = self.inplace, False
            built = Path(self.get_ext_fullpath(ext.name)).parent
            self.inplace = was
            for name in ("kernels.metal", "kernels.metallib"):
                if (built / name).exists() and built.resolve() != source.resolve():
                    self.copy_file(str(built / name), str(source / name))


def sources():
    """The extension's files: an instruction set's kernels only where they can run, Metal only where it is built in."""
    found = [path for folder in ("core", "models", "cpu") for path in sorted(glob(f"ferrum_native/{folder}/*.cpp"))]
    elsewhere = {name for architecture, files in INSTRUCTION_SETS.items() if architecture != ARCHITECTURE for name in files}
    found = [path for path in found if os.path.basename(path) not in elsewhere]
    if metal():
        found += sorted(glob("ferrum_native/metal/*.mm") + glob("ferrum_native/metal/*.cpp"))
        if not MAC:
            found += [path for path in sorted(glob(f"{COMPAT}/*.mm") + glob(f"{COMPAT}/*.cpp")) if not path.endswith("access_hooks.cpp")]
    return ["ferrum_native/_native.pyx", "ferrum_native/devices.cpp", *found]


def flags():
    compile_flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    link_flags = ["-pthread"]
    macros = []
    if metal():
        link_flags += metal().link_flags
        macros += [("FERRUM_METAL", "1")] if glob("ferrum_native/metal/*.mm") else []
        macros += [] if MAC else [("FERRUM_METAL_COMPAT", "1")]
    if os.environ.get("FERRUM_WERROR") == "1":
        compile_flags.append("-Werror")
    if os.environ.get("FERRUM_SANITIZE") == "1":
        compile_flags += SANITIZE + ["-O1", "-g1"]
        link_flags += SANITIZE
    return {"extra_compile_args": compile_flags, "extra_link_args": link_flags, "define_macros": macros}


setup(
    ext_modules=[
        Extension(
            "ferrum_native._native",
            sources(),
            depends=[path for ending in ("h", "inl") for path in glob(f"ferrum_native/**/*.{ending}", recursive=True)] + glob("metal_src/shared/*.h") + glob("ferrum_native/*.pxi"),
            include_dirs=["ferrum_native"],
            language="c++",
            **flags(),
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
