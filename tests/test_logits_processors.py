"""Logits processors: functions that edit a row of logits in place before a token is drawn."""

import numpy as np
import pytest

from ferrum import LLM, SamplingParams
from ferrum.errors import OptionError


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=1024) as llm:
        yield llm


def nothing(token_ids, logits):
    """Edits nothing."""


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0, max_tokens=20), SamplingParams(temperature=1.0, seed=3, max_tokens=20),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=4, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=20, logprobs=2),
    SamplingParams(temperature=1.0, typical_p=0.8, seed=5, min_tokens=10, max_tokens=20, banned_token_ids=(263,)),
    SamplingParams(temperature=1.0, seed=6, allowed_token_ids=tuple(range(100, 300)), max_tokens=20),
], ids=lambda params: f"temperature {params.temperature}, top_k {params.top_k}")
def test_one_that_edits_nothing_changes_no_draw(llm, params):
    edited = SamplingParams(**{**{name: getattr(params, name) for name in params.__dataclass_fields__}, "logits_processors": [nothing]})
    together = llm.generate(["Once upon a time"] * 3, [edited, params, edited])
    assert together[0].outputs == together[1].outputs == together[2].outputs


def test_they_see_prompt_and_text_and_their_edits_decide(llm):
    seen = []

    def forbid_repeats(token_ids, logits):
        seen.append(list(token_ids))
        assert logits.shape == (llm.config["vocab_size"],) and logits.dtype == np.float32
        logits[token_ids] = -np.inf

    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logits_processors=[forbid_repeats]))
    ids = output.outputs[0].token_ids
    assert len(set(ids + output.prompt_token_ids)) == len(ids) + len(set(output.prompt_token_ids))
    assert seen == [output.prompt_token_ids + ids[:n] for n in range(60)]


def test_they_run_in_order_and_unused_tokens_stay_out(llm):
    def first(token_ids, logits):
        logits[:] = -np.inf
        logits[[300, 301]] = 1.0

    def second(token_ids, logits):
        logits[301] += 1.0

    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logits_processors=(first, second))
    assert llm.generate("Once", params)[0].outputs[0].token_ids == [301] * 3
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logits_processors=first)
    assert llm.generate("Once", params)[0].outputs[0].token_ids == [300] * 3


@pytest.mark.parametrize("processor, error, message", [
    (lambda ids, logits: 1 / 0, ZeroDivisionError, "division"),
    (lambda ids, logits: logits * 2, TypeError, "returned something: edit the row in place"),
    (lambda ids, logits: logits.fill(-np.inf), ValueError, "left no token to draw"),
    (lambda ids, logits: logits.fill(np.nan), ValueError, "left no token to draw"),
    (lambda ids, logits: llm_of_test.generate("Once"), RuntimeError, "from inside a step"),
    (lambda ids, logits: llm_of_test.close(), RuntimeError, "from inside a step"),
    (lambda ids, logits: exit(3), SystemExit, "3"),
])
def test_what_goes_wrong_in_one_ends_its_own_request(llm, processor, error, message):
    global llm_of_test
    llm_of_test = llm
    plain = SamplingParams(temperature=0, max_tokens=10)
    expected = llm.generate("Once upon a time", plain)[0].outputs
    requests = [llm.request("Once upon a time", plain), llm.request("The fox", SamplingParams(max_tokens=5, logits_processors=[processor]))]
    ended = {id(request): request for request in llm.as_completed(requests)}
    assert len(ended) == 2 and requests[0].output().outputs == expected
    with pytest.raises(error, match=message):
        raise requests[1].error
    with pytest.raises(error):
        llm.generate(["The fox", "Once"], SamplingParams(max_tokens=5, logits_processors=[processor]))
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0


def test_what_is_no_function_is_refused():
    with pytest.raises(OptionError, match="logits_processors has 5: expected functions"):
        SamplingParams(logits_processors=[5])
