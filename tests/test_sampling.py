"""Sampling: candidates give what the rule gives on a full sort, and stop strings never show."""

import math
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import tiny_models
from hypothesis import assume, example, given, settings, strategies as st

from ferrum.errors import DeviceError, OptionError
from ferrum.gguf_file import GGUFFile
from ferrum.logit_edits import LogitEdits
from ferrum.sampling import CandidateRows, SamplingParams, candidate_count, draw, draw_rule, draw_rules, full_row, largest, sample, uniform
from ferrum.stopping import StopChecker
from ferrum_native._native import Engine

LARGEST_U = 1 - 2**-53


def full_sort_rule(logits, params, u, unused=()):
    """The rule as sampling.py states it, step by step over every token."""
    order = sorted((id for id in range(len(logits)) if id not in unused), key=lambda id: (-float(logits[id]), id))
    if params.temperature == 0:
        return order[0]
    values = np.array([logits[id] for id in order], dtype=np.float64)
    with np.errstate(all="ignore"):
        weights = np.exp((values - values[0]) / params.temperature).tolist()
    if params.top_k:
        weights = weights[: params.top_k]
    if params.top_p < 1:
        whole = list(accumulate(weights))[-1]
        sums = accumulate(weights)
        weights = weights[: next(i for i, weight in enumerate(sums) if weight >= params.top_p * whole) + 1]
    weights = [weight for weight in weights if weight >= params.min_p]
    sums = list(accumulate(weights))
    drawn = [i for i, weight in enumerate(sums) if weight > u * sums[-1]]
    return order[drawn[0]] if drawn else order[max(i for i, weight in enumerate(weights) if weight > 0)]


def candidates_of(logits, n, temperature, unused=(), log_sum_error=0.0):
    """What the engine gives: the n largest and the log-sum-exp, which may be off by a little."""
    row = full_row(logits, unused)
    values = row.logits[0].astype(np.float64) / np.float64(np.float32(temperature or 1.0))
    log_sum_exp = values[0] + math.log(np.exp(values - values[0]).sum()) + log_sum_error
    n = min(n, len(values))
    return CandidateRows(row.ids[:, :n], row.logits[:, :n], len(values) - n, np.array([log_sum_exp]))


spread_logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=200)
tied_logits = st.lists(st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 8.0]), min_size=1, max_size=200)
near_logits = st.lists(st.integers(0, 40).map(lambda i: 1.0 + i * 2.0**-20), min_size=1, max_size=200)
uniforms = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, LARGEST_U]), st.floats(0, LARGEST_U))
sampling_params = st.builds(
    SamplingParams,
    temperature=st.one_of(st.sampled_from([0.0, 1e-6, 0.01, 0.5, 0.7, 1.0, 5.0]), st.floats(1e-3, 20)),
    top_k=st.one_of(st.just(0), st.integers(1, 250)),
    top_p=st.one_of(st.just(1.0), st.sampled_from([1e-9, 0.5, 0.9, 0.95]), st.floats(0.001, 1.0)),
    min_p=st.one_of(st.just(0.0), st.sampled_from([0.05, 0.5, 1.0]), st.floats(0, 1)),
)


@settings(max_examples=600, deadline=None)
@given(
    st.one_of(spread_logits, tied_logits, near_logits), sampling_params, uniforms, st.integers(1, 210),
    st.sets(st.integers(0, 199), max_size=20), st.floats(-5e-6, 5e-6),
)
@example([0.0] * 8, SamplingParams(temperature=1.0), 0.5, 4, set(), 0.0)
@example([0.0] * 8, SamplingParams(temperature=1.0), LARGEST_U, 8, set(), 0.0)
@example([1.0, 0.0, 0.0, 0.0], SamplingParams(temperature=1.0, top_k=3, top_p=0.9), 0.9, 2, set(), 0.0)
def test_candidates_decide_as_the_full_sort_or_not_at_all(logits, params, u, n, unused, log_sum_error):
    logits = np.array(logits, dtype=np.float32)
    assume(any(id not in unused and logits[id] > -math.inf for id in range(len(logits))))
    expected = full_sort_rule(logits, params, u, unused)
    assert sample(full_row(logits, unused), params, u) == expected
    from_candidates = sample(candidates_of(logits, n, params.temperature, unused, log_sum_error), params, u)
    assert from_candidates in (None, expected)
    if n >= len(logits) or params.temperature == 0 or params.top_k == 1:
        assert from_candidates == expected


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_p=0.95),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=100),
])
def test_candidates_decide_nearly_every_draw(params):
    rng = np.random.default_rng(5)
    undecided = 0
    for _ in range(300):
        logits = (rng.standard_normal(4000) * 3).astype(np.float32)
        row = candidates_of(logits, candidate_count(params), params.temperature)
        u = rng.random()
        token = sample(row, params, u)
        undecided += token is None
        assert token in (None, full_sort_rule(logits, params, u))
    tail = 1 - np.exp(row.logits[0].astype(float) / params.temperature - row.log_sum_exp).sum()
    assert undecided <= 300 * max(0.02, 2 * tail)


def test_a_nucleus_longer_than_the_candidates_is_decided_inside_them():
    logits = np.zeros(1000, dtype=np.float32)
    params = SamplingParams(temperature=1.0, top_p=0.5)
    assert sample(candidates_of(logits, 64, 1.0), params, 0.101) == 50
    assert sample(candidates_of(logits, 64, 1.0), params, 0.5) is None


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits = np.array([1, 3, 3, 2], dtype=np.float32)
    assert sample(full_row(logits), SamplingParams(temperature=0), 0.99) == 1
    assert sample(full_row(logits, {1}), SamplingParams(temperature=0), 0.99) == 2


def test_a_log_sum_exp_out_of_range_is_replaced_by_bounds():
    logits = np.array([5, 4, 3, 2, 1], dtype=np.float32)
    for temperature in (1e-300, 1e-320, 1e-12):
        row = CandidateRows(np.arange(2)[None], logits[None, :2], 3, np.array([math.nan]))
        assert sample(row, SamplingParams(temperature=temperature), 0.999) == 0


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1])).astype(np.float32)
    params = SamplingParams(temperature=1)
    counts = np.zeros(4)
    for position in range(4000):
        counts[sample(full_row(logits), params, uniform(1, position))] += 1
    assert np.abs(counts / 4000 - [0.5, 0.25, 0.15, 0.1]).max() < 0.03


@pytest.mark.parametrize("logits", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_that_are_not_finite_are_an_error(logits):
    with pytest.raises(DeviceError, match="not finite"):
        sample(full_row(np.array(logits, dtype=np.float32)), SamplingParams(), 0.5)


@pytest.mark.parametrize("field, value", [
    ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "5"), ("temperature", -0.1), ("temperature", 1001),
    ("temperature", math.nan), ("temperature", math.inf), ("top_k", -2), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -1),
    ("seed", -1), ("seed", 1 << 64), ("allowed_token_ids", []), ("stop", [""]), ("stop", [3]), ("stop", 5),
    pytest.param("top_k", 10**400, id="long"), pytest.param("temperature", 10**400, id="long-float"),
])
def test_params_refuse_values_by_name(field, value):
    with pytest.raises(OptionError, match=rf"^{field} is .*: expected "):
        SamplingParams(**{field: value})


def test_params_take_what_callers_have():
    params = SamplingParams(max_tokens=np.int64(3), temperature=1, stop="end")
    assert (params.max_tokens, params.temperature, params.stop) == (3, 1.0, ("end",))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()


def first_complete_stop(text, stops):
    """Where the stop string that is complete first starts, by looking at every end; None if there is none."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abA ", max_size=4), max_size=12),
    st.lists(st.text("abA ", min_size=1, max_size=5), max_size=4),
)
@example(["aa", "b"], ["aab", "ab"])
@example(["ab", "ab", "x"], ["abac"])
def test_stop_strings_cut_where_a_search_of_the_whole_text_finds_them(pieces, stops):
    checker = StopChecker(stops)
    shown = ""
    whole = "".join(pieces)
    found = first_complete_stop(whole, stops)
    for piece in pieces:
        shown += checker.push(piece)
        assert whole.startswith(shown)
        assert found is None or len(shown) <= found[0]
    shown += checker.flush()
    assert shown == (whole if found is None else whole[: found[0]])
    assert checker.matched == (None if found is None else found[1])


def test_text_is_held_back_only_while_a_stop_string_is_possible():
    checker = StopChecker(["\n\nEnd"])
    assert [checker.push(piece) for piece in ["The", "\n", "\n", "E", "arth"]] == ["The", "", "", "", "\n\nEarth"]


# The whole rule


def kept_and_drawn(logits, params, u, prompt=(), text=(), ending=(), unused=()):
    """The rule as the head of sampling.py words it, in plain Python over every token: the ids that stay, and the one that u draws."""
    values = {}
    for id, logit in enumerate(logits):
        if id in text or id in prompt:
            logit = logit / np.float32(params.repetition_penalty) if logit > 0 else logit * np.float32(params.repetition_penalty)
        taken = (params.presence_penalty if id in text else 0.0) + params.frequency_penalty * list(text).count(id)
        logit = logit + np.float32(params.logit_bias.get(id, 0.0) - taken)
        out = id in params.banned_token_ids or (params.allowed_token_ids and id not in params.allowed_token_ids)
        if not out and not (len(text) < params.min_tokens and id in ending) and id not in unused:
            values[id] = float(logit)
    order = sorted(values, key=lambda id: (-values[id], id))
    if params.temperature == 0:
        return order[:1], order[0]
    weight = {id: math.exp((values[id] - values[order[0]]) / params.temperature) if values[id] > -math.inf else 0.0 for id in order}
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        order = shortest_beginning(order, weight, params.top_p)
    if params.min_p:
        order = [id for id in order if weight[id] >= params.min_p * weight[order[0]]]
    if params.typical_p < 1:
        whole = math.fsum(weight[id] for id in order)
        surprise = {id: -math.log(weight[id] / whole) for id in order if weight[id] > 0}
        entropy = math.fsum(weight[id] / whole * surprise[id] for id in surprise)
        typical = set(shortest_beginning(sorted(surprise, key=lambda id: abs(surprise[id] - entropy)), weight, params.typical_p))
        order = [id for id in order if id in typical]
    sums = list(accumulate(weight[id] for id in order))
    drawn = next((id for id, so_far in zip(order, sums) if so_far > u * sums[-1]), None)
    return order, drawn if drawn is not None else [id for id in order if weight[id] > 0][-1]


def shortest_beginning(order, weight, p):
    sums = list(accumulate(weight[id] for id in order))
    return order[: next((at for at, so_far in enumerate(sums) if so_far >= p * sums[-1]), len(order) - 1) + 1]


def random_params(rng, vocab):
    """Params that use any part of the rule; penalties and biases are exact in float32."""
    ids = lambda most: tuple(rng.integers(0, vocab, rng.integers(0, most)).tolist())  # noqa: E731
    some = lambda value, off: value if rng.random() < 0.4 else off  # noqa: E731
    return SamplingParams(
        temperature=float(rng.choice((0.0, 0.3, 0.7, 1.0, 2.5, 30.0))),
        top_k=some(int(rng.integers(1, 40)), 0), top_p=some(float(rng.uniform(0.05, 0.99)), 1.0), min_p=some(float(rng.uniform(0, 0.5)), 0.0),
        typical_p=some(float(rng.uniform(0.05, 0.99)), 1.0), repetition_penalty=some(float(rng.integers(4, 16)) / 8, 1.0),
        presence_penalty=some(float(rng.integers(-16, 16)) / 8, 0.0), frequency_penalty=some(float(rng.integers(-16, 16)) / 8, 0.0),
        logit_bias=some({id: float(rng.integers(-64, 64)) / 8 for id in ids(9)}, {}), banned_token_ids=some(ids(9), ()),
        min_tokens=some(int(rng.integers(0, 12)), 0), max_tokens=64,
    )


def spread_row(rng, vocab):
    """Logits without equal values; their spread is that of flat and of sharp distributions."""
    return (rng.standard_normal(vocab) * rng.choice((0.1, 1.0, 3.0, 10.0))).astype(np.float32)


def test_rows_with_different_params_draw_by_the_whole_rule():
    rng = np.random.default_rng(21)
    vocab, ending, unused = 120, frozenset((3, 77)), frozenset((118, 119))
    decided = undecided = 0
    for _ in range(60):
        rows, rules, us, expected, likely = [], [], [], [], []
        n = int(rng.choice((8, 64, vocab - len(unused))))
        for _ in range(12):
            params, logits = random_params(rng, vocab), spread_row(rng, vocab)
            prompt, text = rng.integers(0, vocab, 10).tolist(), rng.integers(0, vocab, rng.integers(0, 20)).tolist()
            edits = LogitEdits(params, prompt, ending)
            for token in text:
                edits.add(token)
            us.append(rng.random())
            expected.append(kept_and_drawn(logits, params, us[-1], prompt, text, ending, unused)[1])
            temperature = draw_rule(params)[0]
            rows.append(candidates_of(edits.apply(logits), n, temperature, unused))
            rules.append(draw_rule(params))
            likely.append(params.temperature == 0 or 0 < params.top_k <= n)
        together = CandidateRows(np.concatenate([row.ids for row in rows]), np.concatenate([row.logits for row in rows]), rows[0].others,
                                 np.concatenate([row.log_sum_exp for row in rows]))
        index = draw(together, draw_rules(rules), np.array(us))
        for at, row in enumerate(rows):
            assert index[at] == draw(row, draw_rules(rules[at : at + 1]), np.array(us[at : at + 1]))[0]
            if index[at] >= 0:
                assert row.ids[0, index[at]] == expected[at]
            else:
                assert row.others and not likely[at]
            decided, undecided = decided + (index[at] >= 0), undecided + (index[at] < 0)
    assert decided > 500 and undecided > 20


def test_edits_are_the_same_bits_in_the_engine_and_on_a_full_row(tmp_path):
    path = tiny_models.write_tiny_model(tmp_path / "tiny.gguf")
    rng = np.random.default_rng(8)
    vocab = 512
    with Engine(GGUFFile.open(path), threads=1, kv_tokens=64, max_sequences=4) as engine:
        for sequence in range(3):
            engine.prefill(sequence, [5, 6 + sequence])
        logits = engine.decode_batch([0, 1, 2], [7, 8, 9])
        usable = tiny_models.make_vocabulary(vocab).types.count(tiny_models.gguf.TokenType.UNUSED)
        usable = vocab - usable
        for _ in range(40):
            ending = frozenset(rng.integers(0, vocab, 3).tolist())
            texts = []
            for row in range(3):
                params = replace(random_params(rng, vocab), presence_penalty=float(rng.uniform(-3, 3)), repetition_penalty=float(rng.uniform(0.5, 2)))
                edits = LogitEdits(params, rng.integers(0, vocab, 20).tolist(), ending)
                for token in rng.integers(0, vocab, rng.integers(0, 40)).tolist():
                    edits.add(token)
                texts.append(edits)
            before = np.asarray(logits).copy()
            found = engine.candidates(usable, edits=np.concatenate([edits.array(row) for row, edits in enumerate(texts)]))
            assert np.asarray(logits).tobytes() == before.tobytes()
            for row, edits in enumerate(texts):
                applied = edits.apply(before[row])
                assert found.logits[row].tobytes() == applied[found.ids[row]].tobytes()
                order = np.lexsort((found.ids[row], -found.logits[row]))
                assert (order == np.arange(usable)).all()


def test_edits_count_what_the_rule_counts():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5, logit_bias={4: 3.0}, banned_token_ids=(6,), min_tokens=2)
    edits = LogitEdits(params, [1, 1, 2], {7})
    logits = np.array([4, 4, -4, 4, 4, 4, 4, 4], np.float32)
    assert edits.apply(logits).tolist() == [4, 2, -8, 4, 7, 4, -math.inf, -math.inf]
    edits.add(3)
    edits.add(3)
    assert edits.apply(logits).tolist() == [4, 2, -8, 2 - 1 - 1, 7, 4, -math.inf, 4]
    edits.add(4)
    assert edits.apply(logits).tolist() == [4, 2, -8, 0, 2 + 3 - 1.5, 4, -math.inf, 4]


def test_uniforms_are_uniform_and_do_not_depend_on_each_other():
    def deviation(counts, expected):
        """Chi-square over its standard deviation: about normal for many cells."""
        cells = counts.size
        return (((counts - expected) ** 2 / expected).sum() - cells) / math.sqrt(2 * cells)

    for name, pairs in {
        "positions": [(uniform(7, at), uniform(7, at + 1)) for at in range(20_000)],
        "seeds": [(uniform(seed, 0), uniform(seed + 1, 0)) for seed in range(20_000)],
        "samples of one prompt": [(uniform(seed, at), uniform(seed + 1, at)) for seed in range(200) for at in range(100)],
        "seed and position": [(uniform(seed, 1), uniform(seed + 1, 0)) for seed in range(20_000)],
        "large seeds": [(uniform((1 << 64) - 1 - at, at), uniform(at, (1 << 31) - at)) for at in range(20_000)],
    }.items():
        pairs = np.array(pairs)
        assert (pairs >= 0).all() and (pairs < 1).all()
        counts, _, _ = np.histogram2d(*pairs.T, bins=20, range=((0, 1), (0, 1)))
        assert abs(deviation(counts, len(pairs) / 400)) < 4, name
        assert len(np.unique(pairs[:, 0])) == len(pairs), name


def test_a_uniform_is_the_same_in_any_order():
    sequence = [uniform(3, at) for at in range(50)]
    assert [uniform(3, at) for at in reversed(range(50))] == sequence[::-1]


@given(data=st.data())
def test_the_largest_of_a_row_decide_as_the_full_row_does_or_not_at_all(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    logits = (np.round(rng.normal(0, 2, 200) * 4) / data.draw(st.sampled_from((1, 4, 16)))).astype(np.float32)  # with ties
    logits[rng.random(200) < data.draw(st.sampled_from((0, 0.5, 0.99)))] = -np.inf
    logits[data.draw(st.integers(0, 199))] = 1.0
    params = SamplingParams(temperature=data.draw(st.sampled_from((0.3, 1.0, 5.0))), top_k=data.draw(st.sampled_from((0, 5, 40))),
                            top_p=data.draw(st.sampled_from((1.0, 0.9, 0.5))), min_p=data.draw(st.sampled_from((0.0, 0.1))),
                            typical_p=data.draw(st.sampled_from((1.0, 0.8))))
    count = data.draw(st.sampled_from((1, 5, 64, 200, 300)))
    rows, whole, u = largest(logits, count, params.temperature), full_row(logits), data.draw(st.floats(0, 1, exclude_max=True))
    assert rows.ids[0].tolist() == whole.ids[0, :count].tolist()
    token = sample(rows, params, u)
    assert token == sample(whole, params, u) if count >= 200 else token in (None, sample(whole, params, u))
