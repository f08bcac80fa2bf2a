"""The stand-in for Metal: every detector fires on a planted fault and is silent on the same kernel without it."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "ferrum_native" / "metal_compat"))
import mslc  # noqa: E402

if not mslc.find_clang():
    pytest.skip("clang of version 15 or later is not installed", allow_module_level=True)

from metal_runner import COMPAT, EXECUTOR, KernelFault, kernel_names, run  # noqa: E402

FAULTS = ROOT / "tests" / "data" / "metal_faults"
BUILDS = ("", "race", "undefined", "all")


def int32(*values):
    return np.array(values, dtype=np.int32)


def run_race(kernel, groups=3, checks="race", seed=0, buffers=None):
    out = np.zeros(groups * 64, np.float32)
    takes_shared = not kernel.startswith(("device_memory", "threadgroups_", "counter_"))
    run(FAULTS / "races.metal", kernel, None, [out] if buffers is None else buffers, (groups,), (64,), 256 if takes_shared else 0, seed=seed, checks=checks)
    return out


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "kernel",
    ["neighbour_without_barrier", "neighbour_with_barrier_of_device_memory", "rounds_without_second_barrier", "lanes_without_barrier", "lanes_with_a_sum_for_a_barrier",
     "simdgroups_with_a_lanes_barrier", "device_memory_with_barrier_of_threadgroup_memory", "threadgroups_write_one_place", "threadgroups_read_each_other"],
)  # fmt: skip
def test_a_race_is_found_in_every_order(kernel, seed):
    with pytest.raises(KernelFault, match=rf"kernel {kernel}, .*race: thread \d+ (reads|writes) .* no barrier between, in races.metal:\d+"):
        run_race(kernel, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", ["neighbour_with_barrier", "lanes_with_barrier", "halves_of_a_word", "device_memory_with_barrier"])
def test_ordered_accesses_are_no_race(kernel, seed):
    lane = np.tile(np.arange(64), 3)
    assert (run_race(kernel, seed=seed) == (lane ^ 1 if kernel == "lanes_with_barrier" else 63 - lane)).all()


def test_atomics_race_only_with_plain_accesses():
    count, same, seen = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    run_race("counter_by_atomics", buffers=[count], seed=5)
    assert count == 192
    for kernel, buffers in (("counter_without_atomics", [count]), ("counter_read_beside_atomics", [count, same, seen])):
        with pytest.raises(KernelFault, match="race"):
            run_race(kernel, groups=1, buffers=buffers)


def test_a_seed_gives_one_order_and_seeds_differ():
    """Without instrumentation a lost barrier shows by its result, in the order that the seed names."""

    def seen(seed):
        return run_race("neighbour_without_barrier", checks="", seed=seed)

    assert all(np.isnan(seen(seed)).any() for seed in range(4)), "unwritten threadgroup memory is NaN"
    results = [seen(seed).tobytes() for seed in range(4)]
    assert len(set(results)) > 2
    assert results == [seen(seed).tobytes() for seed in range(4)]


@pytest.mark.parametrize("checks", BUILDS)
def test_unwritten_threadgroup_memory_is_nan(checks):
    out = np.zeros(64, np.float32)
    run(FAULTS / "bounds.metal", "unwritten", None, [out], (1,), (64,), 256, checks=checks)
    assert (out[::2] == 1).all() and np.isnan(out[1::2]).all()


@pytest.mark.parametrize("checks", BUILDS)
@pytest.mark.parametrize(
    "kernel, sizes, buffers, threadgroup_bytes, what",
    [
        ("copies", (64, 1), 2, 0, r"reads .*4 bytes past the end of buffer\(1\) of 256 bytes|reads .*1 bytes past the end of buffer\(1\) of 256 bytes"),
        ("copies", (64, 2000), 2, 0, "reads"),
        ("copies", (64, -4000), 2, 0, "reads"),
        ("writes_one_too_many", (63, 0), 1, 0, None),
        ("writes_one_too_many", (64, 0), 1, 0, r"writes .* past the end of buffer\(1\) of 256 bytes"),
        ("threadgroup_memory", (0, 1), 1, 256, "writes .*at byte 256 of 256 bytes of threadgroup memory"),
        ("deep_stack", (99999, 5), 1, 0, "stack overflow: thread 0 uses more than 131072 bytes"),
    ],
)
def test_an_access_out_of_bounds_fails_the_dispatch(kernel, sizes, buffers, threadgroup_bytes, what, checks):
    out = [np.zeros(64, np.float32) for _ in range(buffers)]
    groups = 2 if kernel == "writes_one_too_many" else 1
    call = lambda: run(FAULTS / "bounds.metal", kernel, int32(*sizes).tobytes(), out, (groups,), (64,), threadgroup_bytes, checks=checks)
    if what is None:
        return call()
    with pytest.raises(KernelFault, match=f"({what}).*in (bounds.metal|entry_points):(\\d+|\\?)"):
        call()
    run(FAULTS / "bounds.metal", "copies", int32(64, 0).tobytes(), [out[0], out[0].copy()], (1,), (64,), checks=checks)  # the executor goes on


@pytest.mark.parametrize("checks", ["race", "all"])
def test_instrumented_builds_see_accesses_just_before_a_buffer(checks):
    """Where no page without access lies: before a buffer, and before threadgroup memory."""
    out = [np.zeros(64, np.float32) for _ in range(2)]
    with pytest.raises(KernelFault, match=r"reads 4 bytes, 4 bytes before buffer\(1\)"):
        run(FAULTS / "bounds.metal", "copies", int32(64, -1).tobytes(), out, (1,), (64,), checks=checks)
    with pytest.raises(KernelFault, match="writes 4 bytes, at byte -4 of 256 bytes of threadgroup memory"):
        run(FAULTS / "bounds.metal", "threadgroup_memory", int32(64, -1).tobytes(), out[:1], (1,), (64,), 256, checks=checks)


@pytest.mark.parametrize("checks", BUILDS)
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(
    "kernel",
    ["barrier_in_a_branch", "return_before_a_barrier", "return_before_a_sum", "barriers_of_two_branches", "operations_of_two_branches", "one_function_of_two_branches",
     "loop_of_unequal_lengths"],
)  # fmt: skip
def test_a_meeting_of_lanes_in_divergent_flow_is_found(kernel, seed, checks):
    with pytest.raises(KernelFault, match=rf"kernel {kernel}, .*divergent flow.*divergence.metal:\d+"):
        run(FAULTS / "divergence.metal", kernel, None, [np.zeros(64, np.float32)], (1,), (64,), seed=seed, checks=checks)


@pytest.mark.parametrize("checks", ["race", "undefined"])
def test_a_matrix_load_in_divergent_flow_is_found_by_builds_with_checks(checks):
    with pytest.raises(KernelFault, match="divergent flow: .*simdgroup_(load|store)"):
        run(FAULTS / "divergence.metal", "matrix_in_a_branch", None, [np.zeros(64, np.float32)], (1,), (64,), checks=checks)


@pytest.mark.parametrize("checks", BUILDS)
def test_uniform_flow_is_not_divergent(checks):
    out = np.zeros(64, np.float32)
    run(FAULTS / "divergence.metal", "uniform_flow", None, [out], (1,), (64,), seed=3, checks=checks)
    assert (out == np.repeat([32 + 93, 64 + 93], 32)).all()


@pytest.mark.parametrize("checks", ["undefined", "all"])
@pytest.mark.parametrize(
    "kernel, good, bad, dtype",
    [("loads_a_word", 4, 2, np.uint8), ("loads_a_vector", 4, 1, np.float32), ("shifts", 3, 32, np.int32), ("shifts", 0, -1, np.int32), ("divides", 3, 0, np.int32), ("indexes", 3, 4, np.int32)],
)
def test_undefined_behaviour_fails_the_dispatch(kernel, good, bad, dtype, checks):
    call = lambda value: run(FAULTS / "undefined.metal", kernel, None, [np.arange(1024).astype(dtype), int32(value), np.zeros(32, np.float32)], (1,), (32,), checks=checks)
    call(good)
    with pytest.raises(KernelFault, match=rf"kernel {kernel}, .*undefined behaviour: thread \d+ .*undefined.metal:(\d+|\?)"):
        call(bad)


def test_the_language_check_reports_exactly_the_marked_lines():
    """Address spaces, C++14 and the rest of the rules; a line that says `wrong` is reported, and no other."""
    source = FAULTS / "address_spaces.metal"
    wrong = {i for i, line in enumerate(source.read_text().splitlines(), 1) if "// wrong:" in line}
    with pytest.raises(mslc.KernelError) as caught:
        mslc.check([source])
    reported = {int(m.group(1)) for m in re.finditer(r"^\S*address_spaces\.metal:(\d+):(?! note|\d+: note)", str(caught.value), flags=re.M)}
    assert reported == wrong


def test_the_language_check_passes_kernels_without_such_faults():
    mslc.check([FAULTS / name for name in ("races.metal", "bounds.metal", "divergence.metal", "undefined.metal")])


def compile_text(tmp_path, text, **options):
    (tmp_path / "k.metal").write_text(f"#include <metal_stdlib>\nusing namespace metal;\n{text}\n")
    return mslc.build([tmp_path / "k.metal"], tmp_path / "k.metallib", **options)


@pytest.mark.parametrize(
    "text, what",
    [
        ("kernel void k(device float* x) {}", r"k\.metal:3: kernel k: a parameter needs one attribute: device float\* x"),
        ("\nkernel void k(device float* x [[bufer(0)]]) {}", r"k\.metal:4: kernel k: unknown attribute \[\[bufer\]\]"),
        ("kernel void k(device float* x [[buffer(31)]]) {}", r"\[\[buffer\(31\)\]\] is out of range"),
        ("kernel void k(device float* x [[buffer(0)]]) {}\nkernel void k(device int* x [[buffer(0)]]) {}", "two kernels are named k"),
        ('template [[host_name("a")]] kernel decltype(t<int>) t<int>;', "a instantiates no kernel template"),
        ("constant float4 c [[function_constant(0)]];", "function constant c is float4"),
        ("constant int c [[function_constant(0)]];\nconstant int twice = 2 * c;", r"k\.metal:4: .*computed from function constant c"),
        ("kernel void k(float3 x [[thread_position_in_grid]]) {}", "uint or ushort"),
        ("kernel void k(device float* x [[buffer(0)]]) { x[0] = y; }", r"k\.metal:3:55: error: use of undeclared identifier 'y'"),
    ],
)
def test_faults_of_a_source_are_errors_with_file_and_line(tmp_path, text, what):
    with pytest.raises((mslc.KernelError, KernelFault), match=what):
        compile_text(tmp_path, text)


LIBRARY = """
constant int kept [[function_constant(2)]];
constant bool doubled [[function_constant(5)]];
constant float unused [[function_constant(6)]];
static float scaled(float x) { return doubled ? 2.0f * x : x; }

template <typename T> kernel void shift(device T* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] = T(scaled(float(x[i]))) + T(kept); }
template [[host_name("shift_f32")]] kernel decltype(shift<float>) shift<float>;
template [[host_name("shift_f16")]] kernel decltype(shift<half>) shift<half>;
kernel void plain(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] += 1.0f; }
"""


def test_function_constants_are_per_dispatch_and_must_have_values(tmp_path):
    compile_text(tmp_path, LIBRARY)
    file = tmp_path / "k.metal"
    assert kernel_names(file) == ["plain", "shift_f32", "shift_f16"]
    x, h = np.arange(32, dtype=np.float32), np.arange(32, dtype=np.float16)
    run(file, "plain", None, [x], (1,), (32,))
    run(file, "shift_f32", None, [x], (1,), (32,), constants={"kept": 7, "doubled": True})
    run(file, "shift_f32", None, [x], (1,), (32,), constants={2: -1, "doubled": False})
    run(file, "shift_f16", None, [h], (1,), (32,), constants={"kept": 3, "doubled": False})
    assert (x == 2 * (np.arange(32) + 1) + 6).all() and (h == np.arange(32) + 3).all()
    with pytest.raises(KernelFault, match=r"kernel shift_f32 reads function constant doubled \(5\), which has no value"):
        run(file, "shift_f32", None, [x], (1,), (32,), constants={"kept": 7})


@pytest.mark.parametrize(
    "threads, threadgroup_bytes, buffers, what",
    [
        (33, 256, 1, "33 threads per threadgroup"),
        (1056, 256, 1, "1056 threads per threadgroup"),
        (64, 255, 1, r"threadgroup\(0\) has 255 bytes, not a multiple of 16"),
        (64, 0, 1, r"threadgroup\(0\) has no length"),
        (64, 32784, 1, "32784 bytes of threadgroup memory"),
        (64, 256, 0, r"buffer\(0\) is not bound"),
    ],
)
def test_what_metal_refuses_is_refused(threads, threadgroup_bytes, buffers, what):
    with pytest.raises(KernelFault, match=what):
        run(FAULTS / "races.metal", "neighbour_with_barrier", None, [np.zeros(64, np.float32)] * buffers, (1,), (threads,), threadgroup_bytes)
    with pytest.raises(KernelFault, match=r"buffer\(0\) has 4 bytes, the kernel's argument 8"):
        run(FAULTS / "bounds.metal", "copies", bytes(4), [np.zeros(64, np.float32)] * 2, (1,), (64,))


def test_amalgamated_source_compiles_without_includes(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "sizes.h").write_text("#pragma once\nstruct Sizes { int n; };\n")
    (tmp_path / "helper.h").write_text('#pragma once\n#include "shared/sizes.h"\nstatic inline int twice(int n) { return 2 * n; }\n')
    for name in "ab":
        (tmp_path / f"{name}.metal").write_text(
            f'#include <metal_stdlib>\n#include "helper.h"\n#include "shared/sizes.h"\nusing namespace metal;\n'
            f"kernel void {name}(constant Sizes& s [[buffer(0)]], device int* x [[buffer(1)]], uint i [[thread_position_in_grid]]) {{ x[i] = twice(s.n); }}\n"
        )
    one = mslc.amalgamate([tmp_path / "a.metal", tmp_path / "b.metal"], tmp_path / "elsewhere" / "one.metal")
    assert '#include "' not in one.read_text() and one.read_text().count("struct Sizes") == 1
    x = np.zeros(32, np.int32)
    run(one, "b", int32(21).tobytes(), [x], (1,), (32,))
    assert (x == 42).all()


def metal_files():
    return sorted((ROOT / "metal_src").glob("*.metal"))


def test_the_shipped_source_keeps_the_rules_and_compiles_as_one_text(tmp_path):
    one = mslc.amalgamate(metal_files(), tmp_path / "kernels.metal")
    mslc.check([one])
    mslc.build([one], tmp_path / "kernels.metallib", optimize="0")
    assert sorted(kernel_names(one)) == sorted(name for file in metal_files() for name, _, _ in mslc.Source(file).kernels)


def setup_py(**environment):
    """`setup.py` as far as the choice of the toolchain, with no tool on the PATH."""
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": "/nonexistent", "FERRUM_CLANG": "", **environment}, capture_output=True, text=True)


def test_a_build_that_wants_metal_without_its_tools_names_the_packages():
    missing = setup_py(FERRUM_METAL="on")
    assert missing.returncode != 0
    assert "FERRUM_METAL=on: there is no clang++" in missing.stderr and "apt-get install --no-install-recommends clang-19 libobjc-12-dev" in missing.stderr
    assert "is not one of auto, on, off" in setup_py(FERRUM_METAL="yes").stderr
    assert "ferrum is built without Metal: there is no clang++" in setup_py(FERRUM_METAL="auto").stdout


def libobjc():
    found = [Path(path).parents[2] for path in Path("/usr/lib").glob("gcc*/*/*/include/objc/objc.h")]
    return max((folder for folder in found if (folder / "libobjc.so").exists()), default=None, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])


@pytest.mark.skipif(libobjc() is None, reason="libobjc is not installed")
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_objects_queues_and_errors_behave_as_metal_says(tmp_path, sanitize):
    """A program of tests in Objective-C++ (metal_objects.mm): prints one line per test and the objects that are left."""
    (tmp_path / "metal_compat").symlink_to(COMPAT)
    library = compile_text(tmp_path, LIBRARY)
    sources = [COMPAT / name for name in EXECUTOR] + [COMPAT / "source_compiler.cpp"]
    sources += [COMPAT / f"{name}.mm" for name in ("foundation", "blocks", "device", "queue")] + [ROOT / "tests" / "metal_objects.mm"]
    common = [mslc.clang(), "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-fvisibility=hidden", f"-I{ROOT / 'ferrum_native'}"]
    common += [f"-I{COMPAT / 'include'}", f"-I{COMPAT}", "-isystem", f"{libobjc()}/include", "-fno-objc-arc", "-fobjc-runtime=gcc", "-fconstant-string-class=NSConstantString", "-fblocks"]
    common += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
    built = subprocess.run([*common, *map(str, sources), f"-L{libobjc()}", "-lobjc", "-ldl", "-lpthread", "-o", str(tmp_path / "objects")], capture_output=True, text=True)
    if sanitize and "libclang_rt" in built.stderr:
        pytest.skip("clang's sanitizer runtime is not installed")
    assert built.returncode == 0, built.stderr
    (tmp_path / "suppressions").write_text("leak:libobjc.so\n")  # its tables of classes; the program counts the objects
    environment = {**os.environ, "LSAN_OPTIONS": f"suppressions={tmp_path}/suppressions:print_suppressions=0", "ASAN_OPTIONS": "external_symbolizer_path="}
    done = subprocess.run([tmp_path / "objects", library], capture_output=True, text=True, timeout=120, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0 objects left"
