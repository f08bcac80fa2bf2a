"""Thousands of requests of all kinds, at once and in turn, broken off and failing: nothing grows, nothing is left, every text is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = """if True:
    import asyncio, gc, json, os, random, sys, threading
    from functools import partial
    import ferrum.llm
    from ferrum import AsyncLLM, LLM, SamplingParams
    from ferrum.errors import DeviceError, FerrumError

    count, threads, fail_at = json.loads(sys.argv[1])
    ferrum.llm.Engine = partial(ferrum.llm.Engine, fail_at=fail_at)

    def resident():
        with open("/proc/self/statm", encoding="ascii") as pages:
            return (int(pages.read().split()[1]) - int(open("/proc/self/statm").read().split()[2])) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    llm = LLM(threads=2, kv_tokens=2048, max_sequences=16, prefill_chunk=128)
    model = AsyncLLM(llm)
    ids = llm.tokenize("Once upon a time there was a little fox who lived in a forest. One day she met a friendly bear, and they went to the river.")
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = {n: llm.generate([ids[:n]], greedy)[0].outputs[0].token_ids for n in range(1, 20)}
    device_errors, wrong = [], []

    def bad_processor(token_ids, logits):
        raise LookupError

    def one(rng, kind):
        length, tokens = rng.choice((3, 10, 40, 200)), rng.choice((1, 2, 5, 12))
        prompt = [rng.randrange(300, 4000) for _ in range(length)]
        params = SamplingParams(temperature=rng.choice((0, 1.0)), max_tokens=tokens, n=rng.choice((1, 1, 1, 3)), logprobs=rng.choice((None, None, 2)),
                                repetition_penalty=rng.choice((1.0, 1.0, 1.1)), stop=rng.choice(((), ("e",))))
        if kind < 3:
            llm.generate([prompt] * rng.choice((1, 2)), params, priority=rng.choice((0, 0, 1)))
        elif kind == 3:
            with llm.stream(prompt, SamplingParams(max_tokens=None)) as stream:
                for _ in range(rng.randrange(6)):
                    next(stream, None)
        elif kind == 4:
            next(llm.stream(prompt, SamplingParams(max_tokens=100)), None)  # dropped
        elif kind == 5:
            llm.generate(prompt, SamplingParams(max_tokens=None, ignore_eos=True), timeout=rng.choice((1e-6, 0.003)))
        elif kind == 6:
            llm.score(prompt, [[5, 6], prompt[:tokens]])
        elif kind == 7:
            with llm.session() as session:
                for end in (length // 2 + 1, length):
                    list(session.stream(prompt[:end], SamplingParams(max_tokens=2)))
        elif kind == 8:
            for error, bad in ((ValueError, ""), (FerrumError, [5] * 9999), (ValueError, [-4]), (TypeError, 4.5)):
                try:
                    llm.generate(bad)
                except error:
                    pass
            try:
                llm.generate(prompt, SamplingParams(logits_processors=[bad_processor]))
            except LookupError:
                pass
        else:
            n = rng.randrange(1, 20)
            if llm.generate([ids[:n]], greedy)[0].outputs[0].token_ids != expected[n]:
                wrong.append(n)

    async def several(rng, number):
        streams = [model.stream(ids[: rng.randrange(1, 20)], SamplingParams(max_tokens=rng.choice((3, 50)))) for _ in range(number)]
        async def read(stream, most):
            async with stream:
                async for _ in stream:
                    most -= 1
                    if not most:
                        break
        tasks = [asyncio.create_task(read(stream, rng.choice((2, 99)))) for stream in streams]
        await asyncio.sleep(rng.choice((0, 0.002)))
        for task in tasks[:: rng.choice((3, 1000))]:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, DeviceError):
                raise result

    def some(number, seed):
        rng = random.Random(seed)
        done = 0
        while done < number:
            try:
                if rng.randrange(12):
                    one(rng, rng.randrange(10))
                    done += 1
                else:
                    asyncio.run(several(rng, 8))
                    done += 8
            except DeviceError as error:
                device_errors.append(str(error))
            except RuntimeError as error:
                assert "cannot be" not in str(error), error

    def phase(number, seed):
        workers = [threading.Thread(target=some, args=(-(-number // threads), seed * 1000 + i)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        llm._loop.settle()
        gc.collect()
        return resident()

    # The first are one of each kind and one of each thread, so that what is imported at first use is there, the memory of the KV cache, which
    # is planned, and the stacks of the callers, which the system keeps.
    llm.generate([[5 + n % 900 for n in range(128)] for _ in range(16)], SamplingParams(max_tokens=1, logprobs=2))
    for kind in range(10):
        one(random.Random(kind), kind)
    asyncio.run(several(random.Random(0), 8))
    marks = [phase(16, 1), phase(990, 2), phase(max(count - 1000, 0), 3)]
    stats = llm.engine.stats()
    llm.close()
    del llm, model
    gc.collect()
    print(json.dumps(dict(before=before, marks=marks, closed=resident(), live=stats["live_sequences"], free=stats["kv_blocks_free"], blocks=stats["kv_blocks"],
                          device_errors=len(device_errors), wrong=wrong)))
"""


def soak(count, threads, fail_at=-1):
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # glibc gives each of the calling threads a heap of its own, which fills for a while
    done = subprocess.run([sys.executable, "-c", SOAK, json.dumps([count, threads, fail_at])], capture_output=True, text=True, timeout=600,
                          cwd=Path(__file__).parent, env=environ)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of a process from /proc")
def test_ten_thousand_requests_of_sixteen_threads_leave_nothing():
    found = soak(10_000, 16)
    assert found["wrong"] == [] and found["device_errors"] == 0
    assert (found["live"], found["free"]) == (0, found["blocks"])
    after_10, after_1000, after_all = found["marks"]
    assert after_1000 - after_10 < 8 << 20
    assert after_all - after_1000 < 8 << 20


def test_a_failing_device_in_a_crowd_ends_some_requests_and_poisons_nothing():
    found = soak(600, 16, fail_at=20_000)
    assert found["wrong"] == [] and found["device_errors"] > 0
    assert (found["live"], found["free"]) == (0, found["blocks"])
