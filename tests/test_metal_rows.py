"""The row kernels of `metal_src`, one by one on CPU fibers: norm, qk_norm_rope_cache, attention, route, gather_rows, top_candidates, block copies.

Every case runs with lanes and threadgroups in random order, some also with every load and store watched. Grids are larger than the counts, and
what a kernel must not touch holds a pattern that is looked at afterwards.
"""
import struct

import numpy as np
import pytest
from reference import BLOCK_OF, attention, log_sum_exp, qk_norm_rope, rms_normalise, rope_cos_sin, route, softmax

try:
    import metal_runner

    metal_runner.mslc.clang()
    MISSING = None
except Exception as error:  # no clang: mslc says so
    MISSING = str(error)

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
EPS = float(np.finfo(np.float32).eps)
SIZES = (1, 31, 32, 33, 257)
UNTOUCHED = np.float32(-12345.0)


@pytest.fixture(params=["", "all"], ids=["plain", "checked"])
def launch(request):
    """launch(file, kernel, args bytes, arrays, grid, threads, ...): every call has another order of lanes and threadgroups."""
    seeds = iter(range(1, 10_000))

    def run(file, kernel, args, arrays, grid, threads, **options):
        metal_runner.run(f"metal_src/{file}.metal", kernel, args, arrays, grid, (threads, 1, 1), seed=next(seeds), checks=request.param, **options)

    run.checked = request.param == "all"
    return run


def count_of(n):
    return np.array([n], dtype=np.int32)


def random_rows(rows, cols, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * scale).astype(np.float32)


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_close(got, expected, tolerance, what=""):
    assert np.shape(got) == np.shape(expected)
    excess = np.abs(np.asarray(got, dtype=np.float64) - expected) / np.maximum(tolerance, 1e-300)
    assert not np.isnan(excess).any(), f"{what}: NaN at {np.argwhere(np.isnan(excess))[0]}"
    assert excess.max(initial=0) <= 1, f"{what}: {excess.max():.3g} times the tolerance at {np.unravel_index(excess.argmax(), excess.shape)}"


# norm

def norm(launch, residual, weight, eps=1e-6, delta=None):
    """(new residual, normalised) of the rows of `residual` but the last, which the kernel is not to touch."""
    residual, rows, cols = residual.copy(), len(residual) - 1, residual.shape[1]
    out = np.full_like(residual, UNTOUCHED)
    last = residual[-1].copy()
    threads = min(max(32, (cols // 4 + 31) // 32 * 32), 512)
    launch("norm", "norm", struct.pack("ifi", cols, eps, delta is not None), [residual, residual.copy() if delta is None else delta, weight, count_of(rows), out],
           (rows + 1, 1, 1), threads, threadgroup_bytes=128)
    assert same_bits(residual[-1], last) and (out[-1] == UNTOUCHED).all()
    return residual[:-1], out[:-1]


@pytest.mark.parametrize("with_delta", [False, True], ids=["plain", "delta"])
def test_norm_adds_the_delta_and_normalises(launch, with_delta):
    for cols in (*SIZES, 7, 128, 2048, 4100):
        for rows in (1, 3):
            residual, weight = random_rows(rows + 1, cols, 1, 3.0), random_rows(1, cols, 2)[0]
            delta = random_rows(rows + 1, cols, 3) if with_delta else None
            new_residual, out = norm(launch, residual, weight, delta=delta)
            assert same_bits(new_residual, (residual + delta if with_delta else residual)[:rows])
            expected = rms_normalise(new_residual.astype(np.float64), weight.astype(np.float64), np.float64(np.float32(1e-6)))
            assert_close(out, expected, (cols / 32 + 8) * EPS * np.abs(expected) + 1e-37, f"{rows} x {cols}")
            alone = norm(launch, residual[[0, -1]], weight, delta=None if delta is None else delta[[0, -1]])
            assert same_bits(alone[1][0], out[0])


def test_norm_keeps_a_nan_in_its_row_and_takes_rows_of_any_size(launch):
    rows = random_rows(5, 96)
    rows[1, 5] = np.nan
    rows[2] *= np.float32(1e15)
    rows[3] = 0
    out = norm(launch, np.vstack([rows, rows[:1]]), np.ones(96, np.float32))[1]
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2, 3, 4]]).all() and not out[3].any()


# qk_norm_rope_cache and attention

class PagedKv:
    """Keys and values [layers, blocks, kv_heads, ...] full of NaN, and the block tables of sequences in shuffled blocks."""

    def __init__(self, *, kv_heads, head_dim, kv_type, contexts, layers=1, layer=0, spare=3, seed=0):
        self.kv_heads, self.head_dim, self.layer = kv_heads, head_dim, layer
        self.type, self.kernel_type = {"f16": (np.float16, "f16"), "f32": (np.float32, "f32")}[kv_type]
        rng = np.random.default_rng(seed)
        needed = [-(-context // 16) for context in contexts]
        self.blocks = sum(needed) + spare
        order = rng.permutation(self.blocks).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        # keys of a block: [D / 8, 16, 8]; values: [16, D]
        self.keys = np.full((layers, self.blocks, kv_heads, head_dim // 8, 16, 8), np.nan, dtype=self.type)
        self.values = np.full((layers, self.blocks, kv_heads, 16, head_dim), np.nan, dtype=self.type)

    def fill(self, sequence, keys, values):
        """Puts keys and values [tokens, kv_heads, D] of a sequence from its start on."""
        for position in range(len(keys)):
            block, place = self.tables[sequence][position // 16], position % 16
            self.keys[self.layer, block, :, :, place] = keys[position].reshape(self.kv_heads, -1, 8)
            self.values[self.layer, block, :, place] = values[position]

    def stored(self, x):
        return x.astype(self.type).astype(np.float64)


def step_bytes(*, tokens=0, sequences=0, logit_rows=0, max_blocks=0, decode_tiles=0, prompt_tiles=0):
    return np.array([tokens, sequences, logit_rows, max_blocks, decode_tiles, prompt_tiles, 0, 0], dtype=np.int32)


def largest_group(heads_per_kv_head):
    return next(g for g in range(min(8, heads_per_kv_head), 0, -1) if heads_per_kv_head % g == 0)


def split_length(context):
    return 256 * -(-context // (256 * 32))


def attend(launch, kv, parts, queries, heads, *, scale=None, only=None):
    """Attention of parts (sequence, begin, end) as the host encodes it: queries [T, heads, D] -> [T, heads, D]."""
    D, per_kv_head = kv.head_dim, heads // kv.kv_heads
    group = largest_group(per_kv_head)
    most = max(-(-end // 16) for _, _, end in parts) + 1
    tables = np.full((len(parts), most), -1, dtype=np.int32)
    decode_tiles, prompt_tiles, first = [], [], 0
    for row, (s, begin, end) in enumerate(parts):
        used = kv.tables[s][:-(-end // 16)]
        tables[row, :len(used)] = used
        if end - begin == 1:
            decode_tiles.append((row, first, 1, begin))
        else:
            per_tile = 32 // group
            prompt_tiles += [(row, first + i, min(per_tile, end - begin - i), begin + i) for i in range(0, end - begin, per_tile)]
        first += end - begin
    tiles = np.array(decode_tiles + prompt_tiles, dtype=np.int32)
    step = step_bytes(tokens=first, sequences=len(parts), max_blocks=most, decode_tiles=len(decode_tiles), prompt_tiles=len(prompt_tiles))
    out = np.full((first + 1, heads, D), UNTOUCHED, dtype=np.float32)
    q = np.ascontiguousarray(queries, dtype=np.float32)
    splits = max([-(-(position + 1) // split_length(position + 1)) for *_, position in decode_tiles], default=1)
    args = struct.pack("iiifiii", heads, kv.kv_heads, D, D ** -0.5 if scale is None else scale, kv.layer, kv.blocks, splits)
    constants = {"head_size": D, "group_heads": group}
    keys, values = kv.keys, kv.values
    if decode_tiles:
        partial = np.full((len(decode_tiles), heads, splits, D), np.nan, dtype=np.float32)
        stats = np.full((len(decode_tiles), heads, splits, 2), np.nan, dtype=np.float32)
        launch("attention", f"attention_decode_{kv.kernel_type}", args, [step, tiles, tables, q, keys, values, partial, stats, out],
               (heads // group, len(decode_tiles) + 1, splits + 1), 128, threadgroup_bytes=-(-4 * (group * D + 4 * group * 34) // 16) * 16, constants=constants)
        if splits > 1:
            launch("attention", "attention_combine", args, [step, tiles, partial, stats, out], (heads, len(decode_tiles) + 1, 1), 32)
    if prompt_tiles:
        launch("attention", f"attention_prompt_{kv.kernel_type}", args, [step, tiles, tables, q, keys, values, out],
               (heads // group, len(prompt_tiles) + 1, 1), 128, constants=constants)
    assert (out[-1] == UNTOUCHED).all()
    return out[:-1]


class Sequences:
    """Random queries, keys and values of sequences, in a PagedKv."""

    def __init__(self, *, heads, kv_heads, head_dim, kv_type, contexts, seed=0, **options):
        self.heads = heads
        self.kv = PagedKv(kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type, contexts=contexts, **options)
        rng = np.random.default_rng(seed + 1)
        self.queries, self.keys, self.values = ([(rng.standard_normal((c, n, head_dim)) * 1.2).astype(np.float32) for c in contexts] for n in (heads, kv_heads, kv_heads))
        self.fill()

    def fill(self):
        for s, (keys, values) in enumerate(zip(self.keys, self.values)):
            self.kv.fill(s, keys, values)

    def attend(self, launch, parts):
        return attend(launch, self.kv, parts, np.concatenate([self.queries[s][begin:end] for s, begin, end in parts]), self.heads)

    def expected(self, parts):
        """(values, tolerance)"""
        values, tolerances = [], []
        for s, begin, end in parts:
            q = self.queries[s][begin:end].astype(np.float64)
            k, v = self.kv.stored(self.keys[s][:end]), self.kv.stored(self.values[s][:end])
            values.append(attention(q, k, v))
            score_error = np.abs(q).max() * np.abs(k).max() * self.kv.head_dim ** 0.5 * (4 + self.kv.head_dim ** 0.5) * EPS
            tolerances.append(np.full((end - begin, 1, 1), (2 * score_error + 5e-7 + end / 16 * EPS) * np.abs(v).max()))
        return np.concatenate(values), np.concatenate(tolerances)

    def check(self, launch, parts):
        got = self.attend(launch, parts)
        assert_close(got, *self.expected(parts), str(parts))
        return got


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(1, 1, 64), (4, 2, 96), (8, 1, 128), (3, 1, 256), (6, 1, 32), (16, 1, 32), (5, 5, 8), (2, 1, 512)])
def test_attention_of_decode_tokens_and_prompt_chunks(launch, heads, kv_heads, head_dim, kv_type):
    contexts = [1, 15, 16, 17, 31, 33, 70]
    case = Sequences(heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type, contexts=contexts, layers=2, layer=1)
    decodes = [(s, context - 1, context) for s, context in enumerate(contexts)]
    mixed = [(6, 50, 70), (0, 0, 1), (4, 29, 31), (3, 0, 17), (5, 32, 33), (2, 3, 13)]
    for parts in (decodes, mixed) if not launch.checked else (mixed,):
        case.check(launch, parts)


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(2, 1, 64), (8, 2, 32)])
def test_attention_of_split_contexts(launch, heads, kv_heads, head_dim, kv_type):
    """Around the split of 256 tokens, and the result of a token does not depend on the other tokens that are decoded."""
    contexts = [255, 256, 257, 512, 513, 700] if not launch.checked else [255, 257, 513]
    case = Sequences(heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type, contexts=contexts)
    decodes = [(s, context - 1, context) for s, context in enumerate(contexts)]
    together = case.check(launch, decodes)
    for row, part in enumerate(decodes):
        assert same_bits(case.attend(launch, [part])[0], together[row])
    last = len(contexts) - 1
    case.check(launch, [(last, contexts[last] - 5, contexts[last]), (0, 254, 255)])


def test_attention_of_more_than_32_short_splits():
    """Splits grow with the context so that there are never more than 32."""
    seeds = iter(range(1, 100))
    plain = lambda file, kernel, args, arrays, grid, threads, **o: metal_runner.run(f"metal_src/{file}.metal", kernel, args, arrays, grid, (threads, 1, 1), seed=next(seeds), **o)
    contexts = [8192, 8193, 9000]
    case = Sequences(heads=2, kv_heads=1, head_dim=32, kv_type="f32", contexts=contexts)
    case.check(plain, [(s, context - 1, context) for s, context in enumerate(contexts)])


def test_attention_reads_no_block_of_others(launch):
    case = Sequences(heads=4, kv_heads=2, head_dim=64, kv_type="f16", contexts=[40, 100, 17])
    everything = [(0, 0, 40), (1, 0, 100), (2, 0, 17)]
    whole = case.attend(launch, everything)
    for block in set(range(case.kv.blocks)) - set(case.kv.tables[1]):
        case.kv.keys[:, block] = case.kv.values[:, block] = np.nan
    assert same_bits(case.attend(launch, [(1, 0, 100)]), whole[40:140])
    for block in case.kv.tables[1][3:]:
        case.kv.keys[:, block] = case.kv.values[:, block] = np.nan
    assert same_bits(case.attend(launch, [(1, 0, 48)]), whole[40:88])
    assert np.isnan(case.attend(launch, [(1, 48, 49)])).all()  # the canary does sing, in a decode
    assert np.isnan(case.attend(launch, [(1, 40, 49)])[8]).all()  # and in a prompt


def test_attention_of_large_scores_has_no_nan(launch):
    for q_scale, k_scale in ((1e4, 1.0), (1e4, 1e4), (1e15, 1e15), (1e-4, 1e-4)):
        case = Sequences(heads=2, kv_heads=1, head_dim=64, kv_type="f32", contexts=[300])
        case.queries[0] *= np.float32(q_scale)
        case.keys[0] = np.abs(case.keys[0] * np.float32(k_scale))
        case.queries[0][-1] = -np.abs(case.queries[0][-1])  # every score of the last token is very negative
        case.fill()
        for parts in ([(0, 299, 300)], [(0, 290, 300)], [(0, 298, 299)]):
            got = case.attend(launch, parts)
            assert np.isfinite(got).all() and np.abs(got).max() <= np.abs(case.values[0]).max() * 1.00001


def test_attention_gives_back_the_only_value(launch):
    case = Sequences(heads=1, kv_heads=1, head_dim=512, kv_type="f16", contexts=[1])
    limits = np.float16([0, -0.0, 65504, 6e-8, 6.1e-5, 1 + 2 ** -10])
    case.values[0][0, 0, :6] = limits
    case.fill()
    assert np.array_equal(case.attend(launch, [(0, 0, 1)])[0, 0], case.values[0][0, 0].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kv_type", ["f16", "f32"])
@pytest.mark.parametrize("head_dim,rotary_dim", [(64, 64), (96, 96), (128, 128), (128, 64), (256, 256), (8, 2), (512, 510)])
@pytest.mark.parametrize("with_norm", [True, False], ids=["qk_norm", "no_norm"])
def test_qk_norm_rope_cache_writes_queries_keys_and_values(launch, head_dim, rotary_dim, kv_type, with_norm):
    heads, kv_heads, tokens, eps = 4, 2, 21, np.float32(1e-6)
    kv = PagedKv(kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type, contexts=[40], layers=2, layer=1)
    positions = np.sort(np.random.default_rng(1).permutation(262144)[:tokens])
    cos, sin = rope_cos_sin(positions, rotary_dim, 1e6)
    qkv = random_rows(tokens + 1, (heads + 2 * kv_heads) * head_dim, 3, 1.2)
    weights = [1 + 0.1 * random_rows(1, head_dim, seed)[0] for seed in (5, 6)]
    places = np.arange(19, 19 + tokens)  # starts inside a block
    slots = np.array([kv.tables[0][p // 16] * 16 + p % 16 for p in places], dtype=np.int32)
    out = np.full((tokens + 1, heads, head_dim), UNTOUCHED, dtype=np.float32)
    args = struct.pack("iiiiiifii", heads, kv_heads, head_dim, rotary_dim, with_norm, with_norm, eps, 1, kv.blocks)
    launch("qk_norm_rope_cache", f"qk_norm_rope_cache_{kv_type}", args,
           [qkv, *weights, np.hstack([cos, sin]).astype(np.float32), slots, count_of(tokens), kv.keys, kv.values, out], (-(-(heads + 2 * kv_heads) // 4) + 1, tokens + 1, 1), 128)
    assert (out[-1] == UNTOUCHED).all()
    parts = qkv[:-1].reshape(tokens, -1, head_dim).astype(np.float64)
    q_weight, k_weight = (w.astype(np.float64) if with_norm else None for w in weights)
    queries = qk_norm_rope(parts[:, :heads], q_weight, cos, sin, float(eps))
    keys = qk_norm_rope(parts[:, heads:heads + kv_heads], k_weight, cos, sin, float(eps))
    values = parts[:, heads + kv_heads:]
    tolerance = (head_dim / 32 + 10) * EPS * np.abs(queries).max()
    assert_close(out[:-1], queries, tolerance)
    expected_keys, expected_values = np.full_like(kv.keys, np.nan), np.full_like(kv.values, np.nan)
    for t, slot in enumerate(slots):
        expected_keys[1, slot // 16, :, :, slot % 16] = keys[t].reshape(kv_heads, -1, 8)
        expected_values[1, slot // 16, :, slot % 16] = values[t]
    assert np.array_equal(np.isnan(kv.keys), np.isnan(expected_keys)) and np.array_equal(kv.values, expected_values, equal_nan=True)
    written = ~np.isnan(kv.keys)
    rounding = 2 ** -10 * np.abs(expected_keys[written].astype(np.float64)) + 2 ** -24 if kv_type == "f16" else 0
    assert_close(kv.keys[written], expected_keys[written].astype(np.float64), (head_dim / 32 + 10) * EPS * np.abs(keys).max() + rounding)


# route

def routed(launch, logits=None, *, x=None, router=None, kind=0, row_bytes=None, top_k, normalize=True, one_dispatch=True, pass_rows=4):
    """(ids, weights, start, pairs, tiles) of logits, or of x and the raw bytes of a router of ggml type `kind`."""
    if x is None:
        x, router = logits.astype(np.float32), np.eye(logits.shape[1], dtype=np.float32)
    rows, experts, cols = len(x), len(router), x.shape[1]
    row_bytes = 4 * cols if row_bytes is None else row_bytes
    ids, weights = np.full((rows + 1, top_k), -7, dtype=np.int32), np.full((rows + 1, top_k), UNTOUCHED, dtype=np.float32)
    start, pairs = np.full(experts + 2, -7, dtype=np.int32), np.full(rows * top_k + 1, -7, dtype=np.int32)
    most = min(rows * top_k, rows * top_k // 32 + experts)
    tiles, tile_count = np.full((most + 1, 2), -7, dtype=np.int32), np.full(1, -7, dtype=np.int32)
    args = struct.pack("iiiIi", cols, experts, top_k, row_bytes, normalize)
    padded = -(-experts // 32) * 32
    memory = 4 * max(4 * padded, max(padded, 512) + padded)
    constants = {"weight_type_0": kind, "weight_type_1": -1, "weight_type_2": -1}
    name, grid = ("route_and_group", 1) if one_dispatch else ("route", -(-rows // pass_rows) + 1)
    launch("route", f"{name}_r{pass_rows}", args, [np.ascontiguousarray(router), x, count_of(rows), ids, weights, start, pairs, tiles, tile_count], (grid, 1, 1), 512,
           threadgroup_bytes=memory, constants=constants)
    if not one_dispatch:
        assert (start == -7).all() and (pairs == -7).all() and (tiles == -7).all() and tile_count[0] == -7
        launch("route", "route_group", args, [ids, count_of(rows), start, pairs, tiles, tile_count], (1, 1, 1), 512, threadgroup_bytes=memory)
    assert (ids[-1] == -7).all() and (weights[-1] == UNTOUCHED).all() and start[-1] == -7 and pairs[-1] == -7
    assert 0 <= tile_count[0] <= most and (tiles[tile_count[0]:] == -7).all()
    check_grouping(ids[:-1], start[:-1], pairs[:-1], tiles[:tile_count[0]], experts)
    return ids[:-1], weights[:-1]


def check_grouping(ids, start, pairs, tiles, experts):
    """Each pair once, expert by expert, each expert's by rising pair; tiles of up to 32 pairs of one expert, in order."""
    flat = ids.ravel()
    assert same_bits(start, np.searchsorted(np.sort(flat), np.arange(experts + 1)).astype(np.int32))
    assert same_bits(pairs, np.argsort(flat, kind="stable").astype(np.int32))
    expected = [(e, first) for e in range(experts) for first in range(start[e], start[e + 1], 32)]
    assert tiles.tolist() == [list(tile) for tile in expected]


@pytest.mark.parametrize("experts,top_k", [(1, 1), (2, 1), (8, 8), (31, 3), (33, 5), (60, 4), (128, 8), (256, 32), (257, 2)])
def test_route_takes_the_largest_and_groups_every_pair(launch, experts, top_k):
    rng = np.random.default_rng(experts)
    for rows, one_dispatch, pass_rows in ((1, True, 1), (1, False, 1), (3, True, 4), (17, False, 4), (33, True, 4)) if not launch.checked else ((5, True, 4), (6, False, 4)):
        logits = np.array([rng.permutation(experts) for _ in range(rows)]).astype(np.float32) * np.float32(0.0625)
        for normalize in (True, False):
            ids, weights = routed(launch, logits, top_k=top_k, normalize=normalize, one_dispatch=one_dispatch, pass_rows=pass_rows)
            expected_ids, expected = route(logits.astype(np.float64), np.eye(experts), top_k, normalize)
            assert same_bits(ids, expected_ids.astype(np.int32))
            assert_close(weights, expected, (experts / 8 + 16) * EPS * expected)


def test_route_of_the_most_experts_and_of_few(launch):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, 1024)).astype(np.float32)
    ids, weights = routed(launch, logits, top_k=64, one_dispatch=False)
    assert same_bits(ids, route(logits.astype(np.float64), np.eye(1024), 64)[0].astype(np.int32))


@pytest.mark.parametrize("skew", ["one", "some"])
def test_route_groups_skewed_experts_into_full_tiles(launch, skew):
    """Everyone's first choice is expert 5, and most experts stay empty."""
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((70, 16)).astype(np.float32)
    logits[:, 5] = 9
    if skew == "some":
        logits[:, 8:] -= 20
    for one_dispatch in (True, False):
        ids, _ = routed(launch, logits, top_k=3, one_dispatch=one_dispatch)
        assert (ids[:, 0] == 5).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *BLOCK_OF])
def test_route_multiplies_with_a_router_of_any_type(launch, kind):
    gguf = pytest.importorskip("gguf")
    from reference import dequantize
    from tiny_models import random_tensor

    experts, top_k = 50, 6
    for cols in (BLOCK_OF[kind], 2 * BLOCK_OF[kind]) if kind in BLOCK_OF else SIZES:
        raw = random_tensor(kind, (experts, cols), 0.3, np.random.default_rng(cols))
        values = dequantize(raw, kind).reshape(experts, cols)
        x = random_rows(9, cols, 7)
        raw = np.ascontiguousarray(raw).view(np.uint8).reshape(experts, -1)
        options = {"router": raw, "kind": int(gguf.GGMLQuantizationType[kind]), "row_bytes": raw.shape[1], "top_k": top_k, "normalize": False}
        ids, weights = routed(launch, x=x, **options)
        probabilities = softmax(x.astype(np.float64) @ values.T)
        error = 1e-5 * (np.abs(x.astype(np.float64)) @ np.abs(values).T).max() + 1e-6
        chosen = np.take_along_axis(probabilities, ids, axis=-1)
        assert_close(weights, chosen, 2 * error * chosen)
        assert_close(weights, np.sort(probabilities, axis=-1)[:, ::-1][:, :top_k], 2 * error * chosen)
        for row in (0, 8):
            alone = routed(launch, x=x[row:row + 1], pass_rows=1, one_dispatch=row == 0, **options)
            assert same_bits(alone[0][0], ids[row]) and same_bits(alone[1][0], weights[row])


def test_route_breaks_ties_by_the_lowest_expert(launch):
    logits = np.zeros((5, 64), dtype=np.float32)
    logits[1, [3, 40]] = 1
    logits[2] = np.arange(64) // 8 % 2
    logits[3, 63] = -1
    logits[4, :60] = -1e30
    ids, _ = routed(launch, logits, top_k=6)
    assert same_bits(ids, route(logits.astype(np.float64), np.eye(64), 6)[0].astype(np.int32))


def test_route_of_nan_gives_different_experts_and_leaves_other_rows(launch):
    for experts, top_k in ((1, 1), (8, 3), (128, 8), (256, 32)):
        x = random_rows(4, experts, 5)
        clean = routed(launch, x, top_k=top_k)
        x[1] = np.nan
        x[2, -1] = np.nan
        ids, weights = routed(launch, x, top_k=top_k)
        assert all(len(set(row)) == top_k and min(row) >= 0 and max(row) < experts for row in ids.tolist())
        assert same_bits(ids[[0, 3]], clean[0][[0, 3]]) and same_bits(weights[[0, 3]], clean[1][[0, 3]])
        assert np.isnan(weights[[1, 2]]).all()


@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_route_of_large_logits_has_no_nan(launch, size):
    logits = np.zeros((3, 32), dtype=np.float32)
    logits[0, 7], logits[1], logits[2, ::2] = size, -size, -size
    ids, weights = routed(launch, logits, top_k=4)
    assert np.isfinite(weights).all() and ids[0, 0] == 7
    assert_close(weights.sum(axis=-1), np.ones(3), 8 * EPS)


# gather_rows and blocks

def test_gather_rows_copies_the_rows(launch):
    for words in (*SIZES, 1024, 1025):
        x = random_rows(9, words)
        for rows in ([0], [8], [0, 3, 8], list(range(9))):
            out = np.full((len(rows) + 1, words), UNTOUCHED, dtype=np.float32)
            launch("gather_rows", "gather_rows", struct.pack("i", words), [x, np.array(rows, dtype=np.int32), count_of(len(rows)), out],
                   (-(-words // 1024), len(rows) + 1, 1), 256)
            assert same_bits(out[:-1], x[rows]) and (out[-1] == UNTOUCHED).all()


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_blocks_are_copied_and_poisoned_in_every_layer(launch, kind):
    layers, blocks, elements = 3, 7, 2 * 16 * 40
    rng = np.random.default_rng(1)
    keys, values = (rng.standard_normal((layers, blocks, elements)).astype(kind) for _ in range(2))
    expected = [x.copy() for x in (keys, values)]
    args = struct.pack("ii", blocks, elements * keys.itemsize // 4)
    launch("kv_blocks", "copy_kv_blocks", args, [keys, values, np.array([[0, 6], [3, 1]], dtype=np.int32)], (2, layers, 1), 256)
    for x in expected:
        x[:, 6], x[:, 1] = x[:, 0], x[:, 3]
    assert same_bits(keys, expected[0]) and same_bits(values, expected[1])
    launch("kv_blocks", "poison_kv_blocks", args, [keys, values, np.array([5, 0], dtype=np.int32)], (2, layers, 1), 256)
    for x, clean in zip((keys, values), expected):
        assert np.isnan(x[:, [0, 5]]).all() and same_bits(x[:, [1, 2, 3, 4, 6]], clean[:, [1, 2, 3, 4, 6]])


# top_candidates

def log_sum_exp_of(sums, temperature):
    """What the host makes of a row's sums [chunks, 4]."""
    sums = sums.astype(np.float64)
    numbers = sums[sums[:, 3] > 0]
    if not len(numbers):
        return -np.inf, -np.inf
    largest = numbers[:, 0].max()
    used = sums[sums[:, 1] != 0]
    plain, scaled = ((used[:, 1 + i] * np.exp((used[:, 0] - largest) / t)).sum() for i, t in ((0, 1), (1, temperature)))
    return largest + np.log(plain), largest / temperature + np.log(scaled)


def top_candidates(launch, logits, n, *, excluded=(), edits=(), targets=None, temperatures=None, segment=4096, filter_most=256):
    """(ids, values, log-sum-exp, the same at the temperature, target logits)"""
    before, logits = logits, logits.copy()
    rows, vocab = logits.shape
    bits = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for i in excluded:
        bits[i // 32] |= np.uint32(1 << i % 32)
    temperatures = np.array([1.0] * rows if temperatures is None else temperatures, dtype=np.float32)
    packed = b"".join(struct.pack("iiff", *edit) for edit in sorted(edits, key=lambda edit: edit[:2]))  # stable
    edit_array, saved = np.frombuffer(packed, dtype=np.uint8).copy(), np.full(max(1, len(edits)), np.nan, dtype=np.float32)
    segments = 1 if n > filter_most else -(-vocab // segment)
    args = lambda items=0: struct.pack("iiii", vocab, n, segments, items)
    file = "top_candidates"
    if edits:
        launch(file, "top_candidates_edit", args(len(edits)), [edit_array, logits, saved], (-(-len(edits) // 256), 1, 1), 256)
    target_logits = None
    if targets is not None:
        target_rows = np.concatenate([np.full(len(ids), row) for row, ids in enumerate(targets)]).astype(np.int32)
        target_ids = np.concatenate(targets).astype(np.int32)
        target_logits = np.full(len(target_ids), np.nan, dtype=np.float32)
        launch(file, "top_candidates_targets", args(len(target_ids)), [target_rows, target_ids, logits, target_logits], (1, 1, 1), 256)
    chunks = -(-vocab // 8192)
    sums = np.full((rows, chunks, 4), np.nan, dtype=np.float32)
    launch(file, "top_candidates_sums", args(), [logits, bits, temperatures, sums], (chunks, rows, 1), 256, threadgroup_bytes=256)
    ids, values = np.full((rows, n), -7, dtype=np.int32), np.full((rows, n), UNTOUCHED, dtype=np.float32)
    memory = 2048 + 8 * 1024
    if segments > 1:
        keys, key_ids = np.full((rows, segments, n), 0xdddddddd, dtype=np.uint32), np.full((rows, segments, n), -7, dtype=np.int32)
        launch(file, "top_candidates_filter", args(), [logits, bits, keys, key_ids], (segments, rows, 1), 512, threadgroup_bytes=memory)
        launch(file, "top_candidates_merge", args(), [keys, key_ids, logits, values, ids], (rows, 1, 1), 512, threadgroup_bytes=memory)
    else:
        launch(file, "top_candidates_select", args(), [logits, bits, values, ids], (rows, 1, 1), 512, threadgroup_bytes=memory)
    if edits:
        launch(file, "top_candidates_restore", args(len(edits)), [edit_array, logits, saved], (-(-len(edits) // 256), 1, 1), 256)
    assert same_bits(logits, before)
    plain, scaled = zip(*(log_sum_exp_of(sums[row], float(temperatures[row])) for row in range(rows)))
    return ids, values, np.array(plain), np.array(scaled), target_logits


def check_candidates(launch, logits, n, *, excluded=(), edits=(), targets=None, temperatures=None):
    ids, values, plain, scaled, target_logits = top_candidates(launch, logits, n, excluded=excluded, edits=edits, targets=targets, temperatures=temperatures)
    visible = logits.copy()
    for row, token, penalty, bias in edits:
        value, penalty, bias = visible[row, token], np.float32(penalty), np.float32(bias)
        visible[row, token] = (value / penalty if value > 0 else value * penalty) + bias
    if targets is not None:
        assert same_bits(target_logits, np.concatenate([visible[row, list(chosen)] for row, chosen in enumerate(targets)]))
    visible[:, list(excluded)] = -np.inf
    order = visible.astype(np.float64)
    order[:, list(excluded)] = np.nan  # sorted last: never chosen
    expected = np.argsort(-order, axis=-1, kind="stable")[:, :n]
    assert same_bits(ids, expected.astype(np.int32))
    assert same_bits(values, np.take_along_axis(visible, expected, axis=-1))
    temperatures = np.ones(len(logits)) if temperatures is None else np.float32(temperatures).astype(np.float64)
    for sums, scaled_logits in ((plain, visible.astype(np.float64)), (scaled, visible / temperatures[:, None])):
        expected_sums = log_sum_exp(scaled_logits)
        assert_close(sums, expected_sums, 2e-6 + 1e-7 * np.abs(expected_sums))


@pytest.mark.parametrize("vocab", [*SIZES, 4096, 4097, 9001])
def test_top_candidates_equal_a_full_sort(launch, vocab):
    """With the filter and without, lists that fit in threadgroup memory and lists that do not."""
    if launch.checked and vocab > 5000:
        pytest.skip("the checks are slow, and smaller sizes take every path")
    for rows in (1, 3):
        logits = random_rows(rows, vocab, vocab, 4.0)
        for n in sorted({1, min(5, vocab), min(64, vocab), min(256, vocab), min(257, vocab), min(1025, vocab), vocab}):
            if n <= 257 or rows == 1:
                check_candidates(launch, logits, n)
        check_candidates(launch, logits, min(8, vocab), temperatures=[0.3, 1.0, 7.5][:rows])


def test_top_candidates_order_ties_by_id(launch):
    logits = np.round(random_rows(2, 5000, 5, 1.5))
    logits[0, 4090:4100] = 77
    logits[1, [3, 4999, 17]] = 0.0, -0.0, 0.0
    for n in (1, 5, 17, 200, 400) if not launch.checked else (7, 300):
        check_candidates(launch, logits, n)
    zeros = np.copysign(np.float32(0), random_rows(2, 300))
    check_candidates(launch, zeros, 300)
    check_candidates(launch, zeros, 100)


def test_top_candidates_after_edits_without_the_excluded(launch):
    logits = random_rows(3, 500, 6, 3.0)
    largest = np.argsort(-logits[0])[:3]
    edits = [(0, int(largest[0]), 1.3, -100.0), (0, int(largest[1]), 2.0, 0.0), (2, 7, 1.0, 50.0), (2, 7, 1.5, 0.25), (1, 499, 1.0, -np.inf), (2, 7, 1.1, -0.5)]
    edits += [(1, i, 1.7, 0.125) for i in range(300)]
    targets = [[int(largest[0]), 499], [499], [7, 7, 0]]
    check_candidates(launch, logits, 20, edits=edits, targets=targets, excluded=list(range(490, 500)), temperatures=[0.5, 2.0, 1.0])
    check_candidates(launch, logits, 490, edits=edits, excluded=list(range(490, 500)))
    check_candidates(launch, logits, 400, excluded=list(range(300, 400)))


def test_top_candidates_of_rows_with_minus_infinity(launch):
    for vocab in (100, 4200):
        logits = np.full((2, vocab), -np.inf, dtype=np.float32)
        logits[0, [50, 3, 77]] = 1, 2, 2
        logits[1, 99] = -1e30
        check_candidates(launch, logits, 10, excluded=[0, 98])
        check_candidates(launch, logits, 98, excluded=[0, 98])


def test_top_candidates_where_nothing_can_be_chosen(launch):
    ids, values, plain, scaled, _ = top_candidates(launch, np.full((1, 40), -np.inf, dtype=np.float32), 5, excluded=[1], temperatures=[0.5])
    assert ids.tolist() == [[0, 2, 3, 4, 5]] and (values == -np.inf).all() and plain[0] == scaled[0] == -np.inf


def test_top_candidates_of_nan_are_valid_ids(launch):
    logits = random_rows(2, 64)
    logits[0, :60] = np.nan
    logits[1] = np.nan
    ids, values, plain, *_ = top_candidates(launch, logits, 10, excluded=[63])
    assert all(len(set(row)) == 10 and 63 not in row and max(row) < 64 and min(row) >= 0 for row in ids.tolist())
    assert set(ids[0, :3].tolist()) == {60, 61, 62} and ids[0, 3:].tolist() == list(range(7)) and (values[0, 3:] == -np.inf).all()
    assert np.isnan(plain[0]) and plain[1] == -np.inf


def test_top_candidates_of_large_logits(launch):
    logits = random_rows(2, 300, 8)
    logits[0, 5], logits[1] = 1e4, logits[1] - np.float32(1e4)
    check_candidates(launch, logits, 12, temperatures=[0.05, 0.05])


def test_top_candidates_of_a_whole_vocabulary():
    seeds = iter(range(1, 100))
    plain = lambda file, kernel, args, arrays, grid, threads, **o: metal_runner.run(f"metal_src/{file}.metal", kernel, args, arrays, grid, (threads, 1, 1), seed=next(seeds), **o)
    logits = random_rows(1, 151936, 9, 3.0)
    for n in (1, 64, 1000, 151900):
        check_candidates(plain, logits, n, excluded=list(range(151900, 151936)))
