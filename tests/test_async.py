"""AsyncLLM: many tasks on one engine, each with the text that it would get alone; what is cancelled, late or failed harms nobody."""

import asyncio
import math
import random
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest

from ferrum import LLM, AsyncLLM, SamplingParams
from ferrum.errors import DeviceError, EngineClosed
from ferrum_native._native import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
PROMPTS = [f"Once upon a time there were {count} {animals}" for count in ("two", "three", "ten") for animals in ("foxes", "birds", "dogs", "mice")]


@pytest.fixture(scope="module")
def llm():
    with LLM(threads=1, kv_tokens=2048, max_sequences=8) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left(llm):
    yield
    llm._loop.settle()
    assert llm.engine.stats()["live_sequences"] == 0
    assert not llm._loop.queue._waiting


@pytest.fixture(scope="module")
def alone(llm):
    return [llm.generate(prompt, GREEDY)[0].outputs[0] for prompt in PROMPTS]


def test_calls_give_what_those_of_an_llm_give(llm, alone):
    async def main():
        model = AsyncLLM(llm)
        told = []
        outputs = await model.generate(PROMPTS, GREEDY, progress=lambda done, total: told.append((done, total)))
        assert [output.outputs[0] for output in outputs] == alone
        assert told == [(n + 1, len(PROMPTS)) for n in range(len(PROMPTS))]
        messages = [{"role": "user", "content": "Tell me a story."}]
        assert (await model.chat(messages, GREEDY))[0].outputs == llm.chat(messages, GREEDY)[0].outputs
        assert await model.score("Once", [" upon", " a"]) == llm.score("Once", [" upon", " a"])
        stream = model.stream_chat(messages, GREEDY)
        text = "".join([piece.text async for piece in stream])
        assert text == stream.completion.text == llm.chat(messages, GREEDY)[0].outputs[0].text
        assert await model.generate([], GREEDY) == await model.score("Once", []) == []
        long = "a " * 900  # tokenized in a thread
        assert (await model.generate([long], GREEDY))[0].outputs == llm.generate([long], GREEDY)[0].outputs

    asyncio.run(main())


def test_tasks_and_threads_run_together_on_one_engine(llm, alone):
    rng = random.Random(1)

    async def reader(model, index):
        async with model.stream(PROMPTS[index], GREEDY) as stream:
            limit = rng.choice((3, 99))
            async for piece in stream:
                limit -= 1
                if not limit:
                    break
        assert alone[index].text.startswith(stream.completion.text.rstrip("\ufffd"))
        return limit > 0 and stream.completion == alone[index]

    async def main():
        model = AsyncLLM(llm)
        order = [rng.randrange(len(PROMPTS)) for _ in range(200)]
        return await asyncio.gather(*(reader(model, index) for index in order))

    failures = []

    def other_thread():
        try:
            for _ in range(4):
                assert [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY)] == alone
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=other_thread) for _ in range(4)]
    for thread in threads:
        thread.start()
    whole = asyncio.run(main())
    for thread in threads:
        thread.join()
    assert not failures and 60 < sum(whole) < 160


def test_a_cancelled_task_ends_its_texts(llm):
    async def main():
        model = AsyncLLM(llm)
        kinds = [model.generate([PROMPTS[0]] * 20, ENDLESS), consume(model.stream(PROMPTS[1], ENDLESS)), model.chat([{"role": "user", "content": "Go"}], ENDLESS)]
        tasks = [asyncio.create_task(each) for each in kinds]
        while llm.engine.stats()["live_sequences"] < 8:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        assert all(isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True))
        await asyncio.to_thread(llm._loop.settle)
        assert llm.engine.stats()["live_sequences"] == 0

    asyncio.run(main())


async def consume(stream):
    return [piece async for piece in stream]


def test_a_stream_that_is_only_dropped_ends(llm):
    async def main():
        async for _ in AsyncLLM(llm).stream(PROMPTS[0], ENDLESS):
            break
        await asyncio.to_thread(llm._loop.settle)
        assert llm.engine.stats()["live_sequences"] == 0

    asyncio.run(main())


def test_time_runs_out_for_running_and_for_waiting_texts(llm):
    async def main():
        model = AsyncLLM(llm)
        crowd = [asyncio.create_task(consume(model.stream(PROMPTS[0], ENDLESS))) for _ in range(8)]
        while llm.engine.stats()["live_sequences"] < 8:
            await asyncio.sleep(0.001)
        (waiting,) = await model.generate(PROMPTS[1], GREEDY, timeout=0.02)
        queued = await model.generate([PROMPTS[1]] * 100, GREEDY, timeout=0.02)
        with pytest.raises(TimeoutError, match="not ready in time"):
            await model.score("Once", [" upon"], timeout=0.01)
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        assert {each.outputs[0].finish_reason for each in (waiting, *queued)} == {"timeout"}
        (running,) = await model.generate(PROMPTS[1], ENDLESS, timeout=0.05)
        assert running.outputs[0].finish_reason == "timeout" and running.outputs[0].text
        assert running.outputs[0].text == llm.tokenizer.decode(running.outputs[0].token_ids)

    asyncio.run(main())


def test_the_event_loop_goes_on_while_a_long_prompt_is_read(llm):
    async def main():
        model = AsyncLLM(llm)
        turns, read = 0, []
        stream = model.stream([5 + n % 900 for n in range(1800)], GREEDY, prefill_progress=lambda done, total: read.append((done, total)))
        task = asyncio.create_task(consume(stream))
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns > 100
        assert [done for done, _ in read] == [512, 1024, 1536, 1800] and {total for _, total in read} == {1800}

    asyncio.run(main())


def test_errors_reach_the_task_and_the_engine_goes_on(llm, monkeypatch, alone):
    monkeypatch.setattr("ferrum.llm.Engine", partial(Engine, fail_at=1000))

    async def main():
        async with await AsyncLLM.load(threads=1, kv_tokens=1024) as model:
            with pytest.raises(ValueError, match="is empty"):
                await model.generate(["Once", ""])
            with pytest.raises(ValueError, match="n is 2"):
                model.stream("Once", SamplingParams(n=2))
            results = await asyncio.gather(*(model.generate(prompt, GREEDY) for prompt in PROMPTS * 2), return_exceptions=True)
            failed = [each for each in results if isinstance(each, BaseException)]
            assert failed and all(isinstance(each, DeviceError) for each in failed)
            assert [output.outputs[0] for output in await model.generate(PROMPTS, GREEDY)] == alone
            stream = model.stream("Once", ENDLESS)
            await anext(stream)
        with pytest.raises(EngineClosed):
            await consume(stream)
        with pytest.raises(EngineClosed):
            await model.generate("Once")

    asyncio.run(main())


@contextmanager
def full_queue(llm):
    """All places of the queue are taken, by requests that do not come."""
    requests = [llm.request("Once", GREEDY) for _ in range(llm._loop.queue._limit)]
    assert all(llm._loop.queue.enter(request, wait=False) for request in requests)
    yield
    for request in requests:
        llm._loop.drop(request)


@pytest.mark.parametrize("waits_for", ["a piece", "a place in the queue"])
def test_a_stream_may_be_closed_by_other_tasks_than_its_reader(llm, waits_for):
    async def main():
        stream = AsyncLLM(llm).stream(PROMPTS[0], ENDLESS)
        reader = asyncio.create_task(consume(stream))
        while waits_for == "a piece" and not stream.prompt_tokens_read:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(reader, stream.close(), stream.close()), 20)
        assert stream.completion.finish_reason == "cancelled"

    with nullcontext() if waits_for == "a piece" else full_queue(llm):
        asyncio.run(main())


def test_a_stream_that_waits_for_a_place_may_be_closed_by_another_thread(llm):
    stream, pieces = llm.stream(PROMPTS[0], ENDLESS), []
    with full_queue(llm):
        reader = threading.Thread(target=lambda: pieces.extend(stream), daemon=True)
        reader.start()
        while not llm._loop.queue._bells:
            time.sleep(0.001)
        stream.close()
        reader.join(20)
        assert not reader.is_alive() and pieces == [] and stream.completion.finish_reason == "cancelled"


def test_a_text_without_end_of_time_waits_for_its_place(llm, alone):
    outputs = []
    with full_queue(llm):
        caller = threading.Thread(target=lambda: outputs.extend(llm.generate(PROMPTS[:1], GREEDY, timeout=math.inf)))
        caller.start()
        while not llm._loop.queue._bells and caller.is_alive():
            time.sleep(0.001)
    caller.join()
    assert [output.outputs[0] for output in outputs] == alone[:1]


def test_what_a_callback_raises_ends_the_texts_of_the_call(llm):
    async def main():
        with pytest.raises(ZeroDivisionError) as raised:
            await AsyncLLM(llm).generate([PROMPTS[0]] * 3, [GREEDY, ENDLESS, ENDLESS], progress=lambda done, total: 1 / 0)
        await asyncio.to_thread(llm._loop.settle)
        assert llm.engine.stats()["live_sequences"] == 0, raised

    asyncio.run(main())


def test_an_event_loop_that_ended_in_the_middle_stops_nobody(llm, alone):
    async def leave():
        stream = AsyncLLM(llm).stream(PROMPTS[0], ENDLESS)
        await anext(stream)
        return stream

    stream = asyncio.run(leave())
    assert [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY)] == alone
    del stream
