"""Session: a text that goes on turn by turn, and what stays in the KV cache when a turn is broken off."""

import sys
from contextlib import contextmanager

import pytest

from ferrum import LLM, SamplingParams
from ferrum.engine_loop import EngineLoop
from ferrum.llm import Stream

PROMPT = "Once upon a time there was a little fox who lived in the forest."
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=512) as llm:
        yield llm


@contextmanager
def within(function, line, action):
    """Run `action` once, as a signal handler would, before the given line (from 0) that `function` runs, over all its calls."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code is not function.__code__:
            return None
        if event == "line":
            lines += 1
            if lines == line + 1:
                action()
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def computed(llm):
    return llm.engine.stats()["tokens"]


def test_the_next_turn_computes_only_what_is_new(llm):
    with llm.session() as session:
        list(stream := session.stream(PROMPT, GREEDY))
        text = stream.output.prompt + stream.completion.text + " The end. Then"
        kept = session.tokens_kept
        assert kept == len(stream.prompt_token_ids) + 39
        before = computed(llm)
        list(second := session.stream(text, GREEDY))
        new_tokens = len(second.prompt_token_ids) - kept
        assert computed(llm) - before == new_tokens + len(second.completion.token_ids) - 1
        assert second.output.num_cached_tokens == kept
        timings = second.output.timings
        assert timings.prefill_tokens_per_s == pytest.approx(new_tokens / timings.prefill_s)
        assert second.completion.token_ids == llm.generate(text, GREEDY)[0].outputs[0].token_ids
    assert llm.engine.stats()["live_sequences"] == 0


@pytest.mark.parametrize("line", range(0, 12))
def test_a_turn_closed_while_a_step_runs_keeps_its_kv_cache(llm, line):
    with llm.session() as session:
        list(session.stream(PROMPT, GREEDY))
        stream = session.stream(PROMPT + " It had", GREEDY)
        next(stream)
        with within(EngineLoop._accept, line, stream.close):
            list(stream)
        assert stream.completion.finish_reason == "cancelled"
        prompt = len(stream.prompt_token_ids)
        session.stream(PROMPT, GREEDY).close()  # what was dropped while the step ran is released
        assert prompt <= session.tokens_kept <= prompt + len(stream.completion.token_ids)
        assert llm.engine.stats()["live_sequences"] == 1


@pytest.mark.parametrize("line", range(0, 20))
def test_a_stream_may_be_closed_at_any_line_of_its_iteration(llm, line):
    stream = llm.stream(PROMPT, GREEDY)
    with within(Stream.__next__, line, stream.close):
        list(stream)
    assert stream.completion.finish_reason == "cancelled"
    llm.stream(PROMPT, GREEDY).close()
    assert llm.engine.stats()["live_sequences"] == 0
