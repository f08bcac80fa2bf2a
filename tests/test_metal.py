"""Whole models on the Metal backend: on a Mac its GPU, elsewhere the stand-in that runs the same kernels on the CPU, where everything is small."""
import ctypes
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference import BLOCK_OF, ReferenceModel, relative_l2
from tiny_models import MIXES, TinyConfig, random_token_ids, write_tiny_model

from ferrum.errors import DeviceError, OutOfMemory
from ferrum.gguf_file import GGUFFile
from ferrum.options import DEFAULT_MODEL
from ferrum_native import _native
from ferrum_native._native import Engine, OpRunner, plan

SMALL = TinyConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=2, expert_ffn=96, vocab=288, context=512)
WIDE = TinyConfig(layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, experts=6, top_k=2, expert_ffn=256, vocab=288, context=512)
PROOF = {"activations": "float32", "kv_type": "f32"}
# MTLCommandBufferError
INTERNAL, TIMEOUT, OUT_OF_MEMORY, DEVICE_REMOVED = 1, 2, 8, 11


def metal_is_missing():
    try:
        OpRunner("metal")
    except DeviceError as error:
        return str(error)


class StandIn:
    """The stand-in for Metal inside the extension; `present` where the build has it."""

    def __init__(self):
        library = ctypes.CDLL(_native.__file__)
        self.present = hasattr(library, "ferrum_metal_compat_fail")
        if self.present:
            self.live_objects = library.ferrum_metal_compat_live_objects
            self.live_objects.restype = ctypes.c_long
            library.ferrum_metal_compat_fail.argtypes = [ctypes.c_int64, ctypes.c_long]
            library.ferrum_metal_compat_set_executor.argtypes = [ctypes.c_uint64, ctypes.c_int]
            self.fail_command_buffer = library.ferrum_metal_compat_fail
            self.set_executor = library.ferrum_metal_compat_set_executor


STAND_IN = StandIn()
METAL_IS_MISSING = metal_is_missing()
pytestmark = pytest.mark.skipif(METAL_IS_MISSING is not None, reason=str(METAL_IS_MISSING))
needs_stand_in = pytest.mark.skipif(not STAND_IN.present, reason="made to fail on the stand-in only")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Opens a tiny model, written once: model(types, config)."""
    folder, files = tmp_path_factory.mktemp("metal"), {}

    def opened(types="Q8_0", config=SMALL):
        key = repr((types, config))
        if key not in files:
            files[key] = GGUFFile.open(write_tiny_model(folder / f"{len(files)}.gguf", types=types, config=config, seed=len(files)))
        return files[key]

    return opened


def engine_on(device, file, **options):
    """FERRUM_TEST_KERNELS names other kernels than the installed ones, such as a build with checks."""
    return Engine(file, **{"device": device, "kernels": os.environ.get("FERRUM_TEST_KERNELS"), "threads": 1, "kv_tokens": 512, "prefill_chunk": 16, "max_sequences": 8, "max_logit_rows": 64, **PROOF, **options})


def all_rows(engine, tokens, sequence=0):
    return np.array(engine.prefill(sequence, tokens, logits="all"))


@pytest.mark.parametrize("types,config", [*((kind, SMALL) for kind in ("F32", "F16", "BF16")), *((kind, SMALL if BLOCK_OF[kind] == 32 else WIDE) for kind in BLOCK_OF), *((mix, WIDE) for mix in MIXES)])
def test_a_tiny_model_equals_the_reference(model, types, config):
    file, tokens = model(types, config), random_token_ids(config, 40)
    expected = ReferenceModel(file.paths[0]).logits(tokens)
    with engine_on("metal", file) as engine:
        got = np.concatenate([all_rows(engine, tokens[:37]), *(np.array(engine.decode(0, token))[None] for token in tokens[37:])])
    assert np.median(relative_l2(expected, got)) < 5e-6
    assert (expected.argmax(-1) == got.argmax(-1)).mean() > 0.97


def test_the_options_in_force_say_that_activations_are_floats(model):
    with engine_on("metal", model(), activations="int8") as metal, engine_on("cpu", model(), activations="int8") as cpu:
        assert (metal.options["activations"], cpu.options["activations"]) == ("float32", "int8")


def test_keys_and_values_in_f16(model):
    file, tokens = model(), random_token_ids(SMALL, 40)
    with engine_on("metal", file, kv_type="f16") as engine, engine_on("cpu", file, kv_type="f16") as cpu:
        assert np.median(relative_l2(all_rows(cpu, tokens), all_rows(engine, tokens))) < 1e-4


def test_a_context_longer_than_a_split_of_attention(model):
    file, tokens = model(), random_token_ids(SMALL, 300)
    with engine_on("metal", file, prefill_chunk=128) as engine, engine_on("cpu", file) as cpu:
        for each in (engine, cpu):
            each.prefill(0, tokens, logits="none")
            each.prefill(1, tokens[:20], logits="none")
        batches = [np.array(each.decode_batch([0, 1], [5, 6])) for each in (cpu, engine)]
        assert relative_l2(*batches).max() < 1e-4


def test_no_sequence_shows_in_another(model):
    """Sequences of different lengths, together in prompts and in batches, have the logits that each has alone; freed blocks are NaN."""
    file = model()
    prompts = [random_token_ids(SMALL, length, seed=length) for length in (1, 33, 7, 16, 17, 25)]
    with engine_on("cpu", file) as cpu:
        expected = []
        for tokens in prompts:
            rows = [np.array(cpu.prefill(0, tokens))] + [np.array(cpu.decode(0, 40 + i)) for i in range(3)]
            expected.append(rows)
            cpu.release(0)
    with engine_on("metal", file, poison_freed_kv=True, prefill_chunk=128) as engine:
        for _ in range(2):  # the second time in blocks that hold NaN
            together = np.array(engine.step([(s, tokens, "last") for s, tokens in enumerate(prompts)]))
            rounds = [together] + [np.array(engine.decode_batch(range(len(prompts)), [40 + i] * len(prompts))) for i in range(3)]
            for s, rows in enumerate(expected):
                for i, row in enumerate(rows):
                    assert relative_l2(row[None], rounds[i][s][None])[0] < 1e-4, (s, i)
            engine.reset()


def test_keys_and_values_in_q8_0_are_refused_by_name(model):
    for call in (plan, Engine):
        with pytest.raises(DeviceError, match="kv_type q8_0 runs on the CPU only.* Choose kv_type f16 or device cpu"):
            call(model(), device="metal", kv_type="q8_0")


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_a_sequence_goes_on_from_keys_and_values_that_were_exported(model, kv_type):
    tokens = random_token_ids(SMALL, 21)
    with engine_on("cpu", model(), kv_type=kv_type) as cpu, engine_on("metal", model(), kv_type=kv_type, poison_freed_kv=True) as engine:
        for each in (cpu, engine):
            each.prefill(0, tokens, logits="none")
        kv = engine.export_kv(0)
        assert kv.shape == (2, 2, 21, 2, 32)
        assert relative_l2(cpu.export_kv(0).reshape(-1, 32).astype("f4"), kv.reshape(-1, 32).astype("f4")).max() < 5e-3
        engine.import_kv(1, tokens, kv)
        assert np.array_equal(engine.export_kv(1), kv)
        together = np.array(engine.decode_batch([0, 1], [9, 9]))
        assert np.array_equal(together[0], together[1])


def test_imported_keys_and_values_reach_both_compared_devices(model):
    tokens = random_token_ids(SMALL, 21)
    with engine_on("cpu", model()) as cpu, engine_on("metal", model(), compare_with="cpu") as engine:
        cpu.prefill(0, tokens, logits="none")
        engine.import_kv(0, tokens, cpu.export_kv(0))
        assert relative_l2(np.array(cpu.decode(0, 9))[None], np.array(engine.decode(0, 9))[None])[0] < 1e-4


def test_a_beginning_is_adopted(model):
    tokens = random_token_ids(SMALL, 40)
    with engine_on("metal", model(), poison_freed_kv=True) as engine:
        expected = np.array(engine.prefill(0, tokens))
        engine.release(0)
        assert engine.adopt(1, tokens) == 32
        assert relative_l2(expected[None], np.array(engine.prefill(1, tokens[32:]))[None])[0] < 1e-4


def test_a_fork_goes_on_as_its_source(model):
    tokens = random_token_ids(SMALL, 21)
    with engine_on("metal", model(), poison_freed_kv=True) as engine:
        engine.prefill(0, tokens, logits="none")
        engine.fork(0, 1)
        engine.decode(1, 9)
        engine.release(1)
        engine.fork(0, 2)
        engine.release(0)
        forked = np.array(engine.decode(2, 9))
        engine.prefill(3, tokens, logits="none")
        assert relative_l2(np.array(engine.decode(3, 9))[None], forked[None])[0] < 1e-5


def test_candidates_are_those_of_the_logits(model):
    tokens = random_token_ids(SMALL, 12)
    with engine_on("metal", model()) as engine:
        logits = all_rows(engine, tokens)
        edits = [(0, int(logits[0].argmax()), 2.0, -1.0), (3, 7, 1.0, 50.0)]
        got = engine.candidates(5, edits=edits, temperatures=[0.7] * 12, targets=[[1, 2]] * 12)
        assert np.array_equal(np.asarray(engine.candidates(1).logits)[:, 0], logits.max(-1))
    for row, token, penalty, bias in edits:
        value = logits[row, token]
        logits[row, token] = (value / penalty if value > 0 else value * penalty) + bias
    assert np.array_equal(got.ids, np.argsort(-logits, axis=-1, kind="stable")[:, :5])
    assert np.allclose(got.log_sum_exp, np.log(np.exp(logits.astype(np.float64)).sum(-1)), rtol=1e-6)
    assert np.allclose(got.log_sum_exp_at_temperature, np.log(np.exp(logits.astype(np.float64) / np.float32(0.7)).sum(-1)), rtol=1e-6)
    assert np.array_equal(got.target_logits, logits[:, [1, 2]])


# What a step asks of the device

def asked(engine, call):
    before = engine.stats()
    call()
    after = engine.stats()
    return {name: after[name] - before[name] for name in ("dispatches", "command_buffers", "uploads", "pipelines")}


def asked_per_layer(model, call, **options):
    """What a layer adds to `call`, and what one step asks; the layers but one are equal."""
    counts = []
    for layers in (2, 3):
        config = TinyConfig(**{**SMALL.__dict__, "layers": layers})
        with engine_on("metal", model("Q8_0", config), max_sequences=32, kv_tokens=1024, prefill_chunk=64, **options) as engine:
            for sequence in range(32):
                engine.prefill(sequence, [sequence], logits="none")
            call(engine)  # compiles what it needs
            counts.append(asked(engine, lambda: call(engine)))
    return {name: counts[1][name] - counts[0][name] for name in counts[0]}, counts[1]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 16, 17, 31, 32])
def test_a_decode_step_takes_at_most_ten_dispatches_a_layer(model, batch):
    layer, step = asked_per_layer(model, lambda engine: engine.decode_batch(range(batch), [3] * batch))
    assert layer["dispatches"] <= 10 and layer["uploads"] == layer["command_buffers"] == layer["pipelines"] == 0
    assert step["command_buffers"] == 1 and step["uploads"] == 1 and step["pipelines"] == 0


@pytest.mark.parametrize("batch", [1, 32])
def test_decoding_beyond_a_split_of_the_context_takes_at_most_ten_dispatches_a_layer(model, batch):
    counts = []
    for layers in (1, 2):
        config = TinyConfig(**{**SMALL.__dict__, "layers": layers})
        with engine_on("metal", model("Q8_0", config), prefill_chunk=128, max_sequences=32, kv_tokens=1024) as engine:
            engine.prefill(0, random_token_ids(config, 300), logits="none")
            for sequence in range(1, batch):
                engine.prefill(sequence, [sequence], logits="none")
            counts.append(asked(engine, lambda: engine.decode_batch(range(batch), [3] * batch))["dispatches"])
    assert counts[1] - counts[0] <= 10


@pytest.mark.parametrize("chunks", [[(40, 33, "last")], [(40, 60, "none")], [(0, 1, "last"), (40, 20, "last"), (41, 19, "all")]], ids=["prompt", "no_logits", "mixed"])
def test_a_prefill_step_takes_at_most_sixteen_dispatches_a_layer(model, chunks):
    def call(engine):
        for sequence, *_ in chunks[-2:]:
            engine.release(sequence) if sequence >= 40 and sequence in live else None
        live.update(sequence for sequence, *_ in chunks)
        engine.step([(sequence, [7] * count, logits) for sequence, count, logits in chunks])

    counts = []
    for layers in (2, 3):
        live = set()
        config = TinyConfig(**{**SMALL.__dict__, "layers": layers})
        with engine_on("metal", model("Q8_0", config), prefill_chunk=64) as engine:
            call(engine)
            counts.append(asked(engine, lambda: call(engine)))
    assert counts[1]["dispatches"] - counts[0]["dispatches"] <= 16
    assert counts[1]["command_buffers"] == counts[1]["uploads"] == 1 and counts[1]["pipelines"] == 0


def test_the_speed_of_memory_is_measured_and_every_op_is_profiled(model):
    with engine_on("metal", model(), profile=True) as engine:
        engine.prefill(0, [1, 2, 3])
        engine.decode(0, 4)
        assert engine.measure_bandwidth() > 1e6
        assert {"embed", "norm", "qkv", "attention", "route", "experts_down", "head"} <= set(engine.profile()["phases"]["decode"]["ops"])


# What is left after an error

def history(engine, attempt):
    """A prompt in chunks, a fork whose shared block is copied, a batch, a mixed step and candidates; returns all logits."""
    tokens = random_token_ids(SMALL, 20)
    rows = [attempt(lambda: all_rows(engine, tokens))]
    engine.fork(0, 1)
    rows.append(attempt(lambda: np.array(engine.decode_batch([0, 1], [8, 9]))))
    attempt(lambda: engine.reserve(1, 30))
    rows.append(attempt(lambda: np.array(engine.step([(1, [3, 4], "all"), (2, [6], "last")]))))
    rows.append(attempt(lambda: engine.candidates(5, edits=[(0, 3, 1.5, 2.0), (1, 3, 1.5, 2.0)]).logits))
    rows.append(attempt(lambda: engine.candidates(5).logits))
    return rows


@needs_stand_in
@pytest.mark.parametrize("code,kind", [(INTERNAL, DeviceError), (TIMEOUT, DeviceError), (OUT_OF_MEMORY, OutOfMemory)])
def test_every_command_buffer_may_fail_once_and_the_next_request_succeeds(model, code, kind):
    file = model()
    with engine_on("metal", file, poison_freed_kv=True) as engine:
        clean = history(engine, lambda call: call())
        command_buffers = engine.stats()["command_buffers"]
    assert command_buffers >= 6
    for number in range(command_buffers):
        failures = []
        with engine_on("metal", file, poison_freed_kv=True) as engine:

            def attempt(call):
                before = engine.stats()["kv_blocks_free"], engine.stats()["live_sequences"]
                try:
                    return call()
                except kind as error:
                    failures.append(str(error))
                    assert (engine.stats()["kv_blocks_free"], engine.stats()["live_sequences"]) == before
                    return call()

            STAND_IN.fail_command_buffer(number, code)
            try:
                rows = history(engine, attempt)
            finally:
                STAND_IN.fail_command_buffer(-1, 0)
        assert len(failures) == 1, number
        for row, expected in zip(rows, clean):
            assert np.array_equal(row, expected), number


@pytest.mark.parametrize("profile", [False, True], ids=["plain", "profiled"])
def test_every_call_may_fail_once_and_the_next_request_succeeds(model, profile):
    """As in test_failures.py: here an op that fails leaves others behind that were encoded and never ran."""
    file = model()
    with engine_on("metal", file) as engine:
        clean = history(engine, lambda call: call())
    for fail_at in range(0, 1000, 3):
        failures = []
        with engine_on("metal", file, fail_at=fail_at, poison_freed_kv=True, profile=profile) as engine:

            def attempt(call):
                try:
                    return call()
                except DeviceError as error:
                    failures.append(str(error))
                    return call()

            rows = history(engine, attempt)
        if not failures:
            break
        assert all(np.array_equal(row, expected) for row, expected in zip(rows, clean)), fail_at
    assert fail_at > 80


@needs_stand_in
def test_an_engine_whose_device_is_lost_says_so(model):
    with engine_on("metal", model()) as engine:
        engine.prefill(0, [1, 2, 3], logits="none")
        STAND_IN.fail_command_buffer(0, DEVICE_REMOVED)
        for _ in range(2):
            with pytest.raises(DeviceError, match="lost.*Make a new Engine"):
                engine.decode(0, 4)
        assert engine.length(0) == 3
    with engine_on("metal", model()) as engine:
        engine.prefill(0, [1, 2, 3])


def settled(objects):
    """Whether only so many objects are left, once the queue's thread has let go of its last command buffer."""
    deadline = time.monotonic() + 5
    while STAND_IN.live_objects() != objects and time.monotonic() < deadline:
        time.sleep(0.001)
    return STAND_IN.live_objects() == objects


@needs_stand_in
def test_close_releases_every_object(model):
    gc.collect()
    assert settled(0)
    engine = engine_on("metal", model())
    engine.prefill(0, list(range(30)))
    engine.candidates(3)
    assert STAND_IN.live_objects() > 0
    engine.close()
    assert settled(0)
    with pytest.raises(OutOfMemory):
        engine_on("metal", model(), memory_budget=1 << 20, kv_tokens=1 << 16)
    plan(model(), device="metal")
    assert settled(0)


def test_logits_outlive_their_engine(model):
    with engine_on("metal", model()) as engine:
        view = np.asarray(engine.prefill(0, [1, 2, 3]))
        kept = view.copy()
    assert np.array_equal(view, kept)


@needs_stand_in
def test_the_order_of_lanes_changes_nothing(model):
    tokens = random_token_ids(SMALL, 20)
    results = []
    try:
        for seed in (0, 1, 2):
            STAND_IN.set_executor(seed, 0)
            with engine_on("metal", model()) as engine:
                results.append(np.concatenate([all_rows(engine, tokens), np.array(engine.decode(0, 5))[None]]))
    finally:
        STAND_IN.set_executor(0, 0)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


# Where the kernels come from

def test_kernels_that_are_compiled_from_their_source(model, tmp_path):
    source = Path(_native.__file__).with_name("kernels.metal")
    tokens = random_token_ids(SMALL, 10)
    with engine_on("metal", model()) as engine, engine_on("metal", model(), kernels=str(source)) as compiled:
        assert np.array_equal(all_rows(engine, tokens), all_rows(compiled, tokens))
    faulty = tmp_path / "faulty.metal"
    faulty.write_text(source.read_text().replace("kernel void norm(", "kernel void norm(nonsense", 1))
    with pytest.raises(DeviceError, match="could not load ferrum's kernels"):
        engine_on("metal", model(), kernels=str(faulty))
    missing = tmp_path / "missing.metal"
    missing.write_text("#include <metal_stdlib>\nkernel void unrelated(device float* x [[buffer(0)]]) { x[0] = 1.0f; }\n")
    with engine_on("metal", model(), kernels=str(missing)) as engine:
        with pytest.raises(DeviceError, match="kernel embed"):
            engine.prefill(0, tokens)
        assert engine.stats()["live_sequences"] == 0


# Two backends op by op

def test_metal_beside_the_cpu(model):
    for types, config in (("Q8_0", SMALL), ("Q4_K_M", WIDE)):
        with engine_on("metal", model(types, config), compare_with="cpu", compare_tolerance=1e-4) as engine:
            assert "metal" in engine.device and "beside cpu" in engine.device
            engine.prefill(0, random_token_ids(config, 20))
            engine.fork(0, 1)
            engine.decode_batch([0, 1], [3, 4])
            engine.candidates(4, edits=[(0, 1, 1.5, 0.0)])


def test_a_difference_is_named_with_op_and_place(model):
    with engine_on("metal", model(), compare_with="cpu", compare_tolerance=0.0) as engine:
        with pytest.raises(DeviceError, match=r"metal .* differs from cpu .* in \w+, call \d+ of step 1.* at row \d+, column \d+ of .*: .* instead of "):
            engine.prefill(0, random_token_ids(SMALL, 20))


# The demo model

def test_the_demo_model_teacher_forced():
    file = GGUFFile.open(DEFAULT_MODEL)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 1000, 8)]
    with engine_on("metal", file) as engine, engine_on("cpu", file) as cpu:
        expected, got = ([all_rows(each, tokens), *(np.array(each.decode(0, token))[None] for token in (17, 300))] for each in (cpu, engine))
    assert np.concatenate([relative_l2(a, b) for a, b in zip(expected, got)]).max() < 1e-4


def test_generate_prints_the_cpu_text():
    printed = {}
    for device in ("cpu", "metal"):
        command = [sys.executable, "-m", "ferrum", "generate", "--device", device, "--activations", "float32", "--kv-type", "f32", "Once upon a time", "--temperature", "0", "-n", "12"]
        printed[device] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    assert printed["metal"].stdout == printed["cpu"].stdout and len(printed["cpu"].stdout) > 30
    assert sys.platform == "darwin" or printed["metal"].stderr.count("device metal runs the Metal kernels on the CPU here") == 1
