"""Calls that nobody should make, and files that contradict themselves: each is refused, none hangs or crashes."""

import math
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import TinyConfig, write_tiny_model

from ferrum.errors import ContextFull, EngineClosed, ModelFileError, UnsupportedModelError
from ferrum.gguf_file import GGUFFile
from ferrum_native import _native
from ferrum_native._native import Engine

SMALL = dict(threads=1, kv_tokens=2048, prefill_chunk=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return GGUFFile.open(write_tiny_model(tmp_path_factory.mktemp("misuse") / "tiny.gguf", config=TinyConfig(layers=1), types="Q4_K_M", seed=1))


@pytest.fixture
def engine(tiny):
    with Engine(tiny, **SMALL) as engine:
        yield engine


def with_metadata(file, **changes):
    """The file as the engine reads it, with some `qwen3moe.` keys replaced (__ stands for a dot)."""
    metadata = dict(file.metadata)
    metadata.update({f"qwen3moe.{key.replace('__', '.')}": value for key, value in changes.items()})
    return SimpleNamespace(paths=file.paths, metadata=metadata, tensors=file.tensors)


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60)


# re-entrancy, processes and threads

def test_an_argument_that_calls_the_engine_is_read_before_the_call(engine):
    engine.prefill(0, [1, 2])
    edits = ((0, engine.length(0), 1.0, 0.0) for _ in range(2))
    assert engine.candidates(1, edits=edits, temperatures=(1.0 for _ in range(1))).ids.shape == (1, 1)


def test_a_signal_handler_that_calls_the_engine_is_refused_and_the_prefill_taken_back(tiny):
    with Engine(tiny, **{**SMALL, "prefill_chunk": 1}) as engine:
        previous = signal.signal(signal.SIGALRM, lambda *_: engine.stats())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with pytest.raises(RuntimeError, match="inside a call"):
                while True:
                    engine.prefill(0, [1] * 1000, logits="none")
                    engine.reset()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert engine.stats()["live_sequences"] == 0


@pytest.mark.slow_under_sanitizers
def test_a_process_forked_in_the_middle_of_a_step_refuses_to_use_the_engine(tiny):
    code = """
import os, sys, threading, time
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine
engine = Engine(GGUFFile.open(sys.argv[1]), threads=2, kv_tokens=2048)
def work():
    while True:
        engine.prefill(0, [1] * 1500, logits="none")
        engine.reset()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
child = os.fork()
if child == 0:
    for call in (engine.stats, lambda: engine.release(0)):
        try:
            call()
        except RuntimeError as error:
            assert "another process" in str(error)
        else:
            os._exit(1)
    engine.close()
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = run(code, tiny.paths[0])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow_under_sanitizers
def test_a_daemon_thread_in_a_step_does_not_abort_the_end_of_the_program(tiny):
    code = """
import sys, threading, time
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine
engine = Engine(GGUFFile.open(sys.argv[1]), threads=1, kv_tokens=2048, prefill_chunk=8)
def work():
    while True:
        engine.prefill(0, [1] * 1500)
        engine.reset()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""
    for _ in range(3):
        done = run(code, tiny.paths[0])
        assert done.returncode == 0, done.stderr


def test_close_while_another_thread_works(tiny):
    engine = Engine(tiny, **SMALL)
    ended = []

    def work():
        try:
            while True:
                engine.prefill(0, [1] * 200, logits="none")
                engine.reset()
        except EngineClosed:
            ended.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    engine.close()
    for thread in threads:
        thread.join(30)
    assert len(ended) == 3


@pytest.mark.slow_under_sanitizers
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_threads_that_the_system_refuses_are_an_error(tiny):
    code = """
import resource, sys
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine
from ferrum.errors import OutOfMemory
file = GGUFFile.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
try:
    Engine(file, threads=1024, kv_tokens=64, max_sequences=1, prefill_chunk=1)
except OutOfMemory as error:
    assert "threads" in str(error), error
    Engine(file, threads=2, kv_tokens=64).prefill(0, [1])
    sys.exit(7)
"""
    done = run(code, tiny.paths[0])
    assert done.returncode == 7, done.stderr


def test_an_engine_in_a_reference_cycle_is_collected(tiny):
    code = """
import gc, sys
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine
for _ in range(3):
    engine = Engine(GGUFFile.open(sys.argv[1]), threads=2, kv_tokens=64)
    engine.prefill(0, [1, 2])
    engine.config["engine"] = engine
    del engine
    gc.collect()
"""
    done = run(code, tiny.paths[0])
    assert done.returncode == 0, done.stderr


# values

def test_unused_tokens_outside_the_vocabulary_are_refused(tiny):
    for ids in ([-1], [10**6], [10**8], [5, -(10**8)]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            Engine(tiny, unused_tokens=ids, **SMALL)


def test_unused_tokens_count_once(tiny):
    with Engine(tiny, unused_tokens=[5, 5, 5, 3], **SMALL) as engine:
        engine.prefill(0, [1])
        vocab = engine.config["vocab_size"]
        ids = engine.candidates(vocab - 2).ids[0]
        assert sorted(ids) == sorted(set(range(vocab)) - {3, 5})


def test_objects_of_the_engine_are_not_made_by_hand():
    for cls in (_native.Logits, _native._LogitsMemory):
        with pytest.raises(TypeError):
            cls()
    with pytest.raises((ModelFileError, ValueError)):
        Engine(SimpleNamespace(paths=(), metadata={"general.architecture": "qwen3moe"}, tensors={}))


@pytest.mark.parametrize("edit", [(0.9, 1, 1, 0), (0, 1.5, 1, 0), (0, 1, 1, math.nan), (0, 1, 1, math.inf), (0, 1, math.nan, 0), (0, 1, math.inf, 0), (0, 1, 0, 0),
                                  (1, 1, 1, 0), (0, 10**6, 1, 0), (-1, 1, 1, 0)])
def test_edits_that_mean_nothing_are_refused(engine, edit):
    logits = engine.prefill(0, [1, 2])
    before = logits.copy()
    with pytest.raises((TypeError, ValueError)):
        engine.candidates(1, edits=[edit])
    assert np.array_equal(before, logits)
    banned = int(engine.candidates(1).ids[0, 0])
    assert engine.candidates(1, edits=[(0, banned, 1.0, -math.inf)]).ids[0, 0] != banned


def test_huge_reservations_are_refused(engine):
    for tokens in (10**12, 1 << 31, (1 << 31) - 1):
        with pytest.raises(ContextFull):
            engine.reserve(5, tokens)
    with pytest.raises(ValueError):
        engine.reserve(5, -1)
    assert engine.stats()["live_sequences"] == 0


def test_a_failed_prefill_leaves_an_empty_sequence_live(engine):
    engine.reserve(5, 0)
    with pytest.raises(ContextFull):
        engine.prefill(5, [1] * 100_000)
    assert engine.length(5) == 0


# files

@pytest.mark.parametrize("key, value", [
    ("rope__freq_base", [10000.0]), ("rope__freq_base", math.inf), ("rope__freq_base", 0.5), ("attention__sliding_window", [128]),
    ("attention__sliding_window", 1 << 63), ("attention__head_count_kv", [2]), ("attention__layer_norm_rms_epsilon", math.nan),
    ("attention__layer_norm_rms_epsilon", -5.0), ("attention__layer_norm_rms_epsilon", 1e300), ("expert_used_count", 99), ("block_count", 0),
    ("attention__head_count", 1 << 30), ("attention__key_length", 520), ("attention__key_length", 12), ("rope__dimension_count", 7), ("expert_count", "many"),
])
def test_metadata_that_cannot_be_is_refused_by_key(tiny, key, value):
    with pytest.raises(ModelFileError) as caught:
        Engine(with_metadata(tiny, **{key: value}), **SMALL)
    assert key.split("__")[-1] in str(caught.value) and tiny.paths[0] in str(caught.value)


@pytest.mark.parametrize("key, value", [
    ("expert_gating_func", 2), ("expert_group_count", 4), ("leading_dense_block_count", 1), ("interleave_moe_layer_step", 2), ("attention__scale", 0.5),
    ("logit_scale", 0.25), ("attn_logit_softcapping", 30.0), ("attention__sliding_window", 128), ("rope__scaling__type", "longrope"), ("rope__scaling__yarn_ext_factor", 1.0),
])
def test_maths_of_other_families_is_refused_by_key(tiny, key, value):
    with pytest.raises(UnsupportedModelError):
        Engine(with_metadata(tiny, **{key: value}), **SMALL)


def test_neutral_values_of_such_keys_run(tiny):
    neutral = with_metadata(tiny, expert_gating_func=1, expert_group_count=1, leading_dense_block_count=0, logit_scale=1.0, attention__sliding_window=0)
    with Engine(neutral, **SMALL) as engine, Engine(tiny, **SMALL) as plain:
        assert np.array_equal(engine.prefill(0, [1, 2]), plain.prefill(0, [1, 2]))

