"""LLM: what a stream gives, why it ends, and that nothing is left behind."""

import gc
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny_models

from ferrum import LLM, SamplingParams
from ferrum.errors import ContextFull, DeviceError, EngineClosed, KVPoolExhausted, ModelFileError, OptionError, UnknownSequence
from ferrum.sampling import full_row, sample, uniform
from ferrum_native._native import Engine

PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)  # runs for some hundred milliseconds


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=1024) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test that uses it, the shared engine holds no sequence."""
    yield
    if "llm" in request.fixturenames:
        assert live_sequences(request.getfixturevalue("llm")) == 0


def live_sequences(llm):
    llm._loop.settle()
    return llm.engine.stats()["live_sequences"]


def finish(stream):
    """The stream's only text, with the request's usage and timings beside it."""
    pieces = list(stream)
    completion = stream.completion
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.token_id for piece in pieces if piece.token_id is not None] == completion.token_ids
    return completion


def test_greedy_text_repeats_and_its_parts_agree(llm):
    stream = llm.stream(PROMPT, GREEDY)
    first, second = finish(stream), finish(llm.stream(PROMPT, GREEDY))
    assert first == second
    assert first.text == llm.detokenize(first.token_ids)
    assert (first.finish_reason, first.stop_reason, first.notice) == ("length", None, None)
    assert (first.seed, first.logprobs, first.cumulative_logprob) == (None, None, None)
    output = stream.output
    assert output.finished and output.outputs == [first]
    assert output.prompt == PROMPT
    assert output.prompt_token_ids == llm.tokenize(PROMPT)
    assert output.usage.completion_tokens == len(first.token_ids) == 24
    assert output.usage.total_tokens == len(output.prompt_token_ids) + 24
    assert 0 < output.timings.prefill_s <= output.timings.first_token_s
    assert output.timings.decode_tokens_per_s == pytest.approx(23 / output.timings.decode_s)


def test_token_ids_are_a_prompt_too(llm):
    ids = llm.tokenizer.encode(PROMPT)
    from_ids, from_text = llm.stream(np.array(ids), GREEDY), llm.stream(PROMPT, GREEDY)
    assert finish(from_ids) == finish(from_text)
    assert from_ids.output.prompt is None


@pytest.mark.parametrize("params", [
    SamplingParams(seed=11, max_tokens=40),
    SamplingParams(seed=12, max_tokens=40, temperature=2.0),
    SamplingParams(seed=13, max_tokens=40, temperature=1.0, top_k=20, top_p=0.9, min_p=0.02),
])
def test_sampled_text_is_the_rule_on_full_rows(llm, params):
    ids = []
    logits = llm.engine.prefill(1 << 20, llm.tokenizer.encode(PROMPT))
    while True:
        row = full_row(np.asarray(logits), llm.tokenizer.unused_ids)
        ids.append(sample(row, params, uniform(params.seed, len(ids))))
        if len(ids) == params.max_tokens or ids[-1] in llm.tokenizer.stop_ids:
            break
        logits = llm.engine.decode(1 << 20, ids[-1])
    llm.engine.release(1 << 20)
    assert finish(llm.stream(PROMPT, params)).token_ids == ids


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(llm):
    params = SamplingParams(seed=5, temperature=1.0, max_tokens=20)
    alone = finish(llm.stream(PROMPT, params))
    first, other = llm.stream(PROMPT, params), llm.stream("The cat", SamplingParams(temperature=1.5, max_tokens=30))
    for _ in zip(other, first, strict=False):
        pass
    list(first)
    other.close()
    assert first.completion.token_ids == alone.token_ids


def test_a_fresh_seed_is_reported_and_repeats_the_text(llm):
    drawn = finish(llm.stream(PROMPT, SamplingParams(temperature=1.5, max_tokens=12)))
    again = finish(llm.stream(PROMPT, SamplingParams(temperature=1.5, max_tokens=12, seed=drawn.seed)))
    assert again.token_ids == drawn.token_ids


def test_a_stop_string_ends_the_text_before_it(llm):
    whole = finish(llm.stream(PROMPT, GREEDY)).text
    stop = whole[8:15]
    completion = finish(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop=("never seen", stop))))
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert llm.tokenizer.decode(completion.token_ids).startswith(completion.text + stop)


def test_text_held_back_for_a_stop_string_comes_at_the_end(llm):
    whole = finish(llm.stream(PROMPT, GREEDY)).text
    completion = finish(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop=(whole[-6:] + "\0",))))
    assert completion.text == whole
    assert completion.finish_reason == "length"


def test_the_end_of_text_stops_and_shows_no_token(llm):
    completion = finish(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=900)))
    last = completion.token_ids[-1]
    assert completion.finish_reason == "stop"
    assert last in llm.tokenizer.stop_ids
    assert completion.stop_reason == (None if last == llm.tokenizer.eos_id else last)
    assert completion.text == llm.tokenizer.decode(completion.token_ids[:-1])


def test_a_closed_stream_keeps_its_text_and_releases_its_sequence(llm):
    with llm.stream(PROMPT, LONG) as stream:
        shown = next(stream).text + next(stream).text
        with pytest.raises(RuntimeError, match="not ended"):
            stream.completion
        assert live_sequences(llm) == 1
    assert live_sequences(llm) == 0
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.startswith(shown)
    assert 2 <= len(stream.completion.token_ids) < 900
    assert list(stream) == []


def test_a_stream_closed_before_its_start_is_cancelled(llm):
    stream = llm.stream(PROMPT)
    stream.close()
    assert (stream.completion.finish_reason, stream.completion.token_ids) == ("cancelled", [])


def test_a_dropped_stream_releases_its_sequence_without_the_cyclic_collector(llm):
    gc.disable()
    try:
        stream = llm.stream(PROMPT, LONG)
        next(stream)
        del stream
        assert live_sequences(llm) == 0
    finally:
        gc.enable()


def test_an_exception_in_the_loop_releases_the_sequence(llm):
    with pytest.raises(KeyboardInterrupt):
        with llm.stream(PROMPT, LONG) as stream:
            for _ in stream:
                raise KeyboardInterrupt
    assert live_sequences(llm) == 0
    assert stream.completion.finish_reason == "cancelled"


def test_a_sequence_released_by_others_is_an_error_and_the_llm_stays_usable(llm):
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    llm.engine.reset()
    with pytest.raises(UnknownSequence):
        list(stream)
    assert stream.completion.finish_reason == "error"
    assert len(finish(llm.stream(PROMPT, GREEDY)).token_ids) == 24


def test_a_device_error_ends_the_stream_with_error_and_the_text_so_far(llm, monkeypatch):
    text = finish(llm.stream(PROMPT, GREEDY)).text
    monkeypatch.setattr("ferrum.llm.Engine", partial(Engine, fail_at=300))
    with LLM(threads=1, kv_tokens=64) as llm:
        stream = llm.stream(PROMPT, GREEDY)
        with pytest.raises(DeviceError, match="injected failure"):
            list(stream)
        assert stream.completion.finish_reason == "error"
        assert 0 < len(stream.completion.token_ids) < 24 and text.startswith(stream.completion.text)
        assert live_sequences(llm) == 0
        assert finish(llm.stream(PROMPT, GREEDY)).text == text


def run_script(script):
    """A process of its own, because what is tested hangs where it fails."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_a_stream_collected_anywhere_is_released():
    run_script("""if True:
        import gc
        from ferrum import LLM, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4)
        with LLM(threads=1, kv_tokens=1024) as llm:
            for n in range(1, 80):
                gc.disable()
                cycle = {"stream": llm.stream("Once", params)}
                cycle["itself"] = cycle
                next(cycle["stream"])
                del cycle
                gc.set_threshold(gc.get_count()[0] + n)
                gc.enable()
                for piece in llm.stream("Once upon", params):
                    llm.engine.prefill(1 << 40, [5])  # as others use the engine: without the lock of the LLM
                    llm.engine.release(1 << 40)
                gc.collect()
                llm._loop.settle()
                assert llm.engine.stats()["live_sequences"] == 0
    """)


def test_a_forked_process_is_told_to_make_its_own_llm():
    run_script("""if True:
        import os
        from ferrum import LLM, SamplingParams

        with LLM(threads=1, kv_tokens=1024) as llm:
            running = llm.stream("Once", SamplingParams(max_tokens=900, ignore_eos=True))
            next(running)
            child = os.fork()
            if child == 0:
                status = 0
                for call in (lambda: llm.stream("Once"), lambda: next(running)):
                    try:
                        call()
                        status = 1
                    except RuntimeError as error:
                        status |= "made in another process" not in str(error)
                os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert len(list(running)) == 899
    """)


@pytest.mark.parametrize("call", [
    "llm.run([request])", "list(llm.as_completed([request]))", "session.save(path)", "llm.load_session(path)", "llm.score('Once', [' upon'])",
])
def test_a_call_that_would_wait_for_itself_is_refused(call):
    run_script(f"""if True:
        import os, tempfile
        from ferrum import LLM, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=3)
        llm = LLM(threads=1, kv_tokens=1024)
        path = os.path.join(tempfile.mkdtemp(), "session")
        request, session = llm.request("Once", params), llm.session()
        list(session.stream("Once upon a time", params))
        session.save(path)

        def processor(token_ids, logits):
            {call}

        try:
            llm.generate("Once", SamplingParams(max_tokens=3, logits_processors=[processor]))
        except RuntimeError as error:
            assert "from inside a step" in str(error)
        else:
            raise AssertionError
        child = os.fork()
        if child == 0:
            try:
                {call}
            except RuntimeError as error:
                os._exit("made in another process" not in str(error))
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert len(llm.generate("Once", params)[0].outputs[0].token_ids) == 3
    """)


def test_a_forked_process_leaves_the_blocks_of_streams_and_sessions():
    run_script("""if True:
        import os, sys
        from ferrum import LLM, SamplingParams

        params = SamplingParams(max_tokens=300, ignore_eos=True)
        with LLM(threads=1, kv_tokens=1024) as llm:
            with llm.session() as session, session.stream("Once", params) as stream:
                next(stream)
                child = os.fork()
                if child == 0:
                    sys.exit(7)  # through the ends of all blocks
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                assert len(list(stream)) == 299
    """)


def test_a_prompt_must_be_text_or_whole_numbers(llm):
    for prompt in (b"Once", bytearray(b"Once"), memoryview(b"Once"), [1.9], ["7"], [True], [np.True_], np.array([1.0]), 5):
        with pytest.raises(TypeError, match="^The prompt .*Give a str, or token ids as whole numbers"):
            llm.stream(prompt)


def test_a_very_long_text_is_refused_before_it_is_encoded(llm):
    with pytest.raises(ContextFull, match=r"has at least \d+ tokens, the model's context holds \d+"):
        llm.stream("a" * 2_000_000)
    with pytest.raises(KVPoolExhausted, match=r"has at least \d+ tokens, the KV cache holds 1024.*--kv-tokens \d+"):
        llm.stream("a" * (1500 * llm.tokenizer._longest_token))


def test_the_fewest_tokens_of_a_text_are_not_more_than_it_has(llm):
    for text in ("", "a", " " * 99, PROMPT * 9, "\u212a" * 50, "\u212b\u0301" * 50, "<|im_end|>" * 9, "日本" * 9):
        assert 0 <= llm.tokenizer.fewest_tokens(text) <= len(llm.tokenizer.encode(text))


def test_a_vocabulary_of_unused_tokens_is_refused(tmp_path, monkeypatch):
    make = tiny_models.make_vocabulary

    def unused(size):
        vocabulary = make(size)
        return replace(vocabulary, types=[tiny_models.gguf.TokenType.UNUSED] * len(vocabulary.types))

    monkeypatch.setattr(tiny_models, "make_vocabulary", unused)
    path = tiny_models.write_tiny_model(tmp_path / "unused.gguf")
    with pytest.raises(ModelFileError, match="marks every token as unused"):
        LLM(path)


def test_a_full_kv_pool_ends_the_text_with_a_notice():
    with LLM(threads=1, kv_tokens=32) as llm:
        whole = llm.engine.kv_capacity
        stream = llm.stream(PROMPT, SamplingParams(temperature=0))
        completion = finish(stream)
        assert completion.finish_reason == "length"
        assert stream.output.usage.total_tokens == whole + 1  # the last token needs no room
        assert completion.notice == f"The KV cache of {whole} tokens is full. Raise kv_tokens (--kv-tokens) to go on."
        assert live_sequences(llm) == 0


def test_a_full_context_ends_the_text_with_a_notice():
    with LLM(threads=1) as llm:
        context = llm.engine.config["context_length"]
        ids = (llm.tokenizer.encode("The cat sat. ") * context)[: context - 1]
        completion = finish(llm.stream(ids, SamplingParams(temperature=0)))
        assert (completion.finish_reason, len(completion.token_ids)) == ("length", 2)
        assert completion.notice == f"The model's context of {context} tokens is full."
        with pytest.raises(ContextFull, match=f"has {context + 1} tokens, the model's context holds {context}"):
            llm.stream(ids + ids[:2])


def test_a_prompt_longer_than_the_pool_is_refused_with_the_figures(llm):
    with pytest.raises(KVPoolExhausted, match=r"has 1100 tokens, the KV cache holds 1024.*--kv-tokens 1124"):
        llm.stream([5] * 1100, GREEDY)


def test_an_empty_prompt_is_refused(llm):
    for prompt in ("", []):
        with pytest.raises(ValueError, match="empty"):
            llm.stream(prompt)


def test_a_closed_llm_says_so():
    llm = LLM(threads=1, kv_tokens=1024)
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosed):
        list(stream)
    with pytest.raises(EngineClosed):
        llm.stream(PROMPT)


def test_options_come_from_arguments_then_environment(monkeypatch):
    monkeypatch.setenv("FERRUM_KV_TOKENS", "64")
    monkeypatch.setenv("FERRUM_KV_TYPE", "f32")
    with LLM(kv_tokens=128, threads=1) as llm:
        assert (llm.options["kv_tokens"], llm.options["kv_type"]) == (128, "f32")
        assert (llm.sources["kv_tokens"], llm.sources["kv_type"]) == ("given", "environment")
    with pytest.raises(OptionError, match="^kv_type is 'q4'"):
        LLM(kv_type="q4")


def test_a_missing_file_is_one_clear_error():
    with pytest.raises(ModelFileError, match="no/such.gguf"):
        LLM("no/such.gguf")
