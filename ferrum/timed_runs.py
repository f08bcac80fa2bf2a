"""What a benchmark times: requests that run through the loop of an LLM, as everybody's do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from ferrum.engine_loop import Flow, Retained, StepReport, Submission
from ferrum.errors import FerrumError
from ferrum.llm import LLM
from ferrum.request import Request
from ferrum.sampling import SamplingParams
from ferrum.tokenizer import Tokenizer


class Timed(NamedTuple):
    """What requests generated, the ids of each, and the seconds of what was timed of them."""

    ids: list[list[int]]
    seconds: float


def random_prompts(tokenizer: Tokenizer, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random plain tokens, the same for the same seed; no two prompts begin alike, as far as the vocabulary goes."""
    rng = np.random.default_rng(seed)
    plain = np.array(tokenizer.plain_ids)
    prompts = rng.choice(plain, (count, length))
    prompts[:, 0] = rng.choice(plain, count, replace=count > len(plain))
    return prompts.tolist()


def alone(llm: LLM, prompt: list[int], tokens: int) -> list[int]:
    """The ids that a prompt gives when nothing runs beside it."""
    return _run(llm, [_request(llm, prompt, tokens)])[0][0]


def read_prompts(llm: LLM, prompts: list[list[int]], retained: list[Retained] | None = None) -> Timed:
    """Read prompts together, each up to its first token; `retained` keep them in the KV cache. All steps are timed."""
    ids, steps = _run(llm, [_request(llm, prompt, 1) for prompt in prompts], retained)
    return Timed(ids, sum(step.seconds_between for step in steps))


def decode(llm: LLM, prompts: list[list[int]], retained: list[Retained], tokens: int) -> Timed:
    """Go on from retained prompts by `tokens` + 1 tokens; then the KV cache holds the prompts again, as far as it matters.

    The first step reads the last token of each prompt anew; it is not timed. Of the others each goes on by one token of all, else
    FerrumError.
    """
    requests = [_request(llm, prompt, tokens + 2) for prompt in prompts]  # ending a text is no part of a step
    ids, steps = _run(llm, requests, retained, lambda steps: len(steps) > tokens)
    if len(steps) != tokens + 1 or any(step[:2] != (0, len(prompts)) for step in steps):
        raise FerrumError(f"A step did not decode all of {len(prompts)} sequences: something else runs in this engine, or its KV cache is "
                          "too small. Raise kv_tokens (--kv-tokens).")
    return Timed(ids, sum(step.seconds_between for step in steps[1:]))


def warm_up(llm: LLM, prompts: list[list[int]]) -> None:
    """Bring weights into memory and run all code once, with the beginnings of prompts."""
    llm.engine.warm_up()
    beginnings = [prompt[:16] for prompt in prompts]
    with keeping(llm, len(prompts)) as retained:
        read_prompts(llm, beginnings, retained)
        decode(llm, beginnings, retained, 1)


@contextmanager
def keeping(llm: LLM, count: int) -> Iterator[list[Retained]]:
    """Places of `count` sequences in the KV cache, which go back at the end of the `with` block."""
    retained = [Retained() for _ in range(count)]
    try:
        yield retained
    finally:
        for each in retained:
            llm._loop.drop(each)
        llm._loop.settle()


def _request(llm: LLM, prompt: list[int], tokens: int) -> Request:
    return Request(None, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), llm.tokenizer)


def _run(
    llm: LLM, requests: list[Request], retained: list[Retained] | None = None, enough: Callable[[list[StepReport]], bool] | None = None,
) -> tuple[list[list[int]], list[StepReport]]:
    """Run requests together to their ends, or until `enough`, and drop what is left of them: their ids, and the steps."""
    loop = llm._loop
    steps: list[StepReport] = []
    mailbox: SimpleQueue[Request] = SimpleQueue()

    def after_step(report: StepReport) -> None:
        steps.append(report)
        if enough is not None and enough(steps):
            for request in requests:
                loop.drop(request)

    loop.check_caller()
    loop.on_step = after_step
    try:
        for request in requests:
            request.mailbox = mailbox
            loop.queue.enter(request)
        loop.submit([Submission(*each) for each in zip(requests, retained or repeat(None))], Flow())
        for _ in requests:
            mailbox.get()
    finally:
        loop.on_step = None
        for request in requests:
            loop.drop(request)
    for request in requests:
        if request.error is not None:
            raise request.error
    return [list(request.texts[0].token_ids) for request in requests], steps
