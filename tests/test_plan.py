"""The plan against a memory budget, and against what the system would give: how many tokens the KV pool gets, and what is refused."""

import re

import pytest
from tiny_models import TinyConfig, write_tiny_model

from ferrum import options
from ferrum.errors import OptionError, OutOfMemory
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine, plan

LARGE_KV = TinyConfig(layers=2, kv_heads=4, context=20000)  # 4 KiB a token
GIVEN = dict(threads=1, max_sequences=4, prefill_chunk=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")

    def opened(config):
        path = folder / f"{config.context}.gguf"
        return GGUFFile.open(path if path.exists() else write_tiny_model(path, config=config, types="Q8_0"))

    return opened


@pytest.fixture
def file(model):
    return model(LARGE_KV)


@pytest.fixture
def available(monkeypatch):
    """Sets what the system says that it would give."""
    return lambda nbytes: monkeypatch.setattr(options, "available_memory", lambda: nbytes)


def total(file, tokens):
    return plan(file, kv_tokens=tokens, **GIVEN)["total_bytes"]


@pytest.mark.parametrize("tokens", [512, 528, 1000, 8176])
def test_the_default_pool_is_the_largest_that_the_budget_holds(file, tokens):
    blocks = -(-tokens // 16) * 16
    for spare in (0, 1, total(file, blocks + 16) - total(file, blocks) - 1):
        planned = plan(file, memory_budget=total(file, blocks) + spare, **GIVEN)
        assert planned["options"]["kv_tokens"] == blocks and planned["total_bytes"] == total(file, blocks)
        assert planned["options"]["memory_budget"] == total(file, blocks) + spare


def test_a_budget_holds_more_tokens_in_q8_0(file):
    budget = total(file, 4096)
    of_q8_0 = plan(file, memory_budget=budget, kv_type="q8_0", **GIVEN)
    assert of_q8_0["kv_bytes_per_token"] * 32 == plan(file, **GIVEN)["kv_bytes_per_token"] * 17
    assert 4096 * 1.8 < of_q8_0["options"]["kv_tokens"] < 4096 * 32 / 17
    assert of_q8_0["total_bytes"] <= budget


def test_a_large_budget_leaves_the_default(file, model):
    assert plan(file, memory_budget="1TiB", **GIVEN)["options"]["kv_tokens"] == 8192
    assert plan(model(TinyConfig(context=250)), memory_budget="1TiB", **GIVEN)["options"]["kv_tokens"] == 256


@pytest.mark.parametrize("context", [250, 20000])
def test_a_default_pool_of_less_than_512_tokens_or_the_context_is_refused(model, context):
    file = model(TinyConfig(layers=2, kv_heads=4, context=context))
    least = min(512, 256 if context == 250 else 512)
    assert plan(file, memory_budget=total(file, least), **GIVEN)["options"]["kv_tokens"] == least
    for call in (plan, Engine):
        with pytest.raises(OutOfMemory, match=f"kv_tokens={least}, .* Without kv_tokens at least {least} must fit; at most {least - 16} would"):
            call(file, memory_budget=total(file, least) - 1, **GIVEN)
    assert plan(file, memory_budget=total(file, least) - 1, kv_tokens=least - 16, **GIVEN)["options"]["kv_tokens"] == least - 16


def test_a_given_pool_is_taken_or_refused_with_all_figures(file):
    assert plan(file, kv_tokens=4096, memory_budget=total(file, 4096), **GIVEN)["options"]["kv_tokens"] == 4096
    with Engine(file, kv_tokens=4096, memory_budget=total(file, 4096), **GIVEN) as engine:
        assert engine.kv_capacity == 4096 and engine.options["memory_budget"] == total(file, 4096)
    with pytest.raises(OutOfMemory) as error:
        plan(file, kv_tokens=1 << 20, memory_budget=total(file, 3008) + 5, **GIVEN)
    planned = plan(file, kv_tokens=1 << 20, **GIVEN)
    figures = [planned["total_bytes"] / (1 << 30), (total(file, 3008) + 5) / (1 << 20), planned["weights_bytes"] / (1 << 20), 4.0, planned["scratch_bytes"] / (1 << 20)]
    assert [float(figure) for figure in re.findall(r"([0-9.]+) [GM]iB", str(error.value))] == pytest.approx(figures, abs=0.05)
    assert re.search(r"kv_tokens=1048576, .* At most kv_tokens=3008 would fit\. Raise memory_budget, or lower kv_tokens, prefill_chunk or max_sequences\.$", str(error.value))


def test_a_budget_below_one_block_or_the_weights_says_so(file):
    weights = plan(file, **GIVEN)["weights_bytes"]
    with pytest.raises(OutOfMemory, match="Not even one block of 16 tokens would fit"):
        plan(file, kv_tokens=64, memory_budget=total(file, 16) - 1, **GIVEN)
    with pytest.raises(OutOfMemory, match="Not even the weights fit. Raise memory_budget or choose a smaller model"):
        plan(file, memory_budget=weights, **GIVEN)
    with pytest.raises(OptionError, match="memory_budget"):
        plan(file, memory_budget="much", **GIVEN)


def test_without_a_budget_the_default_pool_fits_what_the_system_would_give(file, available):
    weights = plan(file, **GIVEN)["weights_bytes"]
    for nbytes, tokens in ((total(file, 1600), 1600), (total(file, 1616) - 1, 1600), (total(file, 528), 528), (total(file, 64), 512), (weights, 512), (None, 8192), (1 << 50, 8192)):
        available(nbytes)
        assert plan(file, **GIVEN)["options"]["kv_tokens"] == tokens, nbytes
        assert plan(file, kv_tokens=4096, **GIVEN)["options"]["kv_tokens"] == 4096


def test_weights_larger_than_memory_leave_it_to_the_rest(model, available):
    """They are mapped, and the system pages them."""
    file = model(TinyConfig(layers=2, kv_heads=1, context=20001))
    rest = total(file, 640) - plan(file, **GIVEN)["weights_bytes"]
    assert rest < plan(file, **GIVEN)["weights_bytes"]
    available(rest)
    assert plan(file, **GIVEN)["options"]["kv_tokens"] == 640
    available(1)
    assert plan(file, **GIVEN)["options"]["kv_tokens"] == 512
