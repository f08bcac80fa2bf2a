"""The reference against itself, against values worked out in another way, and against golden values of transformers and llama.cpp."""
import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import reference
from reference import ReferenceModel, RopeScaling
from tiny_models import TinyConfig, make_vocabulary, random_blocks, random_tensor, random_token_ids, tensor_digest, write_tiny_model

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]
LLAMA_CPP_DISTANCE = {"F32": 1e-5, "F16": 2e-3, "BF16": 1.5e-2, "Q8_0": 5e-2, "Q4_K_M": 5e-2}
"""Median relative L2 to llama.cpp, which rounds activations as `int8` with `max_factor` 1 does for K-quants, with a float16 scale for Q8_0, else to the weights' type."""


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "q4_k_m.gguf", types="Q4_K_M", seed=1)


@pytest.fixture(scope="module")
def golden_path(tmp_path_factory):
    """Writes the model of a golden case, and refuses one whose weights are not those the golden values belong to."""
    folder = tmp_path_factory.mktemp("golden")

    def write(case):
        path = write_golden_model(folder / f"{case['name']}.gguf", case)
        assert tensor_digest(path) == case["tensor_digest"], "the tiny-model maker changed: run tests/golden/make_golden.py again"
        return path

    return write


def write_golden_model(path, case):
    scaling = RopeScaling(**case["rope_scaling"]) if case["rope_scaling"] else None
    return write_tiny_model(path, config=TinyConfig(**case["config"]), types=case["types"], seed=case["seed"], tied=case["tied"], rope_scaling=scaling)


def naive_attention(queries, keys, values, window=None):
    T, N, D = queries.shape
    C, G, _ = keys.shape
    out = np.zeros_like(queries)
    for t in range(T):
        position = C - T + t
        first = 0 if window is None else max(0, position - window + 1)
        for n in range(N):
            g = n * G // N
            scores = [queries[t, n] @ keys[c, g] / math.sqrt(D) for c in range(first, position + 1)]
            weights = [math.exp(s - max(scores)) for s in scores]
            for c, weight in zip(range(first, position + 1), weights):
                out[t, n] += weight / sum(weights) * values[c, g]
    return out


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("context", [7, 12])
def test_attention_equals_a_loop_over_positions(context, window):
    rng = np.random.default_rng(0)
    queries, keys, values = rng.standard_normal((7, 6, 8)), rng.standard_normal((context, 2, 8)), rng.standard_normal((context, 2, 8))
    np.testing.assert_allclose(reference.attention(queries, keys, values, window=window), naive_attention(queries, keys, values, window), atol=1e-13)


def test_q8_0_keys_and_values_are_multiples_of_a_float16_and_off_by_at_most_half_of_it():
    x = np.random.default_rng(5).standard_normal((3, 2, 64)).astype(np.float32)
    x[0, 0, :32] = 0
    stored = reference.as_stored(x, "q8_0").reshape(-1, 32)
    for given, got in zip(x.reshape(-1, 32), stored):
        largest = float(np.abs(given).max())
        scale = float(np.abs(got).max()) / 127
        assert largest / 127 <= scale * (1 + 1e-9) <= largest / 127 * (1 + 2 ** -9) and float(np.float16(scale)) == scale
        assert np.abs(got - given).max() <= scale / 2 * (1 + 1e-6)
        assert not scale or np.array_equal(got / scale, np.rint(got / scale))


@pytest.mark.parametrize("position", [0, 1, 40_960, 262_143])
def test_rope_rotates_each_pair_by_position_times_frequency(position):
    D, theta = 128, 1e6
    head = np.random.default_rng(1).standard_normal(D)
    cos, sin = reference.rope_cos_sin([position], D, theta)
    got = reference.rotate(head[None, None], cos, sin)[0, 0]
    for i in range(D // 2):
        turned = complex(head[i], head[i + D // 2]) * complex(math.cos(a := position / theta ** (2 * i / D)), math.sin(a))
        assert got[i] == pytest.approx(turned.real, abs=1e-9) and got[i + D // 2] == pytest.approx(turned.imag, abs=1e-9)


def test_rope_leaves_dimensions_past_rotary_dim():
    head = np.random.default_rng(2).standard_normal((1, 1, 16))
    cos, sin = reference.rope_cos_sin([9], 8, 1e4)
    np.testing.assert_array_equal(reference.rotate(head, cos, sin)[..., 8:], head[..., 8:])


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "yarn_attention_factor"])
def test_rope_scaling_matches_golden(name):
    golden = np.load(GOLDEN / "rope.npz")
    case = json.loads((GOLDEN / "cases.json").read_text())["rope"][name]
    scaling = RopeScaling(**case["scaling"]) if case["scaling"] else None
    frequencies, factor = reference.rope_frequencies(case["rotary_dim"], case["theta"], scaling)
    np.testing.assert_allclose(frequencies, golden[f"{name}_frequencies"], rtol=1e-6)
    assert factor == pytest.approx(float(golden[f"{name}_factor"]), rel=1e-12)


def test_route_prefers_the_lowest_index_among_equals():
    ids, weights = reference.route(np.array([[1.0]]), np.array([[0.0], [2.0], [1.0], [2.0], [1.0]]), top_k=3)
    assert ids.tolist() == [[1, 3, 2]]
    assert weights.sum() == pytest.approx(1)
    assert weights[0, 0] == weights[0, 1] > weights[0, 2]


def test_route_puts_nan_last_and_marks_the_weights():
    ids, weights = reference.route(np.array([[1.0]]), np.array([[np.nan], [2.0], [1.0], [np.nan]]), top_k=3)
    assert ids.tolist() == [[1, 2, 0]] and np.isnan(weights).all()
    assert reference.route(np.array([[np.nan]]), np.ones((4, 1)), top_k=3)[0].tolist() == [[0, 1, 2]]


def test_route_without_renormalisation_keeps_the_softmax_over_all_experts():
    x, router = np.random.default_rng(3).standard_normal((5, 4)), np.random.default_rng(4).standard_normal((8, 4))
    np.testing.assert_allclose(reference.route(x, router, top_k=8, renormalise=False)[1].sum(axis=1), 1)
    assert (reference.route(x, router, top_k=2, renormalise=False)[1].sum(axis=1) < 1).all()


def test_experts_equal_a_loop_over_pairs():
    rng = np.random.default_rng(5)
    T, E, K, H, F = 6, 5, 3, 4, 7
    x, ids, weights = rng.standard_normal((T, H)), np.array([rng.permutation(E)[:K] for _ in range(T)]), rng.random((T, K))
    gate, up, down = rng.standard_normal((E, F, H)), rng.standard_normal((E, F, H)), rng.standard_normal((E, H, F))
    expected = np.zeros((T, H))
    for t in range(T):
        for k in range(K):
            g, u = gate[ids[t, k]] @ x[t], up[ids[t, k]] @ x[t]
            expected[t] += weights[t, k] * (down[ids[t, k]] @ (g / (1 + np.exp(-g)) * u))
    got = reference.experts_down(reference.experts_gate_up(x, ids, gate, up), ids, weights, down)
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_norm_adds_delta_before_normalising():
    residual, normalised = reference.norm(np.array([[3.0, 0.0]]), np.array([1.0, 2.0]), 0.0, delta=np.array([[0.0, 4.0]]))
    assert residual.tolist() == [[3.0, 4.0]]
    np.testing.assert_allclose(normalised, np.array([[3.0, 8.0]]) / math.sqrt(12.5))


def test_silu_survives_large_inputs():
    assert reference.silu(np.array([-2000.0, 0.0, 2000.0])).tolist() == [0.0, 0.0, 2000.0]


def test_embed_refuses_an_id_out_of_range():
    for bad in ([3], [-1]):
        with pytest.raises(ValueError, match="0..2"):
            reference.embed(np.zeros((3, 4)), bad)


def test_a_penalty_lowers_a_logit_of_either_sign():
    top = reference.top_candidates(np.array([[4.0, -4.0]]), 2, edits=[(0, 0, 2.0, 0.0), (0, 1, 2.0, 0.0)])
    assert top.logits.tolist() == [[2.0, -8.0]]


def test_top_candidates_excludes_padding_and_takes_equal_logits_by_id():
    logits = np.array([[2.0, 3.0, 3.0, 0.0, 9.0]])
    top = reference.top_candidates(logits, 3, vocab_size=4, temperatures=[2.0], targets=[[3]], edits=[(0, 0, 2.0, 1.5)])
    assert top.ids.tolist() == [[1, 2, 0]] and top.logits.tolist() == [[3.0, 3.0, 2.5]] and top.target_logits.tolist() == [[0.0]]
    assert top.log_sum_exp[0] == pytest.approx(math.log(2 * math.exp(3) + math.exp(2.5) + 1))
    assert top.log_sum_exp_at_temperature[0] == pytest.approx(math.log(2 * math.exp(1.5) + math.exp(1.25) + 1))


@pytest.mark.parametrize("weight_type", reference.BLOCK_OF)
def test_quantized_dot_equals_the_product_of_expanded_values(weight_type):
    rng = np.random.default_rng(6)
    rows = random_tensor(weight_type, (33, 768), 0.05, rng)
    x = rng.standard_normal((5, 768))
    q, d = reference.quantize_activations(x, weight_type)
    expected = reference.as_quantized(x, weight_type) @ reference.dequantize(rows, weight_type).T
    np.testing.assert_allclose(reference.dot_quantized(rows, weight_type, q, d), expected, atol=1e-5)
    assert np.abs(expected - x @ reference.dequantize(rows, weight_type).T).max() > 1e-3


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_K"])
def test_quantized_activations_are_within_half_a_step_and_round_half_to_even(weight_type):
    block = reference.BLOCK_OF[weight_type]
    x = np.zeros(2 * block)
    x[:4] = [127, 0.5, 1.5, -2.5]
    q, d = reference.quantize_activations(x, weight_type)
    assert q[:4].tolist() == [127, 0, 2, -2] and d[0] == 1 and not d[block // 32:].any() and not q[block:].any()
    noise = np.random.default_rng(7).standard_normal(2 * block)
    q, d = reference.quantize_activations(noise, weight_type)
    assert (np.abs(reference.as_quantized(noise, weight_type) - noise) <= np.repeat(d, 32) * 0.5001).all()


def test_a_large_value_costs_other_groups_of_32_at_most_an_eighth_of_its_step():
    x = np.random.default_rng(8).standard_normal(256)
    x[5] = 100
    _, d = reference.quantize_activations(x, "Q4_K")
    assert d[0] == pytest.approx(100 / 127) and np.allclose(d[1:], 100 / 127 / 8)


@pytest.mark.parametrize("weight_type", reference.BLOCK_OF)
def test_random_blocks_have_the_spread_asked_for(weight_type):
    values = reference.dequantize(random_blocks(weight_type, (4, 16, 512), 0.02, np.random.default_rng(8)), weight_type)
    assert values.shape == (4, 16, 512) and values.std() == pytest.approx(0.02, rel=0.02) and abs(values.mean()) < 1e-3


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_logits_depend_on_earlier_tokens_only(tiny_path, activations):
    model, ids = ReferenceModel(tiny_path, activations=activations), random_token_ids(TinyConfig(), 24)
    np.testing.assert_allclose(model.logits(ids[:11]), model.logits(ids)[:11], atol=1e-10)


def test_tiny_models_are_equal_for_equal_seeds(tiny_path, tmp_path):
    again = write_tiny_model(tmp_path / "again.gguf", types="Q4_K_M", seed=1)
    other = write_tiny_model(tmp_path / "other.gguf", types="Q4_K_M", seed=2)
    assert Path(again).read_bytes() == Path(tiny_path).read_bytes() and tensor_digest(other) != tensor_digest(tiny_path)


@pytest.mark.parametrize("types", ["F32", "BF16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("tied", [False, True])
def test_tiny_logits_spread_like_a_real_models(tmp_path, types, tied):
    path = write_tiny_model(tmp_path / "model.gguf", types=types, tied=tied)
    logits = ReferenceModel(path).logits(random_token_ids(TinyConfig(), 64))
    assert logits.shape == (64, 512) and 2 < logits.std() < 3.2


def types_of(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def test_q4_k_m_has_the_mix_of_the_real_files(tiny_path):
    types = types_of(tiny_path)
    assert types["output.weight"] == types["blk.2.attn_v.weight"] == types["blk.2.ffn_down_exps.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.attn_v.weight"] == types["blk.2.attn_q.weight"] == "Q4_K"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.1.attn_q_norm.weight"] == "F32"


def test_q3_k_m_and_q5_k_m_have_the_mix_of_the_real_files(tmp_path):
    types = types_of(write_tiny_model(tmp_path / "3.gguf", types="Q3_K_M"))
    assert [types[f"blk.{layer}.attn_v.weight"] for layer in range(3)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert types["output.weight"] == "Q6_K" and types["blk.0.attn_output.weight"] == types["blk.2.ffn_down_exps.weight"] == "Q4_K"
    assert types["token_embd.weight"] == types["blk.0.ffn_down_exps.weight"] == types["blk.2.attn_q.weight"] == "Q3_K"
    types = types_of(write_tiny_model(tmp_path / "5.gguf", types="Q5_K_M"))
    assert types["output.weight"] == types["blk.2.attn_v.weight"] == "Q6_K" and types["blk.0.attn_v.weight"] == types["blk.2.attn_q.weight"] == "Q5_K"


def test_a_mix_has_other_types_where_rows_are_no_multiple_of_256(tmp_path):
    types = types_of(write_tiny_model(tmp_path / "short.gguf", types="Q4_K_M", config=replace(TinyConfig(), expert_ffn=96)))
    assert [types[f"blk.{layer}.ffn_down_exps.weight"] for layer in range(3)] == ["Q5_0", "Q5_0", "Q8_0"] and types["blk.0.ffn_up_exps.weight"] == "Q4_K"


def test_a_mapping_of_types_goes_from_name_to_kind_to_default(tmp_path):
    path = write_tiny_model(tmp_path / "mixed.gguf", types={"blk.1.attn_q.weight": "Q6_K", "attn_q": "Q8_0", "default": "BF16"})
    types = types_of(path)
    assert [types[f"blk.{layer}.attn_q.weight"] for layer in range(3)] == ["Q8_0", "Q6_K", "Q8_0"] and types["output.weight"] == "BF16"


def test_vocabulary_is_complete_and_padded_with_unused_tokens():
    vocabulary = make_vocabulary(512)
    assert len(set(vocabulary.tokens)) == len(vocabulary.types) == 512
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(vocabulary.tokens)
    assert vocabulary.tokens[-1] == "[PAD511]" and vocabulary.types[-1] == gguf.TokenType.UNUSED
    assert vocabulary.types[vocabulary.tokens.index("<think>")] == gguf.TokenType.USER_DEFINED


def test_statistics_of_known_logits():
    ref = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    got = np.log(np.array([[0.25, 0.75], [0.9, 0.1]])) + 4
    np.testing.assert_allclose(reference.kl_divergence(ref, got), [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0], atol=1e-14)
    assert reference.relative_l2(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))[0] == pytest.approx(0.1)
    assert reference.logit_statistics(ref, got)["argmax_equal"] == 0.5 + 0.5 * (np.argmax(got[0]) == 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_logits_match_golden_of_transformers(golden_path, case):
    golden = np.load(GOLDEN / f"{case['name']}.npz")
    logits = ReferenceModel(golden_path(case)).logits(golden["token_ids"])
    assert reference.relative_l2(golden["transformers_rows"], logits[golden["rows"]]).max() < 2e-6
    np.testing.assert_allclose(logits[:, golden["columns"]], golden["transformers_columns"], atol=3e-5)
    np.testing.assert_allclose(reference.log_sum_exp(logits), golden["transformers_log_sum_exp"], atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_logits_match_golden_of_llama_cpp(golden_path, case):
    golden = np.load(GOLDEN / f"{case['name']}.npz")
    activations = "int8" if case["types"] == "Q4_K_M" else "float"
    logits = ReferenceModel(golden_path(case), activations=activations, max_factor=1).logits(golden["token_ids"])
    bound = LLAMA_CPP_DISTANCE[case["types"]]
    assert np.median(reference.relative_l2(golden["llama_cpp_rows"], logits[golden["rows"]])) < bound
    assert np.median(reference.relative_l2(golden["llama_cpp_columns"], logits[:, golden["columns"]])) < bound
    assert np.median(np.abs(reference.log_sum_exp(logits) - golden["llama_cpp_log_sum_exp"])) < 2 * bound
    if case["types"] == "Q4_K_M":
        # The same rounding decisions, until float32 noise tips one; from there on the two roundings are independent.
        assert reference.relative_l2(golden["llama_cpp_columns"], logits[:, golden["columns"]])[0] < 1e-5


def test_golden_greedy_texts_of_the_demo_model_are_greedy(demo_f16):
    model = ReferenceModel(demo_f16)
    for text in json.loads((GOLDEN / "demo_f16_greedy.json").read_text())["texts"]:
        ids = text["prompt_ids"] + text["greedy_ids"]
        logits = model.logits(ids[:-1])[len(text["prompt_ids"]) - 1:]
        assert np.argmax(logits, axis=-1).tolist() == text["greedy_ids"]
        top = np.sort(logits, axis=-1)
        np.testing.assert_allclose(top[:, -1] - top[:, -2], text["top2_gaps"], atol=1e-3)
