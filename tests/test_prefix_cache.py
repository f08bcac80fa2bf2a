"""Prompts that begin alike, through an LLM: computed once, and the texts are those without the cache."""

import random

import pytest

from ferrum import LLM, SamplingParams

STORY = ("Once upon a time there was a little fox who lived in a forest. One day she met a friendly bear, and they went to the river to "
         "catch fish. The bear said that he was hungry, but the fox had a better idea: they would bake a big cake for all their friends. ")
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def without():
    with LLM(threads=1, kv_tokens=8192, prefix_cache=False) as llm:
        yield llm


def texts_of(llm, prompts, params=PARAMS):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def tokens_computed(llm, prompts):
    before = llm.engine.stats()["tokens"]
    texts = texts_of(llm, prompts)
    return texts, llm.engine.stats()["tokens"] - before


def assert_all_free(llm):
    stats = llm.engine.stats()
    assert stats["live_sequences"] == 0 and stats["kv_blocks_free"] == stats["kv_blocks"]


@pytest.mark.parametrize("prefill_chunk", [64, 512])
def test_sixteen_prompts_compute_their_common_beginning_once(without, prefill_chunk):
    ids = without.tokenize(STORY * 8)
    prompts = [ids[:300] + ids[index : index + 12] for index in range(16)]
    with LLM(threads=1, kv_tokens=8192, prefill_chunk=prefill_chunk) as llm:
        texts, computed = tokens_computed(llm, prompts)
        assert texts == texts_of(without, prompts)
        assert computed <= 312 + 15 * (312 - 288) + 16 * 5
        again, computed = tokens_computed(llm, prompts)
        assert again == texts and computed <= 16 * (312 - 304 + 5)
        assert_all_free(llm)
        assert llm.engine.stats()["prefix_hits"] >= 31


def test_a_reply_is_part_of_the_beginning_of_the_next_prompt(without):
    ids = without.tokenize(STORY * 2)
    with LLM(threads=1, kv_tokens=1024) as llm:
        (reply,) = texts_of(llm, [ids[:60]], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        prompt = ids[:60] + list(reply) + ids[60:70]
        texts, computed = tokens_computed(llm, [prompt])
        assert computed == len(prompt) - 96 + 5
        assert texts == texts_of(without, [prompt])


def test_prompt_logprobs_are_computed_whatever_is_cached(without):
    ids = without.tokenize(STORY)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    with LLM(threads=1, kv_tokens=512) as llm:
        texts_of(llm, [ids[:50]])
        assert llm.generate([ids[:50]], params)[0].prompt_logprobs == without.generate([ids[:50]], params)[0].prompt_logprobs


def test_a_small_pool_gives_up_what_it_kept(without):
    ids = without.tokenize(STORY * 4)
    rng = random.Random(3)
    prompts = [ids[start : start + rng.randint(40, 150)] for start in (0, 0, 20, 0, 40, 20, 0, 60, 0, 80)] * 2
    with LLM(threads=1, kv_tokens=256, max_sequences=4, prefill_chunk=48) as llm:
        assert texts_of(llm, prompts) == texts_of(without, prompts)
        assert llm.engine.stats()["prefix_evictions"] > 10 and llm.engine.stats()["prefix_hits"] > 3
        assert_all_free(llm)


@pytest.mark.slow_under_sanitizers
def test_two_thousand_requests_leave_every_block_free(without):
    ids = without.tokenize(STORY * 8)
    rng = random.Random(4)

    def request():
        start, length = rng.choice((0, 0, 0, 5, 9)), rng.randint(1, 90)
        return ids[start : start + length] + rng.sample(ids, rng.randint(0, 5))

    requests = [(request(), SamplingParams(temperature=1.0, seed=index, max_tokens=rng.randint(1, 3), ignore_eos=True)) for index in range(2000)]
    prompts, params = map(list, zip(*requests))
    with LLM(threads=1, kv_tokens=768, max_sequences=8, prefill_chunk=128) as llm:
        texts = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert_all_free(llm)
        stats = llm.engine.stats()
        assert stats["prefix_hits"] > 500 and stats["prefix_evictions"] > 100
        assert stats["tokens"] < sum(map(len, prompts)) / 2
    sample = range(0, 2000, 40)
    assert [texts[index] for index in sample] == [without.generate([prompts[index]], params[index])[0].outputs[0].token_ids for index in sample]
