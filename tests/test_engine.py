"""The engine's calls on tiny random models: what they compute, what they promise about bits, and what is left after an error."""
import _thread
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BLOCK_OF, ReferenceModel, RopeScaling, logit_statistics, relative_l2, rope_cos_sin
from tiny_models import MIXES, TinyConfig, make_vocabulary, random_token_ids, tensor_digest, write_tiny_model

from ferrum.errors import (Cancelled, ContextFull, EngineClosed, KVPoolExhausted, LogitRowsExceeded, ModelFileError, OptionError, StaleLogits,
                           UnknownSequence, UnsupportedModelError)
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import EDIT_DTYPE, Chunk, Engine, model_rope_cos_sin, plan

WIDE = TinyConfig()  # every row holds K-quant blocks
SMALL = TinyConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=2, expert_ffn=96, vocab=512, context=256)
PROOF = {"activations": "float32", "kv_type": "f32"}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Opens a tiny model, written once per session: model(types, config, **details of write_tiny_model)."""
    folder, files = tmp_path_factory.mktemp("models"), {}

    def opened(types="Q8_0", config=SMALL, **details):
        key = repr((types, config, details))
        if key not in files:
            files[key] = GGUFFile.open(write_tiny_model(folder / f"{len(files)}.gguf", types=types, config=config, **details))
        return files[key]

    return opened


@pytest.fixture
def engine(model):
    """An engine on the small Q8_0 model: 16 blocks, 4 sequences, chunks of 32."""
    with Engine(model(), threads=1, kv_tokens=256, max_sequences=4, prefill_chunk=32, max_logit_rows=40) as engine:
        yield engine


def bits(logits):
    return np.asarray(logits).tobytes()


def rows_alone(file, sequences, **options):
    """Logits [tokens, vocab] of each token list, each sequence by itself in one prefill."""
    with Engine(file, threads=1, kv_tokens=4096, max_logit_rows=1200, **options) as engine:
        rows = []
        for tokens in sequences:
            rows.append(engine.prefill(0, tokens, logits="all").copy())
            engine.release(0)
        return rows


def prompts(*lengths, config=SMALL):
    return [random_token_ids(config, length, seed=100 + i) for i, length in enumerate(lengths)]


def all_free(engine):
    stats = engine.stats()
    return stats["kv_blocks_free"] == stats["kv_blocks"] and stats["live_sequences"] == 0


# What is computed

FLOAT_CASES = {
    "f32": ("F32", WIDE, {}),
    "tied": ("F32", WIDE, {"tied": True}),
    "head_dim_96": ("F32", replace(WIDE, head_dim=96, heads=8, kv_heads=1), {}),
    "head_dim_256": ("F32", replace(WIDE, head_dim=256, heads=2, kv_heads=2), {}),
    "top_8": ("F32", replace(WIDE, experts=32, top_k=8, expert_ffn=64), {}),
    "yarn": ("F32", WIDE, {"rope_scaling": RopeScaling("yarn", 4.0, 1024)}),
    "linear": ("F32", WIDE, {"rope_scaling": RopeScaling("linear", 4.0)}),
    "odd_sizes": ("F32", replace(WIDE, hidden=72, expert_ffn=33, head_dim=40, experts=5, top_k=5), {}),
    "f16": ("F16", WIDE, {}),
    "bf16": ("BF16", WIDE, {}),
}


@pytest.mark.parametrize("case", FLOAT_CASES)
def test_float_model_equals_the_reference(model, case):
    types, config, details = FLOAT_CASES[case]
    file, tokens = model(types, config, **details), random_token_ids(config, 120)
    expected = ReferenceModel(file.paths[0]).logits(tokens)
    exact = rows_alone(file, [tokens], **PROOF)[0]
    assert np.median(relative_l2(expected, exact)) < 5e-6
    f16 = rows_alone(file, [tokens], activations="float32", kv_type="f16")[0]
    assert np.median(relative_l2(ReferenceModel(file.paths[0], kv_type="f16").logits(tokens), f16)) < 3e-4


def test_q8_0_keys_and_values_stay_near_the_reference(model):
    """Near the reference with the same rounding, which parts ways where a key or value lies next to the middle of two; and near the one without."""
    file, tokens = model("F32", WIDE), random_token_ids(WIDE, 120)
    got = rows_alone(file, [tokens], activations="float32", kv_type="q8_0")[0]
    assert np.median(relative_l2(ReferenceModel(file.paths[0], kv_type="q8_0").logits(tokens), got)) < 1e-3
    assert 1e-3 < np.median(relative_l2(ReferenceModel(file.paths[0]).logits(tokens), got)) < 3e-2


@pytest.mark.parametrize("types,tied", [*((kind, False) for kind in (*BLOCK_OF, *MIXES)), ("Q4_K_M", True)])
def test_quantized_model_stays_near_the_reference(model, types, tied):
    """Near the reference with the same int8 and f16 roundings, which part ways by their ties only; near the one without any roundings where the
    model itself is not what spreads them (tied: random embeddings far smaller than what the layers add)."""
    file, tokens = model(types, WIDE, tied=tied), random_token_ids(WIDE, 300)
    expected = ReferenceModel(file.paths[0]).logits(tokens)
    got = rows_alone(file, [tokens])[0]
    for reference in (ReferenceModel(file.paths[0], activations="int8", kv_type="f16").logits(tokens), *([] if tied else [expected])):
        statistics = logit_statistics(reference, got)
        assert statistics["median_relative_l2"] <= 4e-2 and statistics["median_kl"] <= 5e-3 and statistics["argmax_equal"] >= 0.90, statistics
    proof = rows_alone(file, [tokens[:60]], **PROOF)[0]
    assert np.median(relative_l2(expected[:60], proof)) < 5e-6


@pytest.mark.parametrize("types", MIXES)
def test_a_mix_with_rows_of_no_multiple_of_256(model, types):
    """Such as 96 columns of ffn_down: mixes keep them in types with blocks of 32."""
    config = replace(WIDE, expert_ffn=96)
    file, tokens = model(types, config), random_token_ids(config, 60)
    assert {"Q3_K_M": "IQ4_NL", "Q4_K_M": "Q5_0", "Q5_K_M": "Q5_1"}[types] in {info.type_name for info in file.tensors.values()}
    assert np.median(relative_l2(ReferenceModel(file.paths[0]).logits(tokens), rows_alone(file, [tokens], **PROOF)[0])) < 5e-6


def test_mixed_types_in_one_product(model):
    """q, k and v each of another type, as in Q4_K_M files, with gate, up and down apart."""
    types = {"attn_q": "Q4_K", "attn_k": "Q8_0", "attn_v": "Q6_K", "attn_output": "F16", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q6_K",
             "ffn_down_exps": "Q8_0", "output": "BF16", "token_embd": "Q8_0"}
    file, tokens = model(types, WIDE), random_token_ids(WIDE, 60)
    reference = ReferenceModel(file.paths[0])
    reference.experts_block = experts_block_of_any_types.__get__(reference)
    assert np.median(relative_l2(reference.logits(tokens), rows_alone(file, [tokens], **PROOF)[0])) < 5e-6


def experts_block_of_any_types(self, prefix, x):
    from reference import experts_down, experts_gate_up, route

    ids, weights = route(x, self.weight(prefix + "ffn_gate_inp.weight"), self.config.top_k)
    hidden = experts_gate_up(x, ids, *(self.weight(f"{prefix}ffn_{kind}_exps.weight") for kind in ("gate", "up")))
    return experts_down(hidden, ids, weights, self.weight(prefix + "ffn_down_exps.weight"))


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("yarn", 4.0, 32768), RopeScaling("yarn", 16.0, 4096, 24.0, 2.0, 0.75)])
def test_rope_angles_are_exact_at_any_position(model, scaling):
    file = model("F32", replace(SMALL, head_dim=128, context=262144), rope_scaling=scaling)
    positions = [0, 1, 511, 4095, 32768, 131071, 262143]
    expected = np.hstack(rope_cos_sin(positions, 128, 1e6, scaling))
    assert np.abs(model_rope_cos_sin(file, positions) - expected).max() < 2e-7


@pytest.mark.slow_under_sanitizers
def test_demo_model_continues_as_recorded(demo_f16):
    """Greedy text of the demo in F16, as transformers and llama.cpp continue it."""
    path = demo_f16
    golden = json.loads((Path(__file__).parent / "golden/demo_f16_greedy.json").read_text())
    assert tensor_digest(path) == golden["tensor_digest"]
    with Engine(GGUFFile.open(path), kv_tokens=1024, max_logit_rows=256, **PROOF) as engine:
        for text in golden["texts"]:
            prompt, expected = text["prompt_ids"], text["greedy_ids"]
            rows = np.asarray(engine.prefill(0, prompt + expected[:-1], logits="all"))
            assert rows[len(prompt) - 1:].argmax(axis=-1).tolist() == expected, text["prompt"]
            engine.release(0)
        text = golden["texts"][0]
        token, got = int(np.asarray(engine.prefill(0, text["prompt_ids"])).argmax()), []
        while len(got) < 40:
            got.append(token)
            token = int(np.asarray(engine.decode(0, token)).argmax())
        assert got == text["greedy_ids"][:40]


# Rows do not depend on their company

@pytest.mark.parametrize("options", [{}, PROOF], ids=["int8", "proof"])
@pytest.mark.parametrize("types,config", [("Q4_K_M", WIDE), ("Q8_0", SMALL), ("F32", SMALL)], ids=["q4_k_m", "q8_0", "f32"])
def test_logits_do_not_depend_on_chunks_threads_or_batch(model, types, config, options):
    file = model(types, config)
    sequences = prompts(1, 7, 16, 33, 70, config=config)
    expected = rows_alone(file, sequences, **options)
    for threads in (1, 2):
        for chunk in (1, 7, 16, 512):
            with Engine(file, threads=threads, prefill_chunk=chunk, kv_tokens=512, max_logit_rows=128, **options) as engine:
                for s, tokens in enumerate(sequences):
                    assert bits(engine.prefill(s, tokens, logits="all")) == bits(expected[s]), f"chunks of {chunk}, {threads} threads"
                    engine.release(s)
                    assert bits(engine.prefill(s, tokens)) == bits(expected[s][-1])
        with Engine(file, threads=threads, prefill_chunk=64, kv_tokens=512, max_logit_rows=128, **options) as engine:
            for position, token in enumerate(sequences[3]):  # token by token
                logits = engine.prefill(0, [token]) if position == 0 else engine.decode(0, token)
                assert bits(logits) == bits(expected[3][position])
            engine.reset()
            # Prompt chunks and decode tokens side by side.
            engine.prefill(3, sequences[3][:32], logits="none")
            engine.prefill(4, sequences[4][:20], logits="none")
            mixed = np.asarray(engine.step([(2, sequences[2], "all"), (4, sequences[4][20:60], "last"), (0, sequences[0], "none"), (3, sequences[3][32:], "last")]))
            assert bits(mixed[:16]) == bits(expected[2])
            assert bits(mixed[16]) == bits(expected[4][59]) and bits(mixed[17]) == bits(expected[3][32])
            assert engine.step([(1, sequences[1], "none")]) is None


def test_decode_batch_matches_single_decodes(model):
    """Many sequences of different lengths, each with its own marker: no row sees another's text. Sizes 2, 16 and 4 in one engine."""
    file = model("Q4_K_M", WIDE)
    sequences = [[marker] * (1 + 7 * marker % 40) + tokens for marker, tokens in enumerate(prompts(*[24] * 16, config=WIDE))]
    expected = rows_alone(file, sequences)
    with Engine(file, threads=2, kv_tokens=2048, max_sequences=16) as engine:
        starts = [len(tokens) - 24 for tokens in sequences]
        for s, tokens in enumerate(sequences):
            engine.prefill(s, tokens[:starts[s]], logits="none")
        order = np.random.default_rng(0)
        for size in (2, 16, 4, 16, 1, 3, 16, 5, 9):
            chosen = order.permutation(16)[:size].tolist()
            lengths = [engine.length(s) for s in chosen]
            rows = np.asarray(engine.decode_batch(chosen, [sequences[s][length] for s, length in zip(chosen, lengths)]))
            assert rows.shape == (size, WIDE.vocab)
            for row, s, length in zip(rows, chosen, lengths):
                assert bits(row) == bits(expected[s][length])
        engine.reset()
        assert all_free(engine)


def test_long_context_decodes_as_prefilled(model):
    """Past the splits of attention, where a lone decode takes another way through the threads."""
    file = model("F32", replace(SMALL, context=2048))
    [tokens] = prompts(1200)
    [expected] = [rows_alone(file, [tokens[:1100]], **PROOF)[0][-4:]]
    with Engine(file, threads=2, kv_tokens=2048, prefill_chunk=100, **PROOF) as engine:
        engine.prefill(0, tokens[:1096], logits="none")
        for position in range(1096, 1100):
            assert bits(engine.decode(0, tokens[position])) == bits(expected[position - 1096])


def test_two_engines_share_nothing(model):
    files = model("Q8_0"), model("F32")
    sequences = prompts(20, 30)
    expected = [rows_alone(file, sequences) for file in files]
    with Engine(files[0], threads=2, kv_tokens=64) as one, Engine(files[1], threads=1, kv_tokens=64) as two:
        for engine in (one, two):
            engine.prefill(5, sequences[0][:10], logits="none")
        for position in range(10, 20):
            assert bits(one.decode(5, sequences[0][position])) == bits(expected[0][0][position])
            assert bits(two.decode(5, sequences[0][position])) == bits(expected[1][0][position])
        one.close()
        assert two.length(5) == 20
        two.release(5)
        assert all_free(two)


# Sequences

def test_fork_copies_on_write(model, engine):
    [shared, left, right] = prompts(20, 15, 15)
    expected = rows_alone(model(), [shared + left, shared + right])
    engine.prefill(1, shared, logits="none")
    free = engine.stats()["kv_blocks_free"]
    engine.fork(1, 2)
    engine.fork(1, 3)
    assert engine.stats()["kv_blocks_free"] == free and engine.length(2) == 20
    for position in range(15):
        rows = np.asarray(engine.decode_batch([2, 1], [right[position], left[position]]))
        assert bits(rows[0]) == bits(expected[1][20 + position]) and bits(rows[1]) == bits(expected[0][20 + position])
    engine.release(1)
    engine.release(2)
    assert bits(engine.prefill(3, left)) == bits(expected[0][-1])
    engine.release(3)
    assert all_free(engine)


@pytest.mark.parametrize("length", [1, 10, 16, 20, 32, 39, 40])
def test_a_truncated_sequence_continues_like_a_fresh_one(model, engine, length):
    """Also beside a fork, which keeps its content."""
    [first, other, more] = prompts(40, 30, 5)
    [fresh, kept] = rows_alone(model(), [first[:length] + other, first + more])
    engine.prefill(1, first, logits="none")
    engine.reserve(1, 40)
    engine.fork(1, 2)
    engine.truncate(1, length)
    assert engine.length(1) == length and engine.length(2) == 40
    assert bits(engine.prefill(1, other, logits="all")) == bits(fresh[length:])
    assert bits(engine.prefill(2, more, logits="all")) == bits(kept[40:])
    engine.truncate(1, length)
    assert bits(engine.prefill(1, other, logits="all")) == bits(fresh[length:])
    engine.release(2)
    assert engine.kv_blocks_free == engine.stats()["kv_blocks"] - -(-(length + 30) // 16)
    engine.release(1)
    assert all_free(engine)


def test_reserve_holds_room(engine):
    engine.reserve(1, 250)
    assert engine.stats()["kv_blocks_free"] == 0
    with pytest.raises(KVPoolExhausted):
        engine.prefill(2, [1])
    engine.prefill(1, random_token_ids(SMALL, 250), logits="none")
    engine.release(1)
    assert all_free(engine)


def test_warm_up_and_reset_leave_every_block_free(engine):
    before = engine.stats()
    engine.warm_up()
    assert engine.stats() == before and all_free(engine)
    [tokens] = prompts(20)
    expected = bits(engine.prefill(7, tokens))
    engine.warm_up()
    assert engine.length(7) == 20
    engine.reset()
    assert all_free(engine)
    with pytest.raises(UnknownSequence):
        engine.length(7)
    assert bits(engine.prefill(7, tokens)) == expected


def test_stats_count_steps_tokens_and_rows(engine):
    engine.prefill(0, random_token_ids(SMALL, 70))  # 32 + 32 + 6
    engine.decode(0, 1)
    engine.step([Chunk(1, [1, 2, 3], "all"), Chunk(0, [4], "none")])
    assert {name: engine.stats()[name] for name in ("steps", "tokens", "logit_rows", "failed_steps", "live_sequences")} == {
        "steps": 5, "tokens": 75, "logit_rows": 5, "failed_steps": 0, "live_sequences": 2}


HISTORY = st.lists(st.tuples(st.sampled_from(["prefill", "decode", "decode", "batch", "fork", "release", "reserve", "truncate", "adopt"]), st.integers(0, 3), st.integers(0, 3), st.integers(1, 40),
                             st.one_of(st.integers(0, 2), st.integers(0, 400))), min_size=1, max_size=25)


@pytest.fixture(scope="module")
def poisoned(model):
    """An engine that fills freed blocks with NaN, and a second one to compute every sequence alone."""
    file = model("Q8_0", replace(SMALL, layers=1))
    with Engine(file, threads=1, kv_tokens=176, max_sequences=4, prefill_chunk=16, poison_freed_kv=True) as shared, Engine(file, threads=1, kv_tokens=256) as alone:
        yield shared, alone


@settings(max_examples=40, deadline=None)
@given(history=HISTORY)
@pytest.mark.slow_under_sanitizers
def test_any_history_gives_each_sequence_its_own_logits(poisoned, history):
    """Random prompts, decodes, forks and releases in a pool that is often full: every row equals that of its sequence alone."""
    shared, alone = poisoned
    shared.reset()
    texts = {}

    def check(sequence, row):
        expected = alone.prefill(0, texts[sequence])
        assert bits(row) == bits(expected)
        alone.release(0)

    for action, sequence, other, count, seed in history:
        tokens = random_token_ids(SMALL, count, seed)
        try:
            if action == "prefill":
                row = shared.prefill(sequence, tokens)
                texts[sequence] = texts.get(sequence, []) + tokens
                check(sequence, row)
            elif action == "decode":
                row = shared.decode(sequence, tokens[0])
                texts[sequence] = texts[sequence] + tokens[:1]
                check(sequence, row)
            elif action == "batch" and texts:
                rows = np.asarray(shared.decode_batch(sorted(texts), [tokens[0]] * len(texts)))
                for row, live in zip(rows, sorted(texts)):
                    texts[live] = texts[live] + tokens[:1]
                    check(live, row)
            elif action == "fork":
                shared.fork(sequence, other)
                texts[other] = list(texts[sequence])
            elif action == "release":
                shared.release(sequence)
                del texts[sequence]
            elif action == "truncate" and texts.get(sequence):
                shared.truncate(sequence, 1 + seed % len(texts[sequence]))
                del texts[sequence][1 + seed % len(texts[sequence]):]
            elif action == "reserve" and sequence in texts:
                shared.reserve(sequence, count)
            elif action == "adopt" and sequence not in texts:
                tokens = texts.get(other, tokens) + random_token_ids(SMALL, 20, seed)
                length = shared.adopt(sequence, tokens)
                if length:
                    texts[sequence] = tokens[:length]
                row = shared.prefill(sequence, tokens[length:])
                texts[sequence] = tokens
                check(sequence, row)
        except (KVPoolExhausted, ContextFull):
            pass
        except UnknownSequence:
            assert sequence not in texts
        except ValueError:
            assert action == "fork" and other in texts
        assert {live: shared.length(live) for live in texts} == {live: len(text) for live, text in texts.items()}
        assert shared.stats()["live_sequences"] == len(texts)


# What is found again

@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_text_that_adopts_its_beginning_has_the_same_bits(model, kv_type, activations):
    tokens = random_token_ids(SMALL, 150)
    expected = rows_alone(model(), [tokens], kv_type=kv_type, activations=activations)[0]
    for chunk in (7, 32, 200):
        with Engine(model(), threads=1, kv_tokens=512, prefill_chunk=chunk, max_logit_rows=200, kv_type=kv_type, activations=activations) as engine:
            engine.prefill(0, tokens)
            engine.release(0)
            for beginning in (150, 140, 33, 16):
                length = engine.adopt(1, tokens[:beginning])
                assert length == beginning // 16 * 16 == engine.length(1)
                assert bits(engine.prefill(1, tokens[length:], "all")) == bits(expected[length:])
                engine.release(1)


def test_a_generated_text_is_found_as_well(model, engine):
    (tokens,) = prompts(10)
    engine.prefill(0, tokens)
    for token in range(30):
        engine.decode(0, token)
    text = [*tokens, *range(30)]
    assert engine.cached_prefix(text) == (32, 2)
    engine.release(0)
    assert engine.cached_prefix(text) == (32, 0)
    assert engine.adopt(0, text) == 32
    (expected,) = rows_alone(model(), [text])
    assert bits(engine.prefill(0, text[32:], "all")) == bits(expected[32:])


def test_counts_say_what_was_found(engine):
    a, b = prompts(70, 40)
    engine.prefill(0, a)
    engine.prefill(1, b)
    engine.release(1)
    assert engine.kv_blocks_free == 16 - 5
    assert (engine.adopt(2, a[:40]), engine.adopt(3, b), engine.adopt(4, [1] * 20)) == (32, 32, 0)
    with pytest.raises(UnknownSequence):
        engine.length(4)
    stats = engine.stats()
    assert (stats["prefix_hits"], stats["prefix_tokens"], stats["prefix_tokens_asked"]) == (2, 64, 100)
    assert (stats["kv_blocks_free"], stats["kv_blocks_cached"], stats["prefix_evictions"]) == (16 - 5 - 2, 0, 0)
    with pytest.raises(ValueError, match="sequence 2 is live already and cannot take a cached beginning"):
        engine.adopt(2, a)
    for sequence in (0, 2, 3):
        engine.release(sequence)
    assert all_free(engine) and engine.stats()["kv_blocks_cached"] == 6
    engine.prefill(0, random_token_ids(SMALL, 256, seed=5))
    assert engine.stats()["prefix_evictions"] == 6 and engine.cached_prefix(a) == (0, 0)


def test_adopting_needs_a_place_among_the_sequences(engine):
    (tokens,) = prompts(20)
    for sequence in range(4):
        engine.prefill(sequence, tokens)
    with pytest.raises(KVPoolExhausted, match="max_sequences=4"):
        engine.adopt(4, tokens)
    assert engine.stats()["prefix_hits"] == 0


def test_reset_and_warm_up_leave_nothing_cached(engine):
    tokens = prompts(40)[0]
    engine.prefill(0, tokens)
    engine.reset()
    assert engine.cached_prefix(tokens) == (0, 0) and engine.stats()["kv_blocks_cached"] == 0
    engine.prefill(0, tokens)
    engine.release(0)
    before = engine.stats()
    engine.warm_up()
    assert engine.stats() == before and engine.cached_prefix(tokens) == (32, 0)


def test_an_engine_without_the_prefix_cache_finds_nothing(model):
    with Engine(model(), threads=1, kv_tokens=64, prefix_cache=False) as engine:
        engine.prefill(0, [1] * 40)
        assert engine.adopt(1, [1] * 40) == 0 and engine.cached_prefix([1] * 40) == (0, 0)
        assert engine.options["prefix_cache"] is False


# Logits

def test_logits_are_a_view_until_the_next_step(engine):
    logits = engine.prefill(0, [1, 2, 3])
    assert logits.shape == (SMALL.vocab,) and len(logits) == SMALL.vocab
    view = np.asarray(logits)
    assert view.dtype == np.float32 and not view.flags.writeable and np.shares_memory(view, np.asarray(logits))
    with pytest.raises(ValueError):
        view[0] = 1
    kept = logits.copy()
    assert kept.flags.writeable and not np.shares_memory(kept, view) and bits(kept) == bits(view)
    assert np.array_equal(np.asarray(logits, dtype=np.float64), kept.astype(np.float64))
    engine.candidates(3)
    engine.fork(0, 1)
    engine.release(1)
    assert bits(logits) == bits(kept)
    later = engine.decode(0, 4)
    for stale in (lambda: np.asarray(logits), logits.copy):
        with pytest.raises(StaleLogits, match="overwritten by a later step"):
            stale()
    assert "overwritten" in repr(logits) and "overwritten" not in repr(later)
    assert bits(kept) != bits(later)


def test_views_survive_the_engine(model):
    engine = Engine(model(), threads=1, kv_tokens=64)
    logits = engine.prefill(0, [1, 2, 3])
    view, kept = np.asarray(logits), logits.copy()
    engine.close()
    del engine
    assert bits(view) == bits(kept)
    with pytest.raises(EngineClosed):
        np.asarray(logits)


def test_no_logits_of_none(engine):
    assert engine.prefill(0, [1, 2], logits="none") is None
    with pytest.raises(ValueError, match="made no logits"):
        engine.candidates(1)
    assert np.asarray(engine.step([(0, [3], "last"), (1, [1, 2], "all")])).shape == (3, SMALL.vocab)
    assert np.asarray(engine.decode_batch([1, 0], [5, 6])).shape == (2, SMALL.vocab)
    assert np.asarray(engine.prefill(0, [1], logits="all")).shape == (1, SMALL.vocab)


# Candidates

def test_candidates_never_name_the_padding(model):
    """[PADn] entries are of type unused: out of the candidates and of the sums, however large their logits are."""
    file = model()
    normal = [token for token, kind in enumerate(make_vocabulary(SMALL.vocab).types) if kind != 5]
    with Engine(file, threads=1, kv_tokens=64) as engine:
        rows = np.asarray(engine.prefill(0, random_token_ids(SMALL, 8), logits="all")).astype(np.float64)
        assert rows[:, len(normal):].argmax() >= 0 and len(normal) < SMALL.vocab
        found = engine.candidates(len(normal), temperatures=[0.5] * 8, targets=[[0, SMALL.vocab - 1]] * 8)
        assert all(sorted(row) == normal for row in found.ids.tolist())
        from reference import log_sum_exp

        assert np.allclose(found.log_sum_exp, log_sum_exp(rows[:, normal]), rtol=1e-12)
        assert np.allclose(found.log_sum_exp_at_temperature, log_sum_exp(rows[:, normal] / 0.5), rtol=1e-12)
        assert np.array_equal(found.target_logits, rows[:, [0, -1]].astype(np.float32))
        with pytest.raises(ValueError, match=f"n is {len(normal) + 1}"):
            engine.candidates(len(normal) + 1)
        edited = engine.candidates(1, edits=[(row, 17, 1.0, 100.0) for row in range(8)])
        assert (edited.ids == 17).all()
        assert [len(row) for row in engine.candidates(1, targets=[[1]] * 7 + [[1, 2]]).target_logits] == [1] * 7 + [2]
    with Engine(file, threads=1, kv_tokens=64, unused_tokens=range(10, SMALL.vocab)) as engine:
        engine.prefill(0, [1, 2])
        assert sorted(engine.candidates(10).ids[0].tolist()) == list(range(10))


def test_edits_and_temperatures_may_be_arrays(engine):
    engine.step([(s, random_token_ids(SMALL, 4, s)) for s in range(3)])
    edits = [(0, 5, 1.5, 2.0), (2, 5, 1.0, -3.0), (1, 7, 2.0, 0.0), (1, 7, 1.0, 9.0)]
    temperatures = [0.5, 1.0, 2.0]
    expected = engine.candidates(20, edits=edits, temperatures=temperatures, targets=[[5], [7], [5]])
    array = np.array(edits, EDIT_DTYPE)
    spaced, frozen = np.zeros(8, EDIT_DTYPE), array.copy()
    spaced[::2], frozen.flags.writeable = array, False
    ways_of_edits = (lambda: array, lambda: spaced[::2], lambda: frozen, lambda: iter(edits))
    floats = np.array(temperatures, np.float32)
    ways_of_temperatures = (lambda: floats, lambda: np.repeat(floats, 2)[::2], lambda: floats.astype(np.float64), lambda: iter(temperatures))
    for one, other in itertools.product(ways_of_edits, ways_of_temperatures):
        for got, wanted in zip(engine.candidates(20, edits=one(), temperatures=other(), targets=[[5], [7], [5]]), expected):
            assert np.array_equal(got, wanted)
    assert np.array_equal(engine.candidates(3, edits=array[:0]).ids, engine.candidates(3).ids)
    array["row"][1] = 3
    with pytest.raises(ValueError, match="row 3"):
        engine.candidates(3, edits=array)
    with pytest.raises(ValueError, match="temperatures has 2"):
        engine.candidates(3, temperatures=np.ones(2, np.float32))


def test_numpy_is_imported_at_first_use():
    code = "import sys; from ferrum_native import _native; assert 'numpy' not in sys.modules; assert _native.EDIT_DTYPE.itemsize == 16; _native.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "AttributeError: module 'ferrum_native._native' has no attribute 'nothing'" in done.stderr, done.stderr


# Errors leave everything as it was

def snapshot(engine, live=(1, 2)):
    return engine.stats(), [engine.length(sequence) for sequence in live], engine.candidates(5).ids.tolist()


REFUSED = {
    "no tokens": (ValueError, lambda e: e.prefill(1, [])),
    "no tokens of a new sequence": (ValueError, lambda e: e.prefill(9, [])),
    "id above the vocabulary": (ValueError, lambda e: e.prefill(1, [1, SMALL.vocab])),
    "negative id": (ValueError, lambda e: e.decode(1, -1)),
    "id beyond 32 bits": (ValueError, lambda e: e.decode(1, 1 << 40)),
    "fractional id": (TypeError, lambda e: e.decode(1, 1.5)),
    "sequence beyond 64 bits": (ValueError, lambda e: e.prefill(1 << 70, [1])),
    "decode of an unknown sequence": (UnknownSequence, lambda e: e.decode(9, 1)),
    "batch with an unknown sequence": (UnknownSequence, lambda e: e.decode_batch([1, 9], [1, 1])),
    "the same sequence twice": (ValueError, lambda e: e.decode_batch([1, 1], [1, 2])),
    "the same chunk twice": (ValueError, lambda e: e.step([(1, [1]), (2, [1]), (1, [2])])),
    "fewer tokens than sequences": (ValueError, lambda e: e.decode_batch([1, 2], [1])),
    "empty step": (ValueError, lambda e: e.step([])),
    "empty batch": (ValueError, lambda e: e.decode_batch([], [])),
    "chunk of nothing": (ValueError, lambda e: e.step([(1, [1]), (2, [])])),
    "step above the chunk": (ValueError, lambda e: e.step([(1, [1] * 37, "none")])),
    "unknown wish": (ValueError, lambda e: e.prefill(1, [1], logits="some")),
    "more rows than allowed": (LogitRowsExceeded, lambda e: e.prefill(1, [1] * 41, logits="all")),
    "pool exhausted": (KVPoolExhausted, lambda e: e.prefill(3, [1] * 230)),
    "pool exhausted for one of two": (KVPoolExhausted, lambda e: e.step([(1, [1]), (2, [1] * 30, "none")])),
    "too many sequences": (KVPoolExhausted, lambda e: e.step([(s, [1]) for s in (1, 5, 6, 7)])),
    "context full": (ContextFull, lambda e: e.prefill(1, [1] * 250)),
    "reserve beyond the context": (ContextFull, lambda e: e.reserve(1, 300)),
    "reserve a negative room": (ValueError, lambda e: e.reserve(1, -1)),
    "release of an unknown sequence": (UnknownSequence, lambda e: e.release(9)),
    "length of an unknown sequence": (UnknownSequence, lambda e: e.length(9)),
    "truncation of an unknown sequence": (UnknownSequence, lambda e: e.truncate(9, 1)),
    "truncation to nothing": (ValueError, lambda e: e.truncate(1, 0)),
    "truncation to more than there is": (ValueError, lambda e: e.truncate(1, 1 << 40)),
    "fork of an unknown sequence": (UnknownSequence, lambda e: e.fork(9, 10)),
    "fork onto a live sequence": (ValueError, lambda e: e.fork(1, 2)),
    "fork onto itself": (ValueError, lambda e: e.fork(1, 1)),
    "no candidates": (ValueError, lambda e: e.candidates(0)),
    "too many candidates": (ValueError, lambda e: e.candidates(SMALL.vocab)),
    "temperature 0": (ValueError, lambda e: e.candidates(1, temperatures=[0.0, 1.0])),
    "temperature NaN": (ValueError, lambda e: e.candidates(1, temperatures=[float("nan"), 1.0])),
    "temperatures of too few rows": (ValueError, lambda e: e.candidates(1, temperatures=[1.0])),
    "edit of no row": (ValueError, lambda e: e.candidates(1, edits=[(2, 0)])),
    "edit of no token": (ValueError, lambda e: e.candidates(1, edits=[(0, SMALL.vocab)])),
    "penalty 0": (ValueError, lambda e: e.candidates(1, edits=[(0, 0, 0.0)])),
    "target of no token": (ValueError, lambda e: e.candidates(1, targets=[[0], [-1]])),
    "targets of too few rows": (ValueError, lambda e: e.candidates(1, targets=[[0]])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_calls_change_nothing(model, case):
    error, call = REFUSED[case]
    [one, two, more] = prompts(16, 31, 3)
    expected = rows_alone(model(), [one + more[:1], two + more[:1]])
    with Engine(model(), threads=1, kv_tokens=320, max_sequences=4, prefill_chunk=32, max_logit_rows=40) as engine:
        engine.prefill(8, [1] * 150, logits="none")  # leaves seven free blocks
        engine.prefill(1, one, logits="none")
        engine.prefill(2, two[:-1], logits="none")
        logits = engine.step([(1, more[:1]), (2, two[-1:])])
        kept, before = logits.copy(), snapshot(engine)
        if case == "pool exhausted for one of two":
            engine.reserve(8, 90)
            before = snapshot(engine)
        with pytest.raises(error) as raised:
            call(engine)
        assert len(str(raised.value)) > 10
        assert snapshot(engine) == before
        assert bits(logits) == bits(kept)
        assert bits(engine.decode(2, more[0])) == bits(expected[1][-1])
        for sequence in (1, 2, 8):
            engine.release(sequence)
        assert all_free(engine)


def test_wrong_options_are_refused(model):
    for wrong in ({"kv_type": "q4_0"}, {"activations": "int4"}, {"prefill_chunk": 0}, {"max_sequences": 0}, {"kv_tokens": 0}, {"threads": 0}, {"max_logit_rows": 0},
                  {"device": "tpu"}, {"kv_tokens": 1.5}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Engine(model(), **{"threads": 1, **wrong})
    with pytest.raises(ValueError, match="mmx"):
        Engine(model(), threads=1, instruction_set="mmx")


def test_capacity_is_rounded_up_to_blocks(model):
    with Engine(model(), threads=1, kv_tokens=17) as engine:
        assert engine.kv_capacity == 32 and engine.stats()["kv_blocks"] == 2
        assert engine.kv_bytes_per_token == 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 2
        engine.prefill(0, [1] * 32)
        with pytest.raises(KVPoolExhausted):
            engine.decode(0, 1)
    with Engine(model(), threads=1, kv_type="f32") as engine:
        assert engine.kv_capacity == SMALL.context
        assert engine.kv_bytes_per_token == 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim * 4
        engine.prefill(0, [1] * SMALL.context, logits="none")
        with pytest.raises(ContextFull, match="256"):
            engine.decode(0, 1)
    with Engine(model(), threads=1, kv_type="q8_0", kv_tokens=32) as engine:
        assert engine.kv_bytes_per_token == 2 * SMALL.layers * SMALL.kv_heads * SMALL.head_dim // 32 * 34


def test_q8_0_of_heads_that_are_no_groups_of_32_is_refused_by_name(model):
    for call in (plan, Engine):
        with pytest.raises(UnsupportedModelError, match="kv_type q8_0 gives each 32 dimensions of a head one scale, and the model's heads have 40. Choose kv_type f16"):
            call(model("F32", replace(SMALL, head_dim=40)), threads=1, kv_type="q8_0")


def test_close_gives_everything_back(model):
    engine = Engine(model(), threads=2, kv_tokens=64)
    engine.prefill(0, [1, 2, 3])
    assert not engine.closed
    engine.close()
    engine.close()
    assert engine.closed
    for call in (lambda: engine.prefill(0, [1]), lambda: engine.decode(0, 1), lambda: engine.decode_batch([0], [1]), lambda: engine.step([(0, [1])]),
                 lambda: engine.candidates(1), lambda: engine.fork(0, 1), lambda: engine.release(0), engine.reset, lambda: engine.reserve(0, 1), engine.warm_up,
                 lambda: engine.length(0), engine.stats, lambda: engine.truncate(0, 1), lambda: engine.kv_blocks_free):
        with pytest.raises(EngineClosed):
            call()
    engine.cancel()


# Threads, signals, processes

def test_any_thread_may_call(model):
    sequences = prompts(30, 41, 17, 50)
    expected = rows_alone(model(), sequences)
    failures = []
    with Engine(model(), threads=2, kv_tokens=512, prefill_chunk=8, max_logit_rows=30) as engine:

        def work(sequence):
            tokens = sequences[sequence]
            try:
                for _ in range(5):
                    engine.prefill(sequence, tokens[:10], logits="none")
                    for position in range(10, len(tokens)):
                        engine.decode(sequence, tokens[position])  # its logits may be overwritten by another thread's step
                    engine.fork(sequence, sequence + 10)
                    assert engine.length(sequence + 10) == len(tokens)
                    engine.release(sequence)
                    engine.release(sequence + 10)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(sequence,)) for sequence in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and all_free(engine)
        assert bits(engine.prefill(0, sequences[0], logits="all")) == bits(expected[0])


@pytest.fixture
def slow_prompt(model):
    """An engine that takes a prompt token by token, with a sequence of 20 tokens."""
    [tokens] = prompts(20)
    with Engine(model("Q8_0", replace(SMALL, context=1 << 16)), threads=1, kv_tokens=1 << 15, prefill_chunk=1) as engine:
        engine.prefill(1, tokens, logits="none")
        yield engine


@pytest.mark.parametrize("sequence", [1, 2], ids=["live", "new"])
def test_a_prefill_is_cancelled_from_another_thread(slow_prompt, sequence):
    engine, done = slow_prompt, threading.Event()

    def cancel_until_done():
        while not done.wait(0.002):
            engine.cancel()

    thread = threading.Thread(target=cancel_until_done)
    thread.start()
    try:
        with pytest.raises(Cancelled, match=f"sequence {sequence} was cancelled"):
            engine.prefill(sequence, [1] * 30000)
    finally:
        done.set()
        thread.join()
    assert engine.cached_prefix([1] * 30000) == (0, 0)
    check_as_before(engine)


@pytest.mark.parametrize("sequence", [1, 2], ids=["live", "new"])
def test_ctrl_c_ends_a_prefill(slow_prompt, sequence):
    timer = threading.Timer(0.03, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        slow_prompt.prefill(sequence, [1] * 30000)
    timer.join()
    check_as_before(slow_prompt)


def check_as_before(engine):
    stats = engine.stats()
    assert stats["live_sequences"] == 1 and stats["kv_blocks_free"] == stats["kv_blocks"] - 2 and engine.length(1) == 20
    engine.prefill(3, [1, 2, 3])
    engine.release(1)
    engine.release(3)
    assert all_free(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_refused(model):
    with Engine(model(), threads=2, kv_tokens=64) as engine:
        engine.prefill(0, [1, 2])
        child = os.fork()
        if child == 0:
            try:
                engine.decode(0, 1)
            except RuntimeError as error:
                engine.close()
                os._exit(0 if "another process" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        engine.decode(0, 3)


# Models that are refused

def altered(file, change=None, remove=(), add=(), metadata=None):
    """A model file's description with other tensors; its paths lead nowhere, so nothing can be mapped."""
    tensors = {name: info for name, info in file.tensors.items() if name not in remove}
    for name, info in tensors.items():
        tensors[name] = info._replace(**(change or {}).get(name, {}))
    for name in add:
        tensors[name] = next(iter(file.tensors.values()))._replace(name=name)
    return SimpleNamespace(paths=("/nowhere/model.gguf",), metadata={**file.metadata, **(metadata or {})}, tensors=tensors)


def test_unsupported_types_are_refused_by_name_before_memory_is_taken(model):
    file = model()
    experts = {name: {"type_id": 16, "type_name": "IQ2_XXS"} for name in file.tensors if "exps" in name}
    wrong = altered(file, {**experts, "blk.1.attn_q.weight": {"type_id": 99, "type_name": "type 99"}})
    for load in (lambda: Engine(wrong, threads=1, kv_tokens=1 << 30), lambda: plan(wrong)):
        with pytest.raises(UnsupportedModelError, match=r"IQ2_XXS \(6 tensors, such as blk\.\d\.ffn_\w+_exps\.weight\), type 99 \(1 tensor: blk\.1\.attn_q\.weight\)") as raised:
            load()
        for supported in ("F32", "F16", "BF16", *BLOCK_OF):
            assert supported in str(raised.value)


@pytest.mark.parametrize("name", ["blk.1.attn_q_norm.weight", "blk.0.ffn_down_exps.weight", "output_norm.weight", "token_embd.weight", "blk.1.ffn_gate_inp.weight"])
def test_a_missing_tensor_is_named(model, name):
    with pytest.raises(ModelFileError, match=name.replace(".", r"\.")):
        Engine(altered(model(), remove=[name]), threads=1)


def test_a_misshapen_tensor_is_named_with_both_shapes(model):
    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_k\.weight has shape \[64, 32\].* \[64, 64\]"):
        Engine(altered(model(), {"blk.1.attn_k.weight": {"shape": (64, 32)}}), threads=1)
    with pytest.raises(ModelFileError, match=r"blk\.0\.ffn_up_exps\.weight"):
        Engine(altered(model(), {"blk.0.ffn_up_exps.weight": {"shape": (96, 8, 64)}}), threads=1)
    with pytest.raises(ModelFileError, match=r"blk\.0\.attn_v\.weight.* bytes"):
        Engine(altered(model(), {"blk.0.attn_v.weight": {"nbytes": 10}}), threads=1)


def test_tensors_that_would_be_ignored_are_refused(model):
    with pytest.raises(UnsupportedModelError, match=r"2 tensors .*such as blk\.0\.attn_q\.bias"):
        Engine(altered(model(), add=["blk.0.attn_q.bias", "blk.9.attn_q.weight"]), threads=1)


@pytest.mark.parametrize("metadata,message", [
    ({"general.architecture": "llama"}, "llama"),
    ({"qwen3moe.attention.sliding_window": 4096}, "sliding"),
    ({"qwen3moe.rope.scaling.type": "longrope"}, "longrope"),
    ({"qwen3moe.expert_used_count": 9}, "expert_used_count"),
    ({"qwen3moe.block_count": 0}, "block_count"),
    ({"qwen3moe.attention.head_count": "four"}, "head_count"),
    ({"qwen3moe.attention.value_length": 16}, "value_length"),
    ({"qwen3moe.embedding_length": -64}, "embedding_length"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_metadata_that_cannot_be_run_is_refused(model, metadata, message):
    with pytest.raises(ModelFileError, match=message):
        Engine(altered(model(), metadata=metadata), threads=1)


def test_a_file_that_shrank_is_refused(model, tmp_path):
    file = model()
    path = tmp_path / "cut.gguf"
    path.write_bytes(Path(file.paths[0]).read_bytes()[:-5000])
    cut = SimpleNamespace(paths=(str(path),), metadata=file.metadata, tensors=file.tensors)
    with pytest.raises(ModelFileError, match="reaches past the end of the file"):
        Engine(cut, threads=1)
    with pytest.raises(ModelFileError, match="/nowhere/model.gguf"):
        Engine(altered(file), threads=1)


# Configuration and plan

def test_config_is_what_the_file_says(model):
    file = model("Q4_K_M", WIDE, tied=True, rope_scaling=RopeScaling("yarn", 4.0, 1024))
    with Engine(file, threads=1, kv_tokens=64) as engine:
        assert engine.config == {
            "architecture": "qwen3moe", "num_layers": 3, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "num_experts": 8, "top_k": 3,
            "expert_ffn_size": 256, "norm_topk_prob": True, "vocab_size": 512, "context_length": 4096, "rms_eps": pytest.approx(1e-6), "rope_theta": 1e6,
            "rope_scaling": "yarn 4 (original context 1024)", "rotary_dim": 128, "sliding_window": 0, "tied_embeddings": True}
        assert engine.config == plan(file)["config"]


def test_expert_weights_are_not_normalised_where_the_file_says_so(model):
    file = altered(model("F32"), metadata={"qwen3moe.expert_weights_norm": False})
    file.paths = model("F32").paths
    tokens = random_token_ids(SMALL, 20)
    reference = ReferenceModel(file.paths[0])
    reference.config = replace(reference.config, renormalise=False)
    assert np.median(relative_l2(reference.logits(tokens), rows_alone(file, [tokens], **PROOF)[0])) < 5e-6


def test_plan_is_what_the_engine_takes(model):
    given = {"threads": 1, "kv_tokens": 100, "max_sequences": 3, "prefill_chunk": 24, "max_logit_rows": 5}
    planned = plan(altered(model()), **given)  # nothing is opened
    with Engine(model(), **given) as engine:
        assert planned["options"] == engine.options == {**given, "device": "auto", "kv_tokens": 112, "kv_type": "f16", "activations": "int8", "memory_budget": None, "profile": False, "prefix_cache": True}
        assert planned["kv_bytes_per_token"] == engine.kv_bytes_per_token
        assert planned["kv_bytes"] == engine.kv_bytes_per_token * 112
        assert planned["weights_bytes"] == sum(tensor.nbytes for tensor in model().tensors.values())
        assert planned["total_bytes"] == planned["weights_bytes"] + planned["weights_extra_bytes"] + planned["kv_bytes"] + planned["scratch_bytes"]
        assert planned["scratch_bytes"] < 4 << 20
        assert planned["device"] == engine.device
