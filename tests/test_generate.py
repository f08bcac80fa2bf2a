"""Many prompts at once, scores and sessions: each result is the one that it would be alone, and nothing is left behind."""

import queue
import random
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from test_sampling import kept_and_drawn

from ferrum import LLM, SamplingParams
from ferrum.engine_loop import Flow, Submission
from ferrum.errors import DeviceError, EngineClosed, FerrumError
from ferrum.sampling import uniform
from ferrum_native._native import Engine

STORY = ("Once upon a time there was a little fox who lived in a forest. One day she met a friendly bear, and they went to the river to "
         "catch fish. The bear said that he was hungry, but the fox had a better idea: they would bake a big cake for all their friends.")
TIGHT = dict(threads=1, kv_tokens=256, max_sequences=6, prefill_chunk=48, max_logit_rows=4)


@pytest.fixture(scope="module")
def llm():
    """With room for everything."""
    with LLM(threads=1, kv_tokens=8192) as llm:
        yield llm


@pytest.fixture(scope="module")
def forgetful():
    """As `llm`, without a prefix cache: what a text computes does not depend on those before it."""
    with LLM(threads=1, kv_tokens=8192, prefix_cache=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def tight():
    """With room for one long text, or a few short ones."""
    with LLM(**TIGHT) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left(request):
    """After each test that uses them, the shared engines hold nothing."""
    yield
    for name in {"llm", "tight", "forgetful"} & set(request.fixturenames):
        assert_empty(request.getfixturevalue(name))


def assert_empty(llm):
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0
    assert llm.engine.kv_blocks_free * 16 == llm.engine.kv_capacity
    assert (llm._loop._scheduler.waiting, llm._loop._scheduler.running) == ((), ())


def preemptions(llm):
    return llm._loop._scheduler.preemptions


def result(output):
    """All that a request gave but its id and its times."""
    return output.prompt_token_ids, output.outputs, output.prompt_logprobs, output.finished, output.usage


def results(outputs):
    return [result(output) for output in outputs]


def params_of_all_kinds(ids):
    """Params that use everything; `ids` are tokens that texts have."""
    return [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True),
        SamplingParams(seed=1, max_tokens=50),
        SamplingParams(seed=2, temperature=1.5, max_tokens=30, logprobs=3),
        SamplingParams(seed=3, n=3, max_tokens=25),
        SamplingParams(seed=4, n=7, temperature=1.0, max_tokens=12, logprobs=0, prompt_logprobs=2),
        SamplingParams(temperature=0, n=2, max_tokens=1),
        SamplingParams(seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25, max_tokens=40, logprobs=2),
        SamplingParams(temperature=0, repetition_penalty=1.2, max_tokens=40),
        SamplingParams(seed=6, stop=["the", ". "], max_tokens=40),
        SamplingParams(seed=7, stop_token_ids=ids[:4], max_tokens=40, min_tokens=10),
        SamplingParams(seed=8, stop=["a"], min_tokens=20, max_tokens=40),
        SamplingParams(seed=9, allowed_token_ids=ids, max_tokens=20, logprobs=2),
        SamplingParams(temperature=0, allowed_token_ids=ids, banned_token_ids=ids[:2], max_tokens=20),
        SamplingParams(seed=10, banned_token_ids=ids, logit_bias={ids[0]: 5.0, ids[-1]: -3.0}, max_tokens=30),
        SamplingParams(seed=11, top_k=5, max_tokens=30),
        SamplingParams(seed=12, top_k=300, top_p=0.9, temperature=3.0, max_tokens=30),
        SamplingParams(seed=13, min_p=0.1, typical_p=0.8, max_tokens=30, prompt_logprobs=0),
        SamplingParams(seed=14, max_tokens=70, ignore_eos=True, min_tokens=70),
        SamplingParams(seed=15, max_tokens=30, prompt_logprobs=5, logprobs=40),
    ]


def jobs(llm, count, seed):
    """Prompts of all lengths up to 150 tokens, with params of all kinds."""
    rng = random.Random(seed)
    ids = llm.tokenize(STORY)
    kinds = params_of_all_kinds(sorted(set(ids))[:40])
    prompts = []
    for index in range(count):
        length = rng.choice((1, 2, rng.randint(3, 40), rng.randint(3, 150), 16, 48))
        start = rng.randrange(len(ids))
        prompts.append((ids * 6)[start : start + length])
    params = [kinds[index % len(kinds)] for index in range(count)]
    rng.shuffle(params)
    return prompts, params


def test_every_text_is_the_one_that_it_is_alone(llm, tight):
    prompts, params = jobs(llm, 120, seed=2)
    alone = [result(llm.generate([prompt], each)[0]) for prompt, each in zip(prompts, params)]
    before = preemptions(tight)
    assert results(tight.generate(prompts, params)) == alone
    assert preemptions(tight) > before + 5
    assert results(llm.generate(prompts, params)) == alone


def test_more_samples_than_sequences_are_those_of_their_seeds(llm, tight):
    prompt = llm.tokenize(STORY)[:30]
    params = SamplingParams(n=40, seed=100, temperature=1.0, max_tokens=20)
    (output,) = tight.generate([prompt], params)
    assert [text.index for text in output.outputs] == list(range(40))
    assert [text.seed for text in output.outputs] == list(range(100, 140))
    single = [SamplingParams(seed=100 + index, temperature=1.0, max_tokens=20) for index in range(40)]
    assert [text.token_ids for text in output.outputs] == [each.outputs[0].token_ids for each in llm.generate([prompt] * 40, single)]
    assert output.usage.completion_tokens == sum(len(text.token_ids) for text in output.outputs)


@pytest.mark.parametrize("length", [241, 250, 255])
def test_samples_of_a_prompt_that_fills_the_pool_are_those_of_a_roomy_one(llm, tight, length):
    prompt = (llm.tokenize(STORY) * 6)[:length]
    params = SamplingParams(n=3, seed=5, temperature=1.0, max_tokens=256 - length + 1, ignore_eos=True)
    (output,) = tight.generate([prompt], params)
    assert result(output) == result(llm.generate([prompt], params)[0])
    assert all(len(text.token_ids) == params.max_tokens for text in output.outputs)


def test_samples_that_grow_out_of_the_pool_are_put_back(llm, tight):
    prompt = llm.tokenize(STORY)[:40]
    params = SamplingParams(n=5, seed=5, temperature=1.0, max_tokens=120, ignore_eos=True)
    before = preemptions(tight)
    assert results(tight.generate([prompt], params)) == results(llm.generate([prompt], params))
    assert preemptions(tight) > before


def test_each_token_is_the_one_that_the_whole_rule_draws(llm):
    prompt = llm.tokenize(STORY)[:25]
    for params in params_of_all_kinds(sorted(set(llm.tokenize(STORY)))[:40]):
        params = replace(params, n=1, max_tokens=12, min_tokens=min(params.min_tokens, 5))
        (text,) = llm.generate([prompt], params)[0].outputs
        rows = raw_rows(llm, prompt + text.token_ids)[len(prompt) - 1 :]
        ending = {*params.stop_token_ids, *(() if params.ignore_eos else llm.tokenizer.stop_ids)}
        for at, token in enumerate(text.token_ids):
            u = uniform(text.seed or 0, at)
            assert kept_and_drawn(rows[at], params, u, prompt, text.token_ids[:at], ending, llm.tokenizer.unused_ids)[1] == token


def raw_rows(llm, tokens):
    """The model's logits [tokens, vocab_size] after each token."""
    rows = [llm.engine.prefill(1 << 40, tokens[start : start + 16], logits="all").copy() for start in range(0, len(tokens), 16)]
    llm.engine.release(1 << 40)
    return np.concatenate(rows)


def log_probabilities(llm, tokens):
    """Natural logarithms [tokens, vocab_size] after each token, unused tokens left out."""
    rows = raw_rows(llm, tokens).astype(np.float64)
    rows[:, list(llm.tokenizer.unused_ids)] = -np.inf
    largest = rows.max(axis=1, keepdims=True)
    return rows - largest - np.log(np.exp(rows - largest).sum(axis=1, keepdims=True))


def check_scores(llm, roomy, prompt, continuations):
    scores = llm.score(prompt, continuations)
    assert [score.token_ids for score in scores] == continuations
    for score, ids in zip(scores, continuations):
        rows = log_probabilities(roomy, prompt + ids)[len(prompt) - 1 : -1]
        expected = [rows[at, id] for at, id in enumerate(ids)]
        np.testing.assert_allclose(score.token_logprobs, expected, rtol=0, atol=2e-5)
        assert score.logprob == pytest.approx(sum(score.token_logprobs))
        assert score.is_greedy == all(row.argmax() == id for row, id in zip(rows, ids))
    return scores


def test_scores_are_the_log_softmax_of_the_full_rows(llm, tight):
    ids = llm.tokenize(STORY)
    greedy = llm.generate([ids[:20]], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))[0].outputs[0].token_ids
    for prompt, continuations in [
        (ids[:20], [greedy]),
        (ids[:20], [greedy, greedy[:1], ids[20:60], [*greedy[:-1], ids[0]]]),
        (ids[:1], [ids[1:3], ids[1:2], ids[5:50]]),
        (ids[:33], [ids[start : start + 1 + start % 7] for start in range(20)]),  # more than max_sequences
        (ids[:1], [(ids * 2)[start : start + 1 + start % 7] for start in range(70)]),  # more than the queue
        ((ids * 6)[:100], [(ids * 6)[100:257]]),  # the last token needs no room
        ((ids * 6)[:200], [(ids * 6)[200:257], (ids * 6)[200:250], ids[:57]]),
        ((ids * 6)[:256], [[index] for index in range(5, 12)]),
    ]:
        scores = check_scores(tight, llm, prompt, continuations)
        if continuations[0] is greedy:
            assert scores[0].is_greedy
        assert llm.score(prompt, continuations) == scores


def test_a_prompt_is_read_once_for_all_its_scores(forgetful):
    llm = forgetful
    ids = llm.tokenize(STORY)
    before = llm.engine.stats()["tokens"]
    llm.score(ids[:40], [ids[40:44], ids[50:52], ids[:1]])
    assert llm.engine.stats()["tokens"] - before == 39 + 4 + 2 + 1


@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_are_those_of_the_full_rows(llm, tight, n):
    prompt = llm.tokenize(STORY)[:60]
    rows = log_probabilities(llm, prompt)
    params = SamplingParams(n=n, seed=3, max_tokens=20, prompt_logprobs=4)
    others = [SamplingParams(seed=seed, max_tokens=100, ignore_eos=True) for seed in range(4)]
    before = preemptions(tight)
    output = tight.generate([prompt[:50]] * 4 + [prompt], [*others, params])[-1]
    assert preemptions(tight) > before
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 60
    for at, places in enumerate(output.prompt_logprobs[1:]):
        check_places(places, rows[at], prompt[at + 1], 4)
    assert result(output) == result(llm.generate([prompt], params)[0])


def check_places(places, row, token, top):
    """The Logprobs of a token and the `top` likeliest, against a full row of log-probabilities."""
    order = np.argsort(-row, kind="stable").tolist()
    assert next(iter(places)) == token
    assert set(places) == {token, *order[:top]}
    for id, place in places.items():
        assert place.rank == order.index(id) + 1
        assert place.logprob == pytest.approx(row[id], abs=2e-5)


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0, logprobs=2, max_tokens=16),
    SamplingParams(seed=4, temperature=3.0, logprobs=0, max_tokens=16),
    SamplingParams(seed=4, temperature=2.0, logprobs=70, max_tokens=16, repetition_penalty=2.0, frequency_penalty=1.0, min_tokens=16,
                   logit_bias={300: 20.0}, banned_token_ids=(5, 6)),
    SamplingParams(seed=4, temperature=2.0, logprobs=1, max_tokens=16, allowed_token_ids=tuple(range(300, 400))),
], ids=["greedy", "sampled", "edited", "allowed"])
def test_logprobs_are_the_models_own_and_ranks_those_of_a_full_sort(llm, params):
    prompt = llm.tokenize(STORY)[:30]
    (output,) = llm.generate([prompt], params)
    (text,) = output.outputs
    rows = log_probabilities(llm, prompt + text.token_ids)[len(prompt) - 1 :]
    for places, row, token in zip(text.logprobs, rows, text.token_ids):
        check_places(places, row, token, params.logprobs)
    assert len(text.logprobs) == len(text.token_ids)
    assert text.cumulative_logprob == pytest.approx(sum(places[id].logprob for places, id in zip(text.logprobs, text.token_ids)))


@pytest.mark.parametrize("stop", ["the", "e", " a"])
@pytest.mark.parametrize("min_tokens", [0, 1, 7, 20])
def test_stop_strings_count_from_the_token_after_min_tokens(llm, stop, min_tokens):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    ids = llm_alone(llm, STORY, params).token_ids
    (text,) = llm.generate(STORY, replace(params, stop=stop, min_tokens=min_tokens))[0].outputs
    length = next((length for length in range(min_tokens + 1, 41) if stop in llm.detokenize(ids[min_tokens:length])), 40)
    before, rest = llm.detokenize(ids[:min_tokens]), llm.detokenize(ids[min_tokens:length])
    assert text.token_ids == ids[:length]
    assert text.text == before + rest.split(stop)[0]
    assert text.stop_reason == (stop if stop in rest else None)


# Sessions


def turns(llm, session, sizes, seed=0, **more):
    """A conversation through a session: each turn's text, and how many tokens were computed for it."""
    ids = llm.tokenize(STORY)
    tokens, told, computed = [], [], []
    for turn, (given, new) in enumerate(sizes):
        tokens += (ids * 4)[turn * 7 :][:given]
        before = llm.engine.stats()["tokens"]
        params = SamplingParams(seed=seed + turn, temperature=1.0, max_tokens=new, ignore_eos=True, **more)
        stream = session.stream(list(tokens), params)
        list(stream)
        computed.append(llm.engine.stats()["tokens"] - before)
        told.append(stream.completion)
        tokens += stream.completion.token_ids
    return told, computed


def without_session(llm, sizes, **more):
    class Alone:
        def stream(self, tokens, params):
            return llm.stream(tokens, params)

    return turns(llm, Alone(), sizes, **more)[0]


def test_a_session_computes_only_what_is_new(forgetful):
    llm = forgetful
    sizes = [(20, 8), (5, 10), (1, 3), (30, 1), (2, 12)]
    with llm.session() as session:
        told, computed = turns(llm, session, sizes)
        assert session.tokens_kept == sum(map(sum, sizes)) - 1
    assert told == without_session(llm, sizes)
    # The last token of a text is not computed by its own turn.
    assert computed == [20 + 7] + [given + new for given, new in sizes[1:]]
    assert session.tokens_kept == 0


def test_a_session_whose_memory_was_taken_gives_the_same_texts(llm, tight):
    sizes = [(40, 20), (10, 20), (20, 20)]
    expected = without_session(llm, sizes)
    with tight.session() as session:
        ids = llm.tokenize(STORY)
        tokens, told = [], []
        for turn, (given, new) in enumerate(sizes):
            tokens += (ids * 4)[turn * 7 :][:given]
            stream = session.stream(list(tokens), SamplingParams(seed=turn, temperature=1.0, max_tokens=new, ignore_eos=True))
            list(stream)
            told.append(stream.completion)
            tokens += stream.completion.token_ids
            assert session.tokens_kept == len(tokens) - 1
            tight.generate([(ids * 6)[:240]], SamplingParams(temperature=0, max_tokens=4))
            assert session.tokens_kept == 0
    assert told == expected


def test_a_session_that_diverges_goes_on_from_where_the_tokens_are_the_same(forgetful):
    llm = forgetful
    ids = llm.tokenize(STORY)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    with llm.session() as session:
        for prompt, same in [(ids[:40], 0), (ids[:25] + ids[30:40], 25), (ids[:50], 25), (ids[:50], 49), (ids[:10], 9), (ids[20:30], 0), ([7], 0)]:
            before = llm.engine.stats()["tokens"]
            stream = session.stream(prompt, params)
            list(stream)
            assert stream.completion == llm_alone(llm, prompt, params)
            assert llm.engine.stats()["tokens"] - before - len(prompt) - 9 == len(prompt) - same + 9


def llm_alone(llm, prompt, params):
    return llm.generate([prompt], params)[0].outputs[0]


def test_two_sessions_do_not_mix(llm, tight):
    sizes = [(20, 8), (5, 10), (9, 12)]
    expected = [without_session(llm, sizes, seed=seed) for seed in (0, 50)]
    with tight.session() as first, tight.session() as second:
        told = [[], []]
        tokens = [[], []]
        ids = llm.tokenize(STORY)
        for turn, (given, new) in enumerate(sizes):
            streams = []
            for index, session in enumerate((first, second)):
                tokens[index] += (ids * 4)[turn * 7 :][:given]
                params = SamplingParams(seed=50 * index + turn, temperature=1.0, max_tokens=new, ignore_eos=True)
                streams.append(session.stream(list(tokens[index]), params))
            for _ in zip(*streams):
                pass
            for index, stream in enumerate(streams):
                list(stream)
                told[index].append(stream.completion)
                tokens[index] += stream.completion.token_ids
    assert told == expected


def test_a_turn_given_up_half_way_leaves_a_session_that_goes_on(llm, tight):
    ids = llm.tokenize(STORY)
    params = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    with tight.session() as session:
        for taken, crowd in [(5, False), (1, True), (0, True), (12, True)]:
            with session.stream(ids[:40], params) as stream:
                for _ in range(taken):
                    next(stream)
                with pytest.raises(RuntimeError, match="last stream has not ended"):
                    session.stream(ids[:50], params)
                if crowd:
                    tight.generate([(ids * 6)[:240]] * 2, SamplingParams(temperature=0, max_tokens=4))
            stream = session.stream(ids[:50], params)
            list(stream)
            assert stream.completion == llm_alone(llm, ids[:50], params)


def test_the_stream_of_a_session_that_is_gone_goes_on(llm):
    ids = llm.tokenize(STORY)[:20]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    stream = llm.session().stream(ids, params)
    assert len(list(stream)) == 10
    assert stream.completion == llm_alone(llm, ids, params)


# Several threads


def test_threads_get_what_they_would_get_alone(llm, tight):
    prompts, params = jobs(llm, 24, seed=2)
    alone = [result(llm.generate([prompt], each)[0]) for prompt, each in zip(prompts, params)]
    scored = llm.score(prompts[0], [prompts[1], prompts[2]])
    failures = []

    def together(part):
        for _ in range(2):
            assert results(tight.generate(prompts[part::3], params[part::3])) == alone[part::3]

    def streams():
        for index, (prompt, each) in enumerate(zip(prompts, params)):
            if each.n > 1:
                continue
            with tight.stream(prompt, each) as stream:
                for _ in range(index):
                    next(stream, None)
                if index % 3 == 0:
                    continue
                list(stream)
            assert stream.completion == alone[index][1][0]

    def scores():
        for _ in range(5):
            assert tight.score(prompts[0], [prompts[1], prompts[2]]) == scored

    def run(call, *arguments):
        try:
            call(*arguments)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=each) for each in ((together, 0), (together, 1), (together, 2), (streams,), (streams,), (scores,))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_closed_engine_ends_the_calls_of_other_threads(llm):
    tight = LLM(**TIGHT)
    outcome = []

    def generate():
        try:
            tight.generate([STORY] * 30, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        except EngineClosed as error:
            outcome.append(error)

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    while tight.engine.stats()["tokens"] < 200:
        pass
    tight.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert len(outcome) == 3


def test_paused_streams_do_not_keep_others_from_running(llm, tight):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    streams = [tight.stream(STORY[: 20 + index], params) for index in range(90)]
    for stream in streams:
        next(stream)
    expected = llm_alone(llm, llm.tokenize(STORY), params)
    assert tight.generate(STORY, params)[0].outputs[0] == expected
    for index, stream in enumerate(streams):
        list(stream)
        assert stream.completion.token_ids == llm_alone(llm, llm.tokenize(STORY[: 20 + index]), params).token_ids


def test_the_queue_keeps_its_bound(tight):
    loop = tight._loop
    waiting = []

    def requests():
        for index in range(500):
            waiting.append(len(loop.queue._waiting))
            yield tight.request([5 + index], SamplingParams(temperature=0, max_tokens=2))

    def stream():
        with tight.stream("Once", SamplingParams(temperature=0, max_tokens=2)) as stream:
            assert len(list(stream)) == 2

    threads = [threading.Thread(target=stream) for _ in range(100)]
    for thread in threads:
        thread.start()
    for _ in loop.run(requests()):
        pass
    for thread in threads:
        thread.join()
    assert len(waiting) == 500 and max(waiting) <= 64
    assert not loop.queue._waiting


def order_of_ends(llm, requests):
    """Requests, submitted by callers of their own, in the order in which they end."""
    mailbox = queue.SimpleQueue()
    for request, flow in requests:
        request.mailbox = mailbox
        llm._loop.queue.enter(request)
    for flow in {id(flow): flow for _, flow in requests}.values():
        llm._loop.submit([Submission(request) for request, of in requests if of is flow], flow)
    return [mailbox.get() for _ in requests]


def test_callers_take_turns_and_lower_priorities_come_first():
    with LLM(threads=1, kv_tokens=64, max_sequences=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        many, few = Flow(), Flow()
        first = llm.request("Once", replace(params, max_tokens=30))
        batch = [llm.request("Once", params) for _ in range(10)]
        others = [llm.request("The", params) for _ in range(2)]
        last = llm.request("He", params, priority=1)
        soon = llm.request("She", params, priority=-1)
        requests = [(first, Flow()), *((each, many) for each in [*batch, last]), *((each, few) for each in others), (soon, Flow())]
        ended = [id(request) for request in order_of_ends(llm, requests)]
        place = {name: ended.index(id(request)) for name, request in
                 {"soon": soon, "other 0": others[0], "other 1": others[1], "batch 1": batch[1], "batch 3": batch[3], "last": last}.items()}
        assert place["soon"] <= 1
        assert place["other 0"] < place["batch 1"] and place["other 1"] < place["batch 3"]
        assert place["last"] == len(requests) - 1


# Errors


def test_a_bad_prompt_among_good_ones_runs_nothing(llm):
    good = STORY[:30]
    before = llm.engine.stats()["tokens"]
    for bad in ("", [], [4096], [-1], [5] * 9000, "a " * 9000, b"text", [1.5], None):
        with pytest.raises((FerrumError, ValueError, TypeError)):
            llm.generate([good, bad, good])
    for params in (SamplingParams(allowed_token_ids=(4096,)), SamplingParams(allowed_token_ids=(7,), banned_token_ids=(7,)),
                   SamplingParams(logit_bias={99999: 1.0}), SamplingParams(stop_token_ids=(5000,))):
        with pytest.raises(ValueError):
            llm.generate([good, good], [SamplingParams(), params])
    assert llm.engine.stats()["tokens"] == before


@pytest.mark.parametrize("fail_at", [0, 1, 2, 7, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 200, 999, 3000])
def test_a_device_error_ends_the_call_and_leaves_nothing(llm, monkeypatch, fail_at):
    prompts, params = jobs(llm, 8, seed=3)
    monkeypatch.setattr("ferrum.llm.Engine", partial(Engine, fail_at=fail_at))
    with LLM(**TIGHT) as tight:
        with pytest.raises(DeviceError, match="injected failure"):
            while True:
                tight.generate(prompts, params)
        assert_empty(tight)
        assert results(tight.generate(prompts, params)) == results(llm.generate(prompts, params))
        assert_empty(tight)


def test_prompts_are_what_callers_have(llm):
    params = SamplingParams(temperature=0, max_tokens=3)
    expected = results(llm.generate([[5, 6], [7, 8]], params))
    for prompts in (np.array([[5, 6], [7, 8]]), [np.array([5, 6]), np.array([7, 8])], ((5, 6), range(7, 9)), (iter(ids) for ids in ([5, 6], [7, 8]))):
        assert results(llm.generate(prompts, params)) == expected
    for prompt in (np.array([5, 6]), [np.int64(5), 6], iter([5, 6])):
        assert results(llm.generate(prompt, params)) == expected[:1]
    assert results(llm.generate([[5, 6], [7, 8]], (params for _ in range(2)))) == expected
    assert llm.generate([], params) == llm.generate([], []) == llm.score("Once", []) == []
    assert llm.score([5], np.array([[6, 7]]))[0].token_ids == [6, 7]


@pytest.mark.parametrize("call, message", [
    (lambda llm: llm.generate("Once", {"temperature": 0}), r"^sampling_params is \{'temperature': 0\}. Give SamplingParams"),
    (lambda llm: llm.generate(["Once"], [5]), "^sampling_params is 5. Give SamplingParams"),
    (lambda llm: llm.generate({"text": "Once"}), "^The prompt is a dict without 'prompt' or 'prompt_token_ids'"),
    (lambda llm: llm.generate(["Once", {5, 6}]), r"^prompts\[1\] is set. Give a str, or token ids"),
    (lambda llm: llm.chat([{"role": "user", "content": "Hi"}], max_tokens=5), r"^max_tokens is a field of SamplingParams: pass SamplingParams\(max_tokens=...\)"),
    (lambda llm: llm.chat([{"role": "user", "content": "Hi"}], use_tqdm=False), "^there is no argument use_tqdm"),
    (lambda llm: llm.tokenize(["Once"]), "^text is list: give one str"),
    (lambda llm: llm.detokenize(505), "^token_ids is int. Give a str, or token ids"),
    (lambda llm: llm.stream("Once", {"n": 1}), "^sampling_params is .* Give SamplingParams"),
    (lambda llm: llm.generate(np.array(5)), "^The prompt is ndarray. Give a str, or token ids"),
    (lambda llm: llm.generate(["Once", 5]), r"^prompts\[1\] is int. Give a str, or token ids"),
    (lambda llm: llm.score("Once", [5, 6]), r"^continuations\[0\] is int. Give a str, or token ids"),
    (lambda llm: llm.score("Once", [[1.5]]), r"^continuations\[0\] has the token id 1.5. Give a str, or token ids"),
    (lambda llm: llm.score("Once", None), "^continuations is NoneType: give a list of them"),
    (lambda llm: llm.score("Once", b"upon"), "^continuations is bytes: give a list of them"),
    (lambda llm: llm.chat({"role": "user", "content": "Hi"}), "^messages is dict: give a list of messages"),
    (lambda llm: llm.chat("Hi"), "^messages is str: give a list of messages"),
])
def test_arguments_of_a_wrong_type_are_named(llm, call, message):
    with pytest.raises(TypeError, match=message):
        call(llm)


def test_a_continuation_that_does_not_fit_is_refused_with_the_figures(tight):
    with pytest.raises(FerrumError, match=r"^The prompt with continuations\[0\] has 258 tokens, the KV cache holds 256"):
        tight.score([5], [[6] * 257])


def test_the_smallest_temperature_draws_the_likeliest_tokens(llm):
    params = SamplingParams(temperature=1e-300, seed=1, max_tokens=5)
    assert llm.generate(STORY, params)[0].outputs[0].token_ids == llm_alone(llm, STORY, SamplingParams(temperature=0, max_tokens=5)).token_ids


# Ctrl-C


def run_script(script):
    """A process of its own: what fails here may hang."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parent)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


INTERRUPTED = """if True:
    import random, signal, threading
    from ferrum import LLM, SamplingParams
    from test_generate import TIGHT, assert_empty, jobs, results

    rng = random.Random(4)

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)

    def interrupted(call):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, rng.choice((0.005, 0.3))))
                call()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            return True
        return False

    llm = LLM(**TIGHT)
    prompts, params = jobs(llm, 6, seed=3)
    expected = results(llm.generate(prompts, params))
"""


def test_ctrl_c_at_any_time_leaves_nothing_and_the_next_texts_are_the_same():
    run_script(INTERRUPTED + """
    hits = 0
    for turn in range(60):
        hits += interrupted(lambda: llm.generate(prompts, params))
        assert_empty(llm)
        if turn % 12 == 0:
            assert results(llm.generate(prompts, params)) == expected
    assert hits > 30
    """)


def test_ctrl_c_in_one_thread_spoils_no_text_of_another():
    run_script(INTERRUPTED + """
    outcomes, stop = [], False

    def others(part):
        while not stop:
            outcomes.append(results(llm.generate(prompts[part::2], params[part::2])) == expected[part::2])

    threads = [threading.Thread(target=others, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        interrupted(lambda: llm.generate(prompts, params))
    stop = True
    for thread in threads:
        thread.join()
    assert outcomes and all(outcomes)
    assert_empty(llm)
    """)


def test_a_stream_goes_on_after_ctrl_c():
    run_script(INTERRUPTED + """
    params = SamplingParams(seed=1, temperature=1.0, max_tokens=100, ignore_eos=True, logprobs=1)
    expected = llm.generate([5, 6, 7], params)[0].outputs[0]
    for turn in range(30):
        stream = llm.stream([5, 6, 7], params)
        while not stream._request.finished:
            interrupted(lambda: [piece for piece in stream])
        assert stream.completion == expected
    """)


def test_a_signal_handler_gets_a_text_in_the_middle_of_another():
    run_script("""if True:
        import signal
        from ferrum import LLM, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        outcomes = []

        def handler(*_):
            outcomes.append(llm.generate("Once", SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].text)

        with LLM(threads=1, kv_tokens=1024) as llm:
            expected = llm.generate("Once upon", params)[0].outputs
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            for _ in range(5):
                assert llm.generate("Once upon", params)[0].outputs == expected
                with llm.stream("Once upon", params) as stream:
                    next(stream)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(outcomes) > 5 and set(outcomes) == {outcomes[0]}
            assert llm.engine.stats()["live_sequences"] == 0
    """)


def test_a_signal_handler_that_comes_at_any_line_of_the_first_call_gets_its_text():
    run_script("""if True:
        import signal, sys, threading
        from ferrum import LLM, SamplingParams

        params = SamplingParams(temperature=0, max_tokens=2)
        lines, fire_at, outcomes = 0, -1, []

        def trace(frame, event, _):
            global lines
            if frame.f_code.co_filename.endswith(("engine_loop.py", "threading.py")) and event == "line":
                lines += 1
                if lines == fire_at:
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGUSR1)
            return trace

        def handler(*_):
            outcomes.append(llm.generate("Once", params)[0].outputs[0].text)

        signal.signal(signal.SIGUSR1, handler)
        while True:
            with LLM(threads=1, kv_tokens=64) as llm:
                lines, fire_at, texts = 0, fire_at + 3, len(outcomes)
                sys.settrace(trace)
                text = llm.generate("Once", params)[0].outputs[0].text
                sys.settrace(None)
                assert sum(thread.name == "ferrum" for thread in threading.enumerate()) == 1
            if len(outcomes) == texts:
                break
        assert len(outcomes) > 10 and set(outcomes) == {text}
    """)
