"""Builds the one native extension, ferrum_native._native; everything else is in pyproject.toml.

Environment of the build: FERRUM_WERROR=1 makes warnings errors (CI), FERRUM_SANITIZE=1 builds with ASan and UBSan.
"""

import os
import platform
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Compiler flags of the files that hold one instruction set's kernels; the rest runs everywhere.
INSTRUCTION_SETS = {"isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"]}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class BuildExtension(build_ext):
    """Adds the flags of each file's instruction set."""

    def build_extension(self, ext):
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext_suffix, cc_args, extra_postargs, pp_opts):
            extra = INSTRUCTION_SETS.get(os.path.basename(src), [])
            return compile_one(obj, src, ext_suffix, cc_args, [*extra_postargs, *extra], pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


def sources():
    """The extension's files: an instruction set's kernels only where they can run."""
    found = [path for folder in ("core", "models", "cpu") for path in sorted(glob(f"ferrum_native/{folder}/*.cpp"))]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        found = [path for path in found if os.path.basename(path) not in INSTRUCTION_SETS]
    return ["ferrum_native/_native.pyx", "ferrum_native/devices.cpp", *found]


def flags():
    compile_flags = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    link_flags = ["-pthread"]
    if os.environ.get("FERRUM_WERROR") == "1":
        compile_flags.append("-Werror")
    if os.environ.get("FERRUM_SANITIZE") == "1":
        compile_flags += SANITIZE + ["-O1", "-g"]
        link_flags += SANITIZE
    return {"extra_compile_args": compile_flags, "extra_link_args": link_flags}


setup(
    ext_modules=[
        Extension(
            "ferrum_native._native",
            sources(),
            depends=glob("ferrum_native/**/*.h", recursive=True) + glob("ferrum_native/**/*.inl", recursive=True) + glob("ferrum_native/*.pxi"),
            include_dirs=["ferrum_native"],
            language="c++",
            **flags(),
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
