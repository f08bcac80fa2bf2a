"""What the profile counts, against a count from the model's shapes and the reference's routing; and that it changes nothing else."""

import json
from collections import defaultdict

import numpy as np
import pytest
from reference import ReferenceModel, route
from tiny_models import TinyConfig, random_token_ids, write_tiny_model

from ferrum.errors import DeviceError
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine

CONFIG = TinyConfig(layers=3, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=16, top_k=2, expert_ffn=96, vocab=512, context=256)
OPTIONS = dict(threads=1, kv_tokens=256, max_sequences=4, prefill_chunk=16, activations="float32")
OPS = ["embed", "norm", "qkv", "qk_norm_rope_cache", "attention", "attn_output", "route", "experts_gate_up", "experts_down", "gather_rows", "head"]


@pytest.fixture(scope="module", params=["F32", "Q8_0"])
def file(request, tmp_path_factory):
    return GGUFFile.open(write_tiny_model(tmp_path_factory.mktemp("profile") / "tiny.gguf", config=CONFIG, types=request.param, seed=2))


class RoutedModel(ReferenceModel):
    """The reference, which also keeps the experts of each layer and position."""

    def experts_block(self, prefix, x):
        self.experts.append(route(x, self.weight(prefix + "ffn_gate_inp.weight"), self.config.top_k)[0])
        return super().experts_block(prefix, x)

    def experts_of(self, tokens):
        """[layers, T, K]"""
        self.experts = []
        self.logits(tokens)
        return np.array(self.experts)


def count_step(file, parts, kv_bytes):
    """{op: [calls, bytes, macs]} of a step of parts (experts [layers, T, K] of the whole text, first position, end, rows with logits)."""
    c, nbytes = CONFIG, {name: tensor.nbytes for name, tensor in file.tensors.items()}
    ops = defaultdict(lambda: np.zeros(3, np.int64))
    tokens, rows = sum(end - first for _, first, end, _ in parts), sum(wanted for *_, wanted in parts)
    q_size, token_kv = c.heads * c.head_dim, int(2 * c.kv_heads * c.head_dim * kv_bytes)
    ops["embed"] += 1, tokens * nbytes["token_embd.weight"] // c.vocab, 0
    for layer in range(c.layers):
        def weights(*kinds):
            return sum(nbytes[f"blk.{layer}.{kind}.weight"] for kind in kinds)

        last = layer + 1 == c.layers
        ops["norm"] += 1, weights("attn_norm"), 0
        ops["qkv"] += 1, weights("attn_q", "attn_k", "attn_v"), tokens * c.hidden * (c.heads + 2 * c.kv_heads) * c.head_dim
        ops["qk_norm_rope_cache"] += 1, tokens * token_kv + weights("attn_q_norm", "attn_k_norm"), 0
        if last and rows == 0:
            return ops
        seen = sum(sum(range(first + 1, end + 1)) for _, first, end, _ in parts)  # keys, over all queries
        ops["attention"] += 1, sum(end for _, _, end, _ in parts) * token_kv, 2 * q_size * seen
        n = rows if last else tokens
        if n != tokens:
            ops["gather_rows"] += 2, 0, 0
        chosen = [experts[layer, end - wanted if last else first:end] for experts, first, end, wanted in parts]
        distinct = len({expert for part in chosen for expert in part.ravel().tolist()})
        matrix = c.hidden * c.expert_ffn
        ops["attn_output"] += 1, weights("attn_output"), n * c.hidden * q_size
        ops["norm"] += 1, weights("ffn_norm"), 0
        ops["route"] += 1, weights("ffn_gate_inp"), n * c.hidden * c.experts
        ops["experts_gate_up"] += 1, distinct * weights("ffn_gate_exps", "ffn_up_exps") // c.experts, n * c.top_k * 2 * matrix
        ops["experts_down"] += 1, distinct * weights("ffn_down_exps") // c.experts, n * c.top_k * matrix
    ops["norm"] += 1, nbytes["output_norm.weight"], 0
    ops["head"] += 1, nbytes["output.weight"], rows * c.hidden * c.vocab
    return ops


@pytest.mark.parametrize("kv_type,kv_bytes", [("f16", 2), ("f32", 4), ("q8_0", 34 / 32)])
def test_bytes_and_products_equal_an_independent_count(file, kv_type, kv_bytes):
    one, two = random_token_ids(CONFIG, 23, seed=1), random_token_ids(CONFIG, 8, seed=2)
    reference = RoutedModel(file.paths[0], kv_type=kv_type)
    first, second = reference.experts_of(one), reference.experts_of(two)
    steps = {
        "prefill": [[(first, 0, 16, 0)], [(first, 16, 20, 1)], [(second, 0, 7, 7), (first, 20, 21, 1)]],
        "decode": [[(first, 21, 22, 1)]],
        "batched decode": [[(first, 22, 23, 1), (second, 7, 8, 1)]],
    }
    with Engine(file, profile=True, kv_type=kv_type, **OPTIONS) as engine:
        engine.prefill(0, one[:20])
        engine.step([(1, two[:7], "all"), (0, one[20:21], "last")])
        engine.candidates(5)
        engine.decode(0, one[21])
        engine.candidates(5)
        engine.candidates(6)
        engine.decode_batch([0, 1], [one[22], two[7]])
        profile = engine.profile()
        assert json.loads(json.dumps(profile)) == profile
    assert list(profile["phases"]) == list(steps)
    rows_of_candidates = {"prefill": [8], "decode": [1, 1], "batched decode": []}
    for phase, parts in steps.items():
        got, expected = profile["phases"][phase], defaultdict(lambda: np.zeros(3, np.int64))
        for step in parts:
            for op, counted in count_step(file, step, kv_bytes).items():
                expected[op] += counted
        for rows in rows_of_candidates[phase]:
            expected["top_candidates"] += 1, rows * CONFIG.vocab * 4, 0
        assert {op: [cost["calls"], cost["bytes"], cost["macs"]] for op, cost in got["ops"].items()} == {op: counted.tolist() for op, counted in expected.items()}
        assert got["steps"] == len(parts) and got["tokens"] == sum(end - first for step in parts for _, first, end, _ in step)
        assert 0 < sum(cost["seconds"] for op, cost in got["ops"].items() if op != "top_candidates") < got["seconds"]


def test_ops_come_in_the_order_of_a_step(file):
    with Engine(file, profile=True, **OPTIONS) as engine:
        engine.prefill(0, [1, 2, 3])
        assert list(engine.profile()["phases"]["prefill"]["ops"]) == OPS


def test_copies_of_a_fork_are_counted(file):
    with Engine(file, profile=True, **OPTIONS) as engine:
        engine.prefill(0, [1, 2, 3])
        engine.fork(0, 1)
        engine.fork(0, 2)
        engine.reserve(1, 5)  # between two steps: counted to the one before
        engine.reset_profile()
        engine.decode(2, 1)
        block = 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_dim * 2 * 16
        copies = engine.profile()["phases"]["decode"]["ops"]["copy_kv_blocks"]
        assert (copies["calls"], copies["bytes"], copies["macs"]) == (1, 2 * block, 0)


def test_a_profile_is_reset_and_warm_up_is_not_in_it(file):
    with Engine(file, profile=True, **OPTIONS) as engine:
        engine.warm_up()
        assert engine.profile() == {"phases": {}}
        engine.prefill(0, [1, 2])
        before = engine.profile()
        engine.warm_up()
        assert engine.profile() == before and before["phases"]["prefill"]["steps"] == 1
        engine.reset_profile()
        assert engine.profile() == {"phases": {}}
        engine.decode(0, 3)
        assert list(engine.profile()["phases"]) == ["decode"]


def test_without_the_option_there_is_no_profile(file):
    with Engine(file, **OPTIONS) as engine:
        engine.prefill(0, [1, 2])
        engine.reset_profile()
        assert engine.profile() is None and engine.options["profile"] is False


def test_profiling_leaves_the_bits_as_they_are(file):
    tokens = random_token_ids(CONFIG, 40)
    with Engine(file, **OPTIONS) as plain, Engine(file, profile=True, **OPTIONS) as profiled, Engine(file, profile=True, **OPTIONS) as other:
        assert profiled.options["profile"] is True
        assert np.array_equal(plain.prefill(0, tokens), profiled.prefill(0, tokens))
        assert np.array_equal(plain.decode(0, 5), profiled.decode(0, 5))
        assert np.array_equal(plain.candidates(9).ids, profiled.candidates(9).ids)
        assert other.profile() == {"phases": {}}


@pytest.mark.parametrize("fail_at", [0, 1, 2, 7, 30, 60])
def test_a_failed_step_is_not_counted(file, fail_at):
    """Wherever the device fails: at the step's begin, in an op, or in the wait after it."""
    with Engine(file, profile=True, fail_at=fail_at, **OPTIONS) as engine, Engine(file, profile=True, **OPTIONS) as clean:
        with pytest.raises(DeviceError):
            engine.prefill(0, [1, 2, 3])
        assert engine.profile() == {"phases": {}}
        engine.reserve(0, 0)
        for one in (engine, clean):
            one.prefill(0, [1, 2, 3])
            one.candidates(4)
        counts = [{op: [cost[key] for key in ("calls", "bytes", "macs")] for op, cost in one.profile()["phases"]["prefill"]["ops"].items()} for one in (engine, clean)]
        assert counts[0] == counts[1]
