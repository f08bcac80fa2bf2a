"""Session: a text that goes on turn by turn, and what stays in the KV cache when a turn is broken off."""

import sys
import threading
from contextlib import contextmanager, suppress

import pytest

from ferrum import LLM, SamplingParams
from ferrum.engine_loop import EngineLoop
from ferrum.errors import SessionFileError
from ferrum.llm import Stream

PROMPT = "Once upon a time there was a little fox who lived in the forest."
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=512) as llm:
        yield llm


class Interruption:
    """Runs `action` once, as a finalizer would, before the given line (from 0) that `function` runs, over all its calls from `arm` on."""

    def __init__(self, function, line):
        self._code, self._line, self._action = function.__code__, line, None

    def arm(self, action):
        self._action = action

    def trace(self, frame, event, _):
        if frame.f_code is not self._code or self._action is None:
            return self.trace
        if event == "line":
            self._line -= 1
            if self._line == -1:
                self._action()
        return self.trace


@contextmanager
def tracing(function, trace):
    """With `sys` or `threading` .settrace, the latter for threads that start in the block."""
    function(trace)
    try:
        yield
    finally:
        function(None)


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
def test_a_turn_closed_while_a_step_runs_keeps_its_kv_cache(line):
    interruption = Interruption(EngineLoop._accept, line)
    with tracing(threading.settrace, interruption.trace), LLM(threads=1, kv_tokens=512) as llm, llm.session() as session:
        list(session.stream(PROMPT, GREEDY))
        stream = session.stream(PROMPT + " It had", GREEDY)
        interruption.arm(stream.close)
        list(stream)
        assert stream.completion.finish_reason == "cancelled"
        prompt = len(stream.prompt_token_ids)
        assert prompt <= session.tokens_kept <= prompt + len(stream.completion.token_ids)
        assert llm.engine.stats()["live_sequences"] == 1


@pytest.mark.parametrize("line", range(0, 14))
def test_a_stream_may_be_closed_at_any_line_of_its_iteration(llm, line):
    stream = llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    interruption = Interruption(Stream.__next__, line)
    interruption.arm(stream.close)
    with tracing(sys.settrace, interruption.trace):
        list(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert llm.engine.stats()["live_sequences"] == 0


@pytest.mark.parametrize("function", [Stream.__next__, Stream._submit, EngineLoop.submit], ids=lambda function: function.__qualname__)
@pytest.mark.parametrize("line", range(0, 7))
def test_ctrl_c_at_any_line_of_an_iteration_loses_no_piece(llm, function, line):
    def interrupt():
        interruption.arm(None)
        raise KeyboardInterrupt

    expected = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    stream, dropped = llm.stream(PROMPT, GREEDY), llm.stream(PROMPT, GREEDY)
    for each in (stream, dropped):
        interruption = Interruption(function, line)
        interruption.arm(interrupt)
        with tracing(sys.settrace, interruption.trace), suppress(KeyboardInterrupt):
            next(each)
    reader = threading.Thread(target=list, args=(stream,), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive() and stream.completion == expected
    del each, dropped
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0 and not llm._loop.queue._waiting


def test_a_session_that_two_threads_use_at_once_is_refused_and_harms_no_text(llm):
    expected = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    with llm.session() as session:
        first = session.stream(PROMPT, GREEDY)
        session._last = None  # as the other thread finds it that looked a moment before
        second = session.stream(PROMPT, GREEDY)
        next(first)
        with pytest.raises(RuntimeError, match="two threads"):
            next(second)
        list(first)
        assert first.completion == expected
    assert llm.engine.stats()["live_sequences"] == 0


def test_a_request_given_twice_runs_once(llm):
    request = llm.request(PROMPT, GREEDY)
    reader = threading.Thread(target=llm.run, args=([request, request],), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    assert request.output().outputs == llm.generate(PROMPT, GREEDY)[0].outputs
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0


def test_a_saved_session_goes_on_in_another_process_with_the_same_text(llm, tmp_path):
    path = tmp_path / "fox.session"
    with llm.session() as session:
        with pytest.raises(RuntimeError, match="nothing in the KV cache: it had no turn yet"):
            session.save(path)
        list(stream := session.stream(PROMPT, GREEDY))
        text = stream.output.prompt + stream.completion.text + " The end. Then"
        session.save(path)
        kept = session.token_ids
        assert len(kept) == session.tokens_kept and stream.prompt_token_ids == kept[: len(stream.prompt_token_ids)]
        list(expected := session.stream(text, GREEDY))
    with LLM(threads=1, kv_tokens=512) as other:
        with other.load_session(path) as session:
            assert session.token_ids == kept
            before = computed(other)
            list(second := session.stream(text, GREEDY))
            assert second.completion == expected.completion
            assert second.output.num_cached_tokens == len(kept)
            assert computed(other) - before == len(second.prompt_token_ids) - len(kept) + len(second.completion.token_ids) - 1
        assert other.engine.stats()["live_sequences"] == 0
    with LLM(threads=1, kv_tokens=512, kv_type="f32") as other:
        with pytest.raises(SessionFileError, match="was saved with kv_type f16, this engine has f32"):
            other.load_session(path)
        assert other.engine.stats()["live_sequences"] == 0


def test_a_session_is_loaded_where_others_keep_all_the_room(llm, tmp_path):
    with llm.session() as session:
        list(session.stream(PROMPT * 10, GREEDY))
        session.save(tmp_path / "long.session")
    with LLM(threads=1, kv_tokens=256, max_sequences=2) as small:
        idle = [small.session() for _ in range(2)]
        for other in idle:
            list(other.stream(PROMPT, GREEDY))
        with small.load_session(tmp_path / "long.session") as session:
            assert session.tokens_kept == len(session.token_ids) > 150
        for other in idle:
            other.close()
