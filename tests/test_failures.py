"""A device that fails at any call of a step: nothing advances, nothing is lost, and the next request succeeds."""

import numpy as np
import pytest
from tiny_models import TinyConfig, write_tiny_model

from ferrum.errors import DeviceError
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine

PROMPT = [5, 9, 200, 31, 77, 4, 18, 120, 66, 7]
CONFIG = TinyConfig(layers=2, experts=4, top_k=2)
OPTIONS = dict(threads=1, kv_tokens=128, prefill_chunk=4, max_logit_rows=16, poison_freed_kv=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return GGUFFile.open(write_tiny_model(tmp_path_factory.mktemp("failures") / "tiny.gguf", config=CONFIG, types="Q4_K_M", seed=3))


def history(engine, attempt):
    """A prompt in chunks, a fork whose shared block is copied, and a batch; `attempt(call)` runs each call. Returns all logits."""
    rows = [attempt(lambda: np.array(engine.prefill(1, PROMPT)))]
    engine.fork(1, 2)
    rows.append(attempt(lambda: np.array(engine.prefill(2, PROMPT[:3], logits="all"))))
    rows.append(attempt(lambda: np.array(engine.decode_batch([1, 2], [8, 9]))))
    attempt(lambda: engine.reserve(1, 40))
    rows.append(attempt(lambda: np.array(engine.step([(1, [3, 4], "all"), (3, [6], "last")]))))
    rows.append(attempt(lambda: engine.candidates(5).logits))
    return rows


def state(engine):
    stats = engine.stats()
    lengths = {}
    for sequence in (1, 2, 3):
        try:
            lengths[sequence] = engine.length(sequence)
        except KeyError:
            pass
    return lengths, stats["kv_blocks_free"], stats["live_sequences"]


@pytest.fixture(scope="module")
def clean(model):
    with Engine(model, **OPTIONS) as engine:
        return history(engine, lambda call: call())


def run_with_failure(model, fail_at, profile):
    """(logits, failures met) of the history with one failing call, each failed request repeated once."""
    failures = 0
    with Engine(model, fail_at=fail_at, profile=profile, **OPTIONS) as engine:

        def attempt(call):
            nonlocal failures
            before = state(engine)
            try:
                return call()
            except DeviceError as error:
                assert "injected failure" in str(error)
                failures += 1
                assert state(engine) == before
                return call()

        rows = history(engine, attempt)
        engine.reset()
        assert engine.stats()["kv_blocks_free"] == engine.stats()["kv_blocks"]
    return rows, failures


@pytest.mark.slow_under_sanitizers
@pytest.mark.parametrize("profile", [False, True], ids=["plain", "profiled"])
def test_every_call_may_fail_once_and_the_next_request_succeeds(model, clean, profile):
    met = 0
    fail_at = 0
    while True:
        rows, failures = run_with_failure(model, fail_at, profile)
        if failures == 0:
            break
        met += 1
        for row, expected in zip(rows[:-1], clean[:-1]):
            assert np.array_equal(row, expected), fail_at
        fail_at += 1
    assert met > 100  # seven steps of two layers


@pytest.mark.parametrize("fail_at", [0, 20, 100, 150])
def test_a_prompt_that_failed_is_not_found_again(model, fail_at):
    prompt = PROMPT * 4
    with Engine(model, fail_at=fail_at, **OPTIONS) as engine:
        with pytest.raises(DeviceError):
            engine.prefill(1, prompt)
        assert engine.cached_prefix(prompt) == (0, 0) and engine.stats()["kv_blocks_cached"] == 0
        engine.prefill(1, prompt)
        assert engine.cached_prefix(prompt) == (32, 2)


def test_candidates_after_a_failed_step_are_refused(model):
    with Engine(model, fail_at=30, **OPTIONS) as engine:
        with pytest.raises(DeviceError):
            for token in PROMPT:
                engine.prefill(1, [token])
        with pytest.raises(ValueError, match="no logits"):
            engine.candidates(3)
