#!/usr/bin/env python3
"""Compiles Metal kernels for machines without Metal: .metal files -> one shared object that the fiber executor runs.

A kernel's source goes through the C preprocessor, its entry points are read from the attributes of its parameters, and the text itself is
compiled as C++ against `msl/metal_stdlib`. A missing or unknown attribute is an error with file and line.

    mslc.py build a.metal b.metal -o kernels.metallib [--race] [--undefined]
    mslc.py amalgamate a.metal b.metal -o kernels.metal
    mslc.py check a.metal b.metal          address spaces and language rules; compiles nothing
"""

import argparse
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
POSITIONS = {
    "threadgroup_position_in_grid": "ThreadgroupPositionInGrid",
    "thread_position_in_threadgroup": "ThreadPositionInThreadgroup",
    "thread_position_in_grid": "ThreadPositionInGrid",
    "thread_index_in_threadgroup": "ThreadIndexInThreadgroup",
    "thread_index_in_simdgroup": "ThreadIndexInSimdgroup",
    "simdgroup_index_in_threadgroup": "SimdgroupIndexInThreadgroup",
    "simdgroups_per_threadgroup": "SimdgroupsPerThreadgroup",
    "threads_per_threadgroup": "ThreadsPerThreadgroup",
    "threadgroups_per_grid": "ThreadgroupsPerGrid",
    "threads_per_simdgroup": "ThreadsPerSimdgroup",
    "threads_per_grid": "ThreadsPerGrid",
}
CONSTANT_TYPES = ("bool", "short", "ushort", "int", "uint", "float")
WARNINGS = ["-Wall", "-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-unused", "-Wno-duplicate-decl-specifier"]
MACHINE = ["-mavx2", "-mfma", "-mf16c"] if platform.machine().lower() in ("x86_64", "amd64") else []


class KernelError(Exception):
    """A fault of a .metal file, as "file:line: what"."""


def find_clang():
    """The newest clang++ of at least 15 on the PATH, or None. FERRUM_CLANG names another one."""
    named = os.environ.get("FERRUM_CLANG")
    if named:
        return named
    for version in range(40, 14, -1):
        found = shutil.which(f"clang++-{version}")
        if found:
            return found
    found = shutil.which("clang++")
    if found:
        text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        version = re.search(r"version (\d+)", text)
        if version and int(version.group(1)) >= 15:
            return found
    return None


def clang():
    found = find_clang()
    if not found:
        raise KernelError("clang++ of version 15 or later is needed: apt-get install --no-install-recommends clang-19")
    return found


@functools.cache
def unmerged_traps():
    """Flags that keep the line of every trap; they changed with the releases."""
    for flags in (["-fno-sanitize-merge", "-fno-sanitize-debug-trap-reasons"], ["-fno-sanitize-merge"], ["-mllvm", "-ubsan-unique-traps"]):
        command = [clang(), "-x", "c++", "-fsanitize=shift", "-fsanitize-trap=all", *flags, "-S", "-o", "-", "-"]
        if subprocess.run(command, input="", capture_output=True, text=True).returncode == 0:
            return flags
    return []


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(done.stderr.strip() or done.stdout.strip())
    if done.stderr.strip():
        sys.stderr.write(done.stderr)
    return done.stdout


def preprocess(path):
    """The source after the C preprocessor, with its line markers; the standard library's own header is left out."""
    path = Path(path).resolve()
    source = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<[^>]*>", "", path.read_text(), flags=re.M)
    with tempfile.TemporaryDirectory() as folder:
        # Headers include <metal_stdlib> too: an empty one stands in for it here.
        for name in ("metal_stdlib", *(header.name for header in (HERE / "msl").glob("metal_*"))):
            (Path(folder) / name).write_text("")
        copy = Path(folder) / path.name
        copy.write_text(f'#line 1 "{path}"\n{source}')
        return run([clang(), "-E", "-x", "c++", "-nostdinc", "-undef", "-D__METAL_VERSION__=310", "-I", str(path.parent), "-I", folder, str(copy)])


class Source:
    """The parsed entry points of one preprocessed file."""

    def __init__(self, path):
        self.path = str(Path(path).resolve())
        self.text = preprocess(path)
        self.kernels = []    # (host name, C++ name, slots)
        self.constants = []  # (index, name, type)
        self.bodies = self.definitions()
        self.parse()

    def where(self, position):
        """file:line of a position in the preprocessed text."""
        line, file = 1, self.path
        start = 0
        for marker in re.finditer(r'^# (\d+) "([^"]*)".*\n', self.text[:position], flags=re.M):
            line, file, start = int(marker.group(1)), marker.group(2), marker.end()
        return f"{file}:{line + self.text.count(chr(10), start, position)}"

    def fail(self, position, message):
        raise KernelError(f"{self.where(position)}: {message}")

    def parse(self):
        templates = {}
        for m in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", self.text):
            parameters, end = self.balanced(m.end())
            slots = [self.slot(m.start(), m.group(1), p) for p in split(parameters)]
            before = re.search(r'(template\s*<[^;{}]*>\s*)?(?:\[\[\s*host_name\("([^"]*)"\)\s*\]\]\s*)?$', self.text[: m.start()])
            if before and before.group(1):
                templates[m.group(1)] = slots
            else:
                self.kernels.append(((before and before.group(2)) or m.group(1), m.group(1), slots))
        for m in re.finditer(r'template\s*\[\[\s*host_name\(((?:"[^"]*"\s*)+)\)\s*\]\]\s*kernel\s+([^;]*);', self.text):
            host = "".join(re.findall(r'"([^"]*)"', m.group(1)))
            named = re.search(r"\b(\w+)\s*(<[^()]*>)\s*(?:\(.*\)\s*)?$", m.group(2), flags=re.S)
            if not named or named.group(1) not in templates:
                self.fail(m.start(), f"{host} instantiates no kernel template of this file; write template [[host_name(\"x\")]] kernel decltype(k<T>) k<T>;")
            self.kernels.append((host, named.group(1) + named.group(2), templates[named.group(1)]))
        names = [host for host, _, _ in self.kernels]
        for name in names:
            if names.count(name) > 1:
                raise KernelError(f"{self.path}: two kernels are named {name}")
        for m in re.finditer(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;", self.text):
            if m.group(1) not in CONSTANT_TYPES:
                self.fail(m.start(), f"function constant {m.group(2)} is {m.group(1)}; it may be one of {', '.join(CONSTANT_TYPES)}")
            self.constants.append((int(m.group(3)), m.group(2), m.group(1)))
        for m in re.finditer(r"\[\[\s*function_constant\b", self.text):
            if not any(self.text.find(name, m.start() - 200, m.start()) >= 0 for _, name, _ in self.constants):
                self.fail(m.start(), "a function constant is declared as: constant <type> <name> [[function_constant(<index>)]];")
        names = {name for _, name, _ in self.constants}
        for m in re.finditer(r"^constant\s+[^;(){}]*=[^;]*;", self.text, flags=re.M):
            used = names & set(re.findall(r"\w+", m.group()))
            if used:
                self.fail(m.start(), f"a constant of the program scope is computed from function constant {sorted(used)[0]}: compute it inside the kernel")

    def balanced(self, start):
        depth, end = 1, start
        while depth:
            depth += (self.text[end] == "(") - (self.text[end] == ")")
            end += 1
        return self.text[start : end - 1], end

    def slot(self, position, kernel, parameter):
        attributes = re.findall(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]", parameter)
        shown = " ".join(re.sub(r"^#.*$", "", parameter, flags=re.M).split())
        if len(attributes) != 1:
            self.fail(position, f"kernel {kernel}: a parameter needs one attribute: {shown}")
        name, index = attributes[0]
        if name in ("buffer", "threadgroup"):
            if not index.isdigit() or int(index) >= (31 if name == "buffer" else 8):
                self.fail(position, f"kernel {kernel}: [[{name}({index})]] is out of range: {shown}")
            return f"{{msl::ArgKind::{'Buffer' if name == 'buffer' else 'ThreadgroupMemory'}, {index}}}"
        if name not in POSITIONS:
            self.fail(position, f"kernel {kernel}: unknown attribute [[{name}]]: {shown}")
        return f"{{msl::ArgKind::{POSITIONS[name]}, 0}}"

    def definitions(self):
        """Every name of the program scope -> the identifiers of its definitions."""
        text = re.sub(r'^#.*$|"(?:[^"\\]|\\.)*"', "", self.text, flags=re.M)
        text = re.sub(r"\[\[[^\]]*\]\]", "", text)
        text = re.sub(r"\bnamespace\s+\w+\s*\{", "", text)  # what is inside one counts as outside; its closing brace ends nothing
        found, depth, start = {}, 0, 0
        for i, c in enumerate(text):
            depth = max(0, depth + (c == "{") - (c == "}"))
            if depth == 0 and c in ";}":
                chunk = text[start : i + 1]
                start = i + 1
                head = re.split(r"[{=;]", re.sub(r"^\s*template\s*<[^{}();]*>", "", chunk), maxsplit=1)[0]
                name = (
                    re.search(r"\b(?:struct|enum)\s+(\w+)", head)
                    or re.search(r"(\w+)\s*\(", head)
                    or re.search(r"(\w+)\s*(?:\[[^\]]*\]\s*)*$", head)
                )
                if name:
                    found.setdefault(name.group(1), set()).update(re.findall(r"\b[A-Za-z_]\w*", chunk))
        return found

    def constants_of(self, function):
        """Bit i: the kernel reaches function constant i of this file, by name."""
        reached, todo = set(), set(re.findall(r"\b[A-Za-z_]\w*", function))
        while todo:
            name = todo.pop()
            reached.add(name)
            todo |= self.bodies.get(name, set()) - reached
        return sum(1 << i for i, (_, name, _) in enumerate(self.constants) if name in reached)

    def generate(self, table):
        """The C++ file: the kernel's text in a namespace of its own, then its entry points."""
        text = re.sub(
            r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\(\d+\)\s*\]\]\s*;", r"static \1 \2; static bool msl_defined_\2;", self.text
        )
        blank = lambda m: "\n" * m.group().count("\n")
        text = re.sub(r"template\s*\[\[\s*host_name\([^)]*\)\s*\]\][^;]*;", blank, text)  # MSL_ENTRY instantiates
        text = re.sub(r"\[\[\s*host_name\([^)]*\)\s*\]\]", blank, text)
        text = re.sub(r"\[\[\s*threadgroup\s*\(\s*\d+\s*\)\s*\]\]", "", text)  # `threadgroup` is a macro by now
        text = re.sub(r'^(# \d+ "[^"]*").*$', r"\1", text, flags=re.M)  # the flags of a marker would end the namespace's file
        lines = ["#include <metal_stdlib>", "namespace {", text, "}", '# 1 "entry_points"']
        for i, (host, function, slots) in enumerate(self.kernels):
            lines.append(f"static const msl::ArgSlot msl_slots_{i}[] = {{{', '.join(slots)}}};")
            lines.append(f'MSL_ENTRY({i}, "{host}", {function})')
        entries = [
            f'  {{"{host}", msl_call_{i}, msl_slots_{i}, msl_smallest_{i}, msl_only_read_{i}, {len(slots)}, {self.constants_of(function)}u}},'
            for i, (host, function, slots) in enumerate(self.kernels)
        ]
        constants = [f'  {{{index}, "{name}", "{kind}", &{name}, &msl_defined_{name}, sizeof {name}}},' for index, name, kind in self.constants]
        lines += ["static const msl::KernelEntry msl_kernels[] = {", *entries, "  {}};"]
        lines += ["static const msl::FunctionConstant msl_constants[] = {", *constants, "  {}};"]
        lines.append(f"extern const msl::File {table} = {{msl_kernels, {len(entries)}, msl_constants, {len(constants)}}};")
        return "\n".join(lines) + "\n"


# Language rules that no compiler flag enforces: pattern, what is wrong. Strings and comments are gone by then.
FORBIDDEN = (
    (r"\bdouble\b", "Metal has no double"),
    (r"\b(?:virtual|goto|dynamic_cast|new|delete|throw|try|catch|typeid|thread_local)\b", "Metal lacks this"),
    (r"[=(,]\s*\[[&=\w]*\]\s*\(", "Metal has no lambdas"),
    (r"\bstd::", "Metal has no std"),
    (r"\b(?:float|half|int|uint|short|ushort|char|uchar|long|ulong)[234]\s*\{|\b(?:float|half|int|uint|short|ushort)[234]\s+\w+\s*=\s*\{", "a vector takes all its components or a splat, in parentheses"),
)
SCALARS = "void|bool|char|uchar|short|ushort|int|uint|long|ulong|float|half|bfloat|size_t|u?int(?:8|16|32|64)_t"


def check_text(source):
    """What breaks rules that are seen in the text: forbidden words, pointers and references without an address space, memory declared in a body."""
    text = re.sub(r'^#.*$|"(?:[^"\\]|\\.)*"', lambda m: " " * len(m.group()), source.text, flags=re.M)
    faults = []

    def fault(position, what, found):
        faults.append(f"{source.where(position)}: {what}: {' '.join(found.split())}")

    for pattern, what in FORBIDDEN:
        for m in re.finditer(pattern, text):
            fault(m.start(), what, m.group())
    types = "|".join([SCALARS, r"[a-z]+[234]", *map(re.escape, set(re.findall(r"\b(?:struct|class|typename)\s+(\w+)", text)))])
    declared = rf"(?P<before>(?:\b[A-Za-z_]\w*\s+)*)\b(?P<type>{types})\b(?:\s*<[^<>;(){{}}]*>)?\s*(?:const\s*)?[*&]+\s*(?:const\s+)?\w+\s*(?=[,;=)\[])"
    for m in re.finditer(declared, text):
        if not re.search(r"\b(?:device|constant|threadgroup|thread)\b", m.group("before")):
            fault(m.start("type"), "a pointer or reference names no address space", m.group()[m.start("type") - m.start() :])
    for m in re.finditer(r"\bthreadgroup\s+(?:const\s+)?\w+(?:\s*<[^<>;(){}]*>)?\s+\w+\s*(?:\[[^\]]*\]\s*)*[;=]", text):
        fault(m.start(), "threadgroup memory is declared in a body; take it as an argument", m.group())
    return faults


def check(paths):
    """Checks address spaces, C++14 and the rules of the language; compiles nothing. Raises KernelError with every fault."""
    faults = []
    for path in paths:
        source = Source(path)
        faults += check_text(source)
        text = re.sub(r"\bconstant\s+(\w+\s+\w+)\s*\[\[\s*function_constant\(\d+\)\s*\]\]\s*;", r"extern constant \1;", source.text)
        text = re.sub(r"\[\[[^\]]*\]\]", lambda m: "\n" * m.group().count("\n"), text)
        text = re.sub(r"\b((?:float|half|int|uint|short|ushort|char|uchar|long|ulong)[234])\s*\(", r"mk_\1(", text)
        text = re.sub(r'^(# \d+ "[^"]*").*$', r"\1", text, flags=re.M)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "check.cpp"
            file.write_text(f"#include <metal_stdlib>\n{text}")
            done = subprocess.run([clang(), "-x", "c++", "-std=c++14", "-fsyntax-only", "-nostdinc", f"-I{HERE / 'msl_check'}", "-Werror=c++17-extensions", "-Werror=c++20-extensions",
                                   "-Wno-duplicate-decl-specifier", "-Wno-unused-value", "-ferror-limit=50", str(file)], capture_output=True, text=True)  # fmt: skip
            faults += [done.stderr.strip()] if done.returncode else []
    if faults:
        raise KernelError("\n".join(faults))


def split(parameters):
    found, depth, current = [], 0, ""
    for c in parameters:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            found.append(current)
            current = ""
        else:
            current += c
    return found + [current] if current.strip() else found


def amalgamate(paths, output):
    """Writes one source of all files, each header once: what `newLibraryWithSource:` compiles, which has no include path."""
    included, lines, constants = set(), ["#include <metal_stdlib>", "using namespace metal;"], {}

    def add(path):
        if path in included:
            return
        included.add(path)
        depth = 0
        for number, line in enumerate(path.read_text().splitlines(), 1):
            quoted = re.match(r'\s*#\s*include\s*"([^"]+)"', line)
            depth += bool(re.match(r"\s*#\s*if", line)) - bool(re.match(r"\s*#\s*endif", line))
            if quoted:
                if depth:
                    raise KernelError(f"{path}:{number}: an #include inside #if cannot be amalgamated")
                found = [folder / quoted.group(1) for folder in (path.parent, root) if (folder / quoted.group(1)).exists()]
                if not found:
                    raise KernelError(f"{path}:{number}: there is no {quoted.group(1)}")
                add(found[0].resolve())
            elif not re.match(r"\s*#\s*(pragma\s+once|include\s*<metal_)|\s*using\s+namespace\s+metal\s*;", line):
                lines.append(line)
            constant = re.match(r"\s*constant\s+\w+\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)", line)
            if constant and constants.setdefault(constant.group(2), constant.group(1)) != constant.group(1):
                raise KernelError(f"{path}:{number}: function constant {constant.group(2)} is {constants[constant.group(2)]} in another file")

    for path in map(Path, paths):
        root = path.resolve().parent
        add(path.resolve())
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text("\n".join(lines) + "\n")
    return output


def build(paths, output, race=False, undefined=False, optimize="2"):
    """Compiles the files into one library. `race` instruments every access; `undefined` traps misalignment, bad shifts, division by zero and more."""
    paths, output = [Path(p) for p in paths], Path(output)
    base = [clang(), "-std=gnu++17", f"-O{optimize}", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-strict-aliasing",
            "-ffp-contract=off", "-fno-math-errno", "-Xclang", "-fconvergent-functions", "-fno-omit-frame-pointer", "-fstack-clash-protection", *MACHINE, f"-I{HERE}", f"-I{HERE / 'msl'}", *WARNINGS]  # fmt: skip
    kernel_flags = ["-Xclang", "-ffloat16-excess-precision=none"]
    if race:
        kernel_flags += ["-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"]
    if undefined:
        kernel_flags += ["-fsanitize=alignment,shift,integer-divide-by-zero,bounds,unreachable,bool", "-fsanitize-trap=all", *unmerged_traps()]
    if race or undefined:
        kernel_flags += ["-DMSL_CHECKS"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def compile_one(numbered):
            i, path = numbered
            (folder / f"{i}.cpp").write_text(Source(path).generate(f"msl_file_{i}"))
            run([*base, *kernel_flags, "-c", str(folder / f"{i}.cpp"), "-o", str(folder / f"{i}.o")])
            return folder / f"{i}.o"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, enumerate(paths)))
        files = ", ".join(f"&msl_file_{i}" for i in range(len(paths)))
        (folder / "table.cpp").write_text(
            '#include "kernel_library.h"\n'
            + "".join(f"extern const msl::File msl_file_{i};\n" for i in range(len(paths)))
            + 'extern "C" { const msl::Runtime* msl_runtime; }\n'
            + f"static const msl::File* const files[] = {{{files}}};\n"
            + 'extern "C" __attribute__((visibility("default"))) const msl::Library msl_library = {msl::LIBRARY_VERSION, '
            + f"{int(race) + 2 * int(undefined)}, files, {len(paths)}, &msl_runtime}};\n"
        )
        extra = [HERE / "access_hooks.cpp"] if race else []
        partial = output.with_name(f".{output.name}.{os.getpid()}")
        output.parent.mkdir(parents=True, exist_ok=True)
        run([*base, "-shared", *map(str, objects), str(folder / "table.cpp"), *map(str, extra), "-o", str(partial)])
        partial.replace(output)
    return output


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "amalgamate", "check"))
    parser.add_argument("files", nargs="+")
    parser.add_argument("-o", dest="output")
    parser.add_argument("--race", action="store_true", help="instrument every load and store")
    parser.add_argument("--undefined", action="store_true", help="trap on undefined behaviour")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            check(options.files)
        elif not options.output:
            parser.error(f"{options.command} needs -o")
        elif options.command == "amalgamate":
            amalgamate(options.files, options.output)
        else:
            build(options.files, options.output, options.race, options.undefined)
    except KernelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
