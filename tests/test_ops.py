"""Every op of `core/backend.h`, on every backend, against float64 numpy at sizes around the vector width.

Bits: one row or many, one thread or two, and on the CPU one instruction set or another give equal bits; where that is the claim, arrays are
compared with `same_bits`. Elsewhere tolerances follow from the sizes of the summands and float32's epsilon.
"""
import os

import gguf
import numpy as np
import pytest
from reference import (BLOCK_OF, as_quantized, as_stored, attention, dequantize, dot_quantized, expand, experts_down, experts_gate_up, log_sum_exp, qk_norm_rope,
                       quantize_activations, rms_normalise, rope_cos_sin, route, silu, softmax, top_candidates)
from tiny_models import random_tensor, set_block_scale

from ferrum.errors import DeviceError
from ferrum_native import _native

EPS = float(np.finfo(np.float32).eps)
KV_TYPES = ("f16", "f32", "q8_0")
MATMUL_TOLERANCE = 1e-5  # of the sum of the products' magnitudes
FLOAT_SUMS_TOLERANCE = 1e-6  # of a log-sum-exp whose exponentials are float32
TYPES = {kind: int(gguf.GGMLQuantizationType[kind]) for kind in ("F32", "F16", "BF16", *BLOCK_OF)}
COLS = {kind: (BLOCK_OF[kind], 2 * BLOCK_OF[kind], 3 * BLOCK_OF[kind]) if kind in BLOCK_OF else (1, 31, 32, 33, 257) for kind in TYPES}
ROWS = (1, 3, 16, 17, 33)
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
VECTORS = ("avx512", "avx2", "neon-i8mm", "neon-dotprod", "neon")  # instruction sets that some machines lack, the best first


def make_runner(device, instruction_set, **options):
    """FERRUM_TEST_KERNELS names other Metal kernels than the installed ones, such as a build with checks."""
    if device == "metal":
        options["kernels"] = os.environ.get("FERRUM_TEST_KERNELS")
    try:
        return _native.OpRunner(device, instruction_set=instruction_set, **options)
    except DeviceError as error:
        pytest.skip(str(error))
    except ValueError as error:
        if instruction_set not in VECTORS:
            raise
        pytest.skip(f"this machine lacks {instruction_set}: {error}")


class Backend:
    """Makes OpRunners of one backend: backend(threads=.., activations=..).

    `packs`: it has int8 activations; else its activations are float32 in either mode. `exact`: a row has the bits that it has alone.
    """

    def __init__(self, device, instruction_set=None):
        self.device, self.instruction_set = device, instruction_set
        self.packs = self.exact = device == "cpu"

    def __call__(self, **options):
        return make_runner(self.device, self.instruction_set, **options)

    @property
    def activations(self):
        return "int8" if self.packs else "float32"

    def alike(self, got, expected, size=None):
        """Equal bits; where the order of additions depends on the number of rows, near by MATMUL_TOLERANCE of `size` or of the largest value."""
        if self.exact:
            return same_bits(got, expected)
        size = np.abs(expected).max(initial=0) if size is None else size
        return got.shape == expected.shape and bool((np.abs(got - expected) <= MATMUL_TOLERANCE * size).all())


BACKENDS = {f"cpu-{name}": Backend("cpu", name) for name in (*VECTORS, "scalar")} | {"metal": Backend("metal")}


@pytest.fixture(params=BACKENDS)
def backend(request):
    chosen, test = BACKENDS[request.param], getattr(request.node, "callspec", None)
    if chosen.device == "metal" and (test.params.get("threads") == 2 or test.params.get("activations") == "int8"):
        pytest.skip("Metal has no threads, and one kind of activations")
    if chosen.device == "metal" and test is not None and test.params.get("kv_type") == "q8_0":
        pytest.skip("Metal keeps no keys and values in q8_0")
    return chosen


def same_bits(a, b):
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_close(got, expected, tolerance, what=""):
    """Every |got - expected| is within its own tolerance, and nothing is NaN."""
    assert np.shape(got) == np.shape(expected)
    excess = np.abs(np.asarray(got, dtype=np.float64) - expected) / np.maximum(tolerance, 1e-300)
    assert not np.isnan(excess).any(), f"{what}: NaN at {np.argwhere(np.isnan(excess))[0]}"
    assert excess.max(initial=0) <= 1, f"{what}: {excess.max():.3g} times the tolerance at {np.unravel_index(excess.argmax(), excess.shape)}"


class WeightCase:
    """A random weight: its raw rows, the float64 values they stand for, and where a runner placed it."""

    def __init__(self, runner, kind, shape, seed=0, std=None):
        self.kind, self.shape = kind, shape
        self.raw = random_tensor(kind, shape, shape[-1] ** -0.5 if std is None else std, np.random.default_rng(seed))
        self.values = dequantize(self.raw, kind).reshape(shape)
        self.placed = runner.place_weight(self.raw, TYPES[kind], shape)

    def rows(self, runner, count):
        return runner.place_weight(self.raw[:count], TYPES[self.kind], (count, self.shape[-1]))


def float_weight(runner, values):
    values = np.asarray(values, dtype=np.float32)
    return runner.place_weight(values, TYPES["F32"], values.shape if values.ndim > 1 else (1, values.size))


def seen(x, kind, activations):
    """The float64 activations that weights of `kind` meet."""
    if activations == "float32" or kind not in BLOCK_OF:
        return np.asarray(x, dtype=np.float64)
    return as_quantized(x, kind)


def product(x, values, kind, activations):
    """(x by the weight in float64 on what the backend sees, sums of the products' magnitudes)"""
    x = seen(x, kind, activations)
    return x @ values.T, np.abs(x) @ np.abs(values).T


def random_rows(rows, cols, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) * scale).astype(np.float32)


# embed

@pytest.mark.parametrize("kind", TYPES)
def test_embed_gives_the_rows_of_the_table(backend, kind):
    runner = backend()
    for cols in COLS[kind]:
        table = WeightCase(runner, kind, (37, cols))
        ids = [36, 0, 5, 5, 17]
        got = runner.embed(table.placed, ids)
        if BLOCK_OF.get(kind) != 256:
            assert same_bits(got, table.values.astype(np.float32)[ids])
            continue
        products, offsets = expand(np.ascontiguousarray(table.raw[ids]).reshape(len(ids), cols // 256, -1), kind)
        assert_close(got, (products - offsets).reshape(got.shape), 2 * EPS * (np.abs(products) + np.abs(offsets)).reshape(got.shape))


# norm

@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_delta", [False, True], ids=["plain", "delta"])
def test_norm_adds_the_delta_and_normalises(backend, threads, with_delta):
    runner = backend(threads=threads)
    for cols in (1, 7, 8, 31, 32, 33, 257, 2048):
        for rows in (1, 3, 17, 33):
            residual, weight = random_rows(rows, cols, 1, 3.0), random_rows(1, cols, 2)[0]
            delta = random_rows(rows, cols, 3) if with_delta else None
            new_residual, out = runner.norm(residual, float_weight(runner, weight), 1e-6, delta)
            assert same_bits(new_residual, residual + delta if with_delta else residual)
            expected = rms_normalise(new_residual.astype(np.float64), weight.astype(np.float64), np.float64(np.float32(1e-6)))
            assert_close(out.values(), expected, (cols / 32 + 8) * EPS * np.abs(expected) + 1e-37, f"{rows} x {cols}")


def test_norm_of_one_row_has_the_bits_of_the_row_among_many(backend):
    for cols in (1, 33, 257, 2048):
        residual, delta, weight = random_rows(33, cols, 1), random_rows(33, cols, 2), random_rows(1, cols, 3)[0]
        one, two = backend(), backend(threads=2)
        together = two.norm(residual, float_weight(two, weight), 1e-6, delta)[1].values()
        for row in (0, 7, 32):
            alone = one.norm(residual[row:row + 1], float_weight(one, weight), 1e-6, delta[row:row + 1])[1].values()
            assert same_bits(alone[0], together[row])


def test_norm_keeps_a_nan_in_its_row(backend):
    runner = backend()
    residual = random_rows(3, 64)
    clean = runner.norm(residual, float_weight(runner, np.ones(64)), 1e-6)[1].values()
    residual[1, 5] = np.nan
    got = runner.norm(residual, float_weight(runner, np.ones(64)), 1e-6)[1].values()
    assert same_bits(got[[0, 2]], clean[[0, 2]]) and np.isnan(got[1]).all()


@pytest.mark.parametrize("scale", [1e-18, 1e4, 1e15])
def test_norm_of_small_and_large_rows_is_finite(backend, scale):
    runner = backend()
    got = runner.norm(random_rows(2, 257, scale=scale), float_weight(runner, np.ones(257)), 1e-6)[1].values()
    assert np.isfinite(got).all()
    assert not runner.norm(np.zeros((1, 257)), float_weight(runner, np.ones(257)), 1e-6)[1].values().any()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_every_producer_packs_what_its_floats_say(backend, kind, activations):
    """norm, attention, experts_gate_up and gather_rows fill the packed forms as `activation` does from their float values."""
    runner = backend(activations=activations)
    cols = 256
    weight = WeightCase(runner, kind, (19, cols)).placed
    rows = random_rows(5, cols)

    def packed_alike(out):
        assert same_bits(runner.linear(out, [weight]), runner.linear(out.values(), [weight]))

    normed = runner.norm(rows, float_weight(runner, np.ones(cols)), 1e-6, consumers=[weight])[1]
    packed_alike(normed)
    packed_alike(runner.gather_rows(normed, [1, 4], consumers=[weight]))
    paged = Paged(runner, heads=4, kv_heads=2, head_dim=64, kv_type="f32", contexts=[5])
    paged.write([(0, 0, 5)])
    packed_alike(paged.attend([(0, 0, 5)], consumers=[weight])[0])
    gate = WeightCase(runner, kind, (3, cols, cols))
    routing = runner.route(rows[:, :3], float_weight(runner, np.eye(3)), 2)
    packed_alike(runner.experts_gate_up(rows, routing, gate.placed, gate.placed, consumers=[weight]))


# linear

@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("kind", TYPES)
def test_linear_of_any_rows_and_columns(backend, kind, activations, threads):
    runner = backend(threads=threads, activations=activations)
    for cols in COLS[kind]:
        weight = WeightCase(runner, kind, (max(ROWS), cols), seed=cols)
        x = random_rows(max(COLUMNS), cols, seed=cols + 1)
        full = runner.linear(x, [weight.placed])
        expected, size = product(x, weight.values, kind, activations)
        assert_close(full, expected, MATMUL_TOLERANCE * size, f"{kind} k={cols}")
        for rows in ROWS:
            part = weight.rows(runner, rows)
            for columns in COLUMNS:
                assert backend.alike(runner.linear(x[:columns], [part]), full[:columns, :rows], size[:columns, :rows]), f"{kind} k={cols}: {rows} rows, {columns} columns"


@pytest.mark.parametrize("kind", BLOCK_OF)
def test_linear_is_exact_up_to_float_sums_on_packed_activations(backend, kind):
    """Within a block everything is an integer, so the only roundings are those of one chain of block sums."""
    if not backend.packs:
        pytest.skip("float activations only")
    runner = backend()
    weight = WeightCase(runner, kind, (33, 768), seed=4)
    x = random_rows(9, 768, seed=5, scale=3.0)
    q, d = quantize_activations(x, kind)
    expected = dot_quantized(weight.raw.reshape(33, -1), kind, q, d)
    size = product(x, weight.values, kind, "int8")[1]
    assert_close(runner.linear(x, [weight.placed]), expected, 2e-6 * size)


@pytest.mark.parametrize("kind", TYPES)
def test_linear_of_more_columns_than_one_tile_holds(backend, kind):
    runner = backend(threads=2)
    weight = WeightCase(runner, kind, (40, 256))
    x = random_rows(300, 256)
    full = runner.linear(x, [weight.placed])
    expected, size = product(x, weight.values, kind, backend.activations)
    assert_close(full, expected, MATMUL_TOLERANCE * size)
    assert backend.alike(runner.linear(x[290:291], [weight.placed])[0], full[290])


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_linear_puts_weights_of_different_types_side_by_side(backend, activations):
    runner = backend(threads=2, activations=activations)
    x = random_rows(5, 512)
    for kinds in (("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "F32", "Q4_K"), ("F16", "BF16"), ("Q6_K", "Q8_0"), ("Q5_K", "Q5_K", "Q6_K"), ("Q3_K", "Q2_K", "Q5_K"), ("Q4_K", "Q5_0", "Q4_1"), ("IQ4_XS", "IQ4_NL", "Q5_K")):
        weights = [WeightCase(runner, kind, (rows, 512), seed=rows).placed for kind, rows in zip(kinds, (48, 17, 9))]
        assert same_bits(runner.linear(x, weights), np.hstack([runner.linear(x, [weight]) for weight in weights])), kinds


@pytest.mark.parametrize("kind", BLOCK_OF)
def test_linear_of_extreme_activations(backend, kind):
    """Blocks of zeros, one spike, the largest int8 products of both signs, large and tiny values."""
    runner = backend()
    weight = WeightCase(runner, kind, (17, 512))
    x = np.zeros((7, 512), dtype=np.float32)
    x[1, 300] = 5.0
    x[2] = 1e4
    x[3] = np.where(weight.values[0] > 0, 1e4, -1e4)
    x[4] = 1e-30 * random_rows(1, 512)[0]
    x[5, :256] = random_rows(1, 256)[0]
    x[6] = -x[3]
    got = runner.linear(x, [weight.placed])
    expected, size = product(x, weight.values, kind, backend.activations)
    assert not got[0].any()
    assert_close(got, expected, MATMUL_TOLERANCE * size + 1e-37)


@pytest.mark.parametrize("kind", BLOCK_OF)
def test_linear_of_blocks_with_every_field_at_its_limit(backend, kind):
    """The widest integers of the format: no product overflows its accumulator."""
    runner = backend()
    blocks = 3
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        raw = np.full((9, blocks, gguf.GGML_QUANT_SIZES[TYPES[kind]][1]), fill, dtype=np.uint8)
        set_block_scale(raw, kind, np.ones((9, blocks)), minimum_per_scale=1)
        raw = raw.reshape(9, -1)
        cols = blocks * BLOCK_OF[kind]
        for sign in (1, -1):
            x = np.full((9, cols), sign * 3.0, dtype=np.float32)
            got = runner.linear(x, [runner.place_weight(raw, TYPES[kind], (9, cols))])
            q, d = quantize_activations(x, kind)
            expected = dot_quantized(raw, kind, q, d)
            assert_close(got, expected, 1e-6 * np.abs(expected) + 1e-3, f"{kind} {fill:#x} {sign}")


# qk_norm_rope_cache and attention

class Paged:
    """Sequences in a shuffled paged cache full of NaN; `contexts` are the most tokens of each."""

    def __init__(self, runner, *, heads, kv_heads, head_dim, kv_type, contexts, layers=1, layer=0, seed=0, spare=3):
        self.runner, self.layer, self.kv_type = runner, layer, kv_type
        self.shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        rng = np.random.default_rng(seed)
        needed = [-(-context // 16) for context in contexts]
        order = rng.permutation(sum(needed) + spare).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.kv = runner.make_kv(layers=layers, blocks=sum(needed) + spare, kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type)
        runner.poison_kv_blocks(self.kv, range(sum(needed) + spare))
        self.qkv = [(rng.standard_normal((context, heads + 2 * kv_heads, head_dim)) * 1.2).astype(np.float32) for context in contexts]

    def batch(self, parts, cos_sin=None):
        """Of parts (sequence, begin, end): the tokens of each, and the table entries that they reach."""
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in parts])
        slots = [self.tables[s][p // 16] * 16 + p % 16 for s, begin, end in parts for p in range(begin, end)]
        lengths = [end for _, _, end in parts]
        if cos_sin is None:
            cos_sin = np.tile(np.array([1, 0], dtype=np.float32), (len(positions), 1))  # a rotation by nothing
        return _native.OpBatch(positions=positions.tolist(), kv_slots=slots, query_start=[0, *np.cumsum([end - begin for _, begin, end in parts]).tolist()],
                               context_length=lengths, block_tables=[self.tables[s][:-(-end // 16)] for s, _, end in parts], rope_cos_sin=cos_sin)

    def write(self, parts, cos_sin=None, rotary_dim=2, **norms):
        qkv = np.concatenate([self.qkv[s][begin:end] for s, begin, end in parts])
        return self.runner.qk_norm_rope_cache(self.batch(parts, cos_sin), qkv.reshape(len(qkv), -1), self.kv, rotary_dim=rotary_dim, layer=self.layer, **self.shape, **norms)

    def attend(self, parts, queries=None, **options):
        """(Activation of the parts' queries, expected values, tolerance); queries, keys and values as they were given to `write`."""
        N, G = self.shape["heads"], self.shape["kv_heads"]
        if queries is None:
            queries = np.concatenate([self.qkv[s][begin:end, :N] for s, begin, end in parts]).reshape(sum(end - begin for _, begin, end in parts), -1)
        out = self.runner.attention(self.batch(parts), queries, self.kv, layer=self.layer, **self.shape, **options)
        expected, tolerance, row = [], [], 0
        for s, begin, end in parts:
            q = queries[row:row + end - begin].reshape(end - begin, N, -1).astype(np.float64)
            keys, values = self.stored(self.qkv[s][:end, N:N + G]), self.stored(self.qkv[s][:end, N + G:])
            expected.append(attention(q, keys, values).reshape(end - begin, -1))
            tolerance.append(np.full((end - begin, 1), attention_tolerance(q, keys, values, self.kv_type)))
            row += end - begin
        return out, np.concatenate(expected), np.concatenate(tolerance)

    def stored(self, x):
        return as_stored(x, self.kv_type)


def attention_tolerance(queries, keys, values, kv_type):
    """Errors of the scores (a chain of head_dim products) turn into relative errors of the weights; then one chain over the keys.

    With q8_0, queries are off by at most 2^-16 of their largest, and each of 16 weights by 2^-16 of the largest of them.
    """
    head_dim = queries.shape[-1]
    score_size = np.abs(queries).max() * np.abs(keys).max() * head_dim ** 0.5
    score_error = score_size * (4 + head_dim ** 0.5) * EPS
    rounding = 2 * score_size * 2 ** -16 + 16 * 2 ** -16 if kv_type == "q8_0" else 0
    return (2 * score_error + 5e-7 + len(keys) / 16 * EPS + rounding) * np.abs(values).max()


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_attention_over_ragged_paged_sequences(backend, group, head_dim, kv_type):
    """Decode tokens and prompt chunks of contexts around the block of 16 and the split of 512 in one call."""
    runner = backend(threads=2)
    contexts = [1, 15, 16, 17, 511, 512, 513, 1200]
    kv_heads = 2 if group * head_dim <= 512 else 1
    paged = Paged(runner, heads=group * kv_heads, kv_heads=kv_heads, head_dim=head_dim, kv_type=kv_type, contexts=contexts, layers=2, layer=1)
    paged.write([(s, 0, context) for s, context in enumerate(contexts)])
    decodes = [(s, context - 1, context) for s, context in enumerate(contexts)]
    mixed = [(7, 1190, 1200), (0, 0, 1), (5, 505, 512), (3, 0, 17), (6, 512, 513), (2, 3, 13)]
    for parts in (decodes, mixed, decodes[::-1]):
        out, expected, tolerance = paged.attend(parts)
        assert_close(out.values(), expected, tolerance, str(parts))


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("group,head_dim", [(4, 64), (8, 128), (1, 96), (2, 256)])
def test_attention_of_a_token_does_not_depend_on_its_company(backend, group, head_dim, kv_type):
    """Alone, in a batch, as a decode or inside prompt chunks of any size, on one thread or two: equal bits."""
    contexts = [700, 33, 1200]
    paged = [Paged(backend(threads=threads), heads=group, kv_heads=1, head_dim=head_dim, kv_type=kv_type, contexts=contexts) for threads in (1, 2)]
    for case in paged:
        case.write([(s, 0, context) for s, context in enumerate(contexts)])
    one, two = paged
    whole = two.attend([(0, 660, 700), (1, 0, 33), (2, 1150, 1200)])[0].values()
    rows = [(0, p) for p in range(660, 700)] + [(1, p) for p in range(33)] + [(2, p) for p in range(1150, 1200)]
    for case in paged:
        for row in (0, 7, 8, 39, 40, 55, 72, 73, 100, 122):
            s, p = rows[row]
            assert backend.alike(case.attend([(s, p, p + 1)])[0].values()[0], whole[row]), rows[row]
    assert backend.alike(one.attend([(2, 1150, 1163), (0, 690, 700)])[0].values(), np.concatenate([whole[73:86], whole[30:40]]))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attention_reads_no_block_of_others(backend, kv_type):
    runner = backend()
    paged = Paged(runner, heads=4, kv_heads=2, head_dim=64, kv_type=kv_type, contexts=[40, 100, 17])
    everything = [(0, 0, 40), (1, 0, 100), (2, 0, 17)]
    paged.write(everything)
    whole = paged.attend(everything)[0].values()
    others = set(range(paged.kv.blocks)) - set(paged.tables[1])
    runner.poison_kv_blocks(paged.kv, sorted(others))
    assert same_bits(paged.attend([(1, 0, 100)])[0].values(), whole[40:140])
    runner.poison_kv_blocks(paged.kv, paged.tables[1][3:])
    assert same_bits(paged.attend([(1, 0, 48)])[0].values(), whole[40:88])
    assert np.isnan(paged.attend([(1, 0, 49)])[0].values()[48]).all()  # the canary does sing


@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_attention_of_large_scores_has_no_nan(backend, kv_type):
    runner = backend()
    for q_scale, k_scale in ((1e4, 1.0), (1e4, 1e4), (1e-4, 1e-4)):
        paged = Paged(runner, heads=2, kv_heads=1, head_dim=64, kv_type=kv_type, contexts=[530])
        paged.qkv[0][:, :2] *= q_scale
        paged.qkv[0][:, 2:3] *= k_scale
        paged.qkv[0][-1, :2] = -np.abs(paged.qkv[0][-1, :2])  # every score of the last token is very negative
        paged.qkv[0][:, 2:3] = np.abs(paged.qkv[0][:, 2:3])
        paged.write([(0, 0, 530)])
        got = paged.attend([(0, 520, 530)])[0].values()
        most = np.abs(paged.stored(paged.qkv[0][:, 3])).max() * (1.00001 if kv_type == "f32" else 1 + 16 * 2 ** -16)
        assert np.isfinite(got).all() and np.abs(got).max() <= most


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim,rotary_dim", [(64, 64), (96, 96), (128, 128), (128, 64), (256, 256), (8, 2)])
@pytest.mark.parametrize("with_norm", [True, False], ids=["qk_norm", "no_norm"])
def test_qk_norm_rope_cache_of_any_positions(backend, head_dim, rotary_dim, kv_type, with_norm):
    """Queries by their values; keys and values by what attention makes of them. Positions up to 262,143 come through the batch."""
    if kv_type == "q8_0" and head_dim % 32 != 0:
        pytest.skip("q8_0 is of groups of 32 dimensions")
    runner = backend()
    N, G, eps = 4, 2, 1e-6
    paged = Paged(runner, heads=N, kv_heads=G, head_dim=head_dim, kv_type=kv_type, contexts=[40])
    angles_at = np.sort(np.random.default_rng(1).permutation(262144)[:40])
    angles_at[[0, -1]] = 0, 262143
    cos, sin = rope_cos_sin(angles_at, rotary_dim, 1e6)
    weights = [1 + 0.1 * random_rows(1, head_dim, seed)[0] for seed in (5, 6)] if with_norm else [None, None]
    norms = {} if not with_norm else {"q_norm": float_weight(runner, weights[0]), "k_norm": float_weight(runner, weights[1])}
    # Two calls: a prompt chunk, then one that starts inside a block.
    q_out = np.concatenate([paged.write([(0, begin, end)], np.hstack([cos, sin])[begin:end].astype(np.float32), rotary_dim, eps=eps, **norms)
                            for begin, end in ((0, 21), (21, 40))])
    qkv = paged.qkv[0].astype(np.float64)
    queries = qk_norm_rope(qkv[:, :N], weights[0], cos, sin, eps)
    assert_close(q_out, queries.reshape(40, -1), (head_dim / 32 + 10) * EPS * np.abs(queries).max())
    keys = qk_norm_rope(qkv[:, N:N + G], weights[1], cos, sin, eps)
    values = qkv[:, N + G:]
    got = runner.attention(paged.batch([(0, 0, 40)]), q_out, paged.kv, **paged.shape).values()
    expected = attention(queries, paged.stored(keys), paged.stored(values)).reshape(40, -1)
    step = {"f16": 2 ** -11, "f32": 0, "q8_0": 1 / 127}[kv_type] * np.abs(keys).max()  # by which a key next to the middle of two is off
    rounding = step * np.abs(queries).max() * head_dim ** 0.5 * 0.1
    assert_close(got, expected, attention_tolerance(queries, keys, values, kv_type) + rounding * np.abs(values).max())


def test_qk_norm_rope_cache_of_one_token_has_the_bits_of_the_token_among_many(backend):
    many, one = (Paged(backend(threads=threads), heads=8, kv_heads=2, head_dim=128, kv_type="f16", contexts=[50, 60]) for threads in (2, 1))
    cos, sin = rope_cos_sin(np.arange(60), 128, 1e6)
    table = np.hstack([cos, sin]).astype(np.float32)
    norm = random_rows(1, 128)[0]
    together = many.write([(0, 0, 50), (1, 0, 60)], np.concatenate([table[:50], table]), 128, q_norm=float_weight(many.runner, norm))
    for s, length in ((0, 50), (1, 60)):
        for p in range(length):
            alone = one.write([(s, p, p + 1)], table[p:p + 1], 128, q_norm=float_weight(one.runner, norm))
            assert same_bits(alone[0], together[50 * s + p])
    parts = [(0, 0, 50), (1, 0, 60)]
    assert same_bits(one.attend(parts)[0].values(), many.attend(parts)[0].values())


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_copy_kv_blocks_copies_every_layer(backend, kv_type):
    runner = backend()
    cases = [Paged(runner, heads=2, kv_heads=2, head_dim=64, kv_type=kv_type, contexts=[32, 32], layers=3, layer=layer, seed=7) for layer in range(3)]
    for case in cases[1:]:
        case.kv = cases[0].kv
    for layer, case in enumerate(cases):
        case.qkv[0] = case.qkv[0] + np.float32(layer)
        case.write([(0, 0, 32)])
    originals = [case.attend([(0, 0, 32)])[0].values() for case in cases]
    runner.copy_kv_blocks(cases[0].kv, list(zip(cases[0].tables[0], cases[0].tables[1])))
    runner.poison_kv_blocks(cases[0].kv, cases[0].tables[0])
    for case, original in zip(cases, originals):
        case.qkv[1] = case.qkv[0]
        assert same_bits(case.attend([(1, 0, 32)])[0].values(), original)


# route

def check_grouping(ids, start, pairs, experts):
    """Each pair once, expert by expert, each expert's by rising pair."""
    flat = ids.ravel()
    assert same_bits(start, np.searchsorted(np.sort(flat), np.arange(experts + 1)).astype(np.int32))
    assert same_bits(pairs, np.argsort(flat, kind="stable").astype(np.int32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("experts,top_k", [(1, 1), (2, 1), (8, 2), (8, 8), (33, 5), (60, 4), (128, 8), (256, 32)])
def test_route_takes_the_largest_and_groups_every_pair(backend, experts, top_k, threads):
    runner = backend(threads=threads)
    rng = np.random.default_rng(experts)
    for rows in (1, 3, 17, 33):
        logits = np.array([rng.permutation(experts) for _ in range(rows)]).astype(np.float32) * np.float32(0.0625)
        expected_ids, _ = route(logits.astype(np.float64), np.eye(experts), top_k)
        for normalize in (True, False):
            ids, weights, start, pairs = runner.route(logits, float_weight(runner, np.eye(experts)), top_k, normalize).contents()
            assert same_bits(ids, expected_ids.astype(np.int32))
            expected = route(logits.astype(np.float64), np.eye(experts), top_k, normalize)[1]
            assert_close(weights, expected, (experts / 8 + 16) * EPS * expected)
            check_grouping(ids, start, pairs, experts)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_route_multiplies_with_a_router_of_any_type(backend, kind, activations):
    runner = backend(threads=2, activations=activations)
    cols, experts, top_k = 256, 48, 6
    router = WeightCase(runner, kind, (experts, cols), std=0.1)
    x = random_rows(20, cols)
    ids, weights, start, pairs = runner.route(x, router.placed, top_k, False).contents()
    probabilities = softmax(product(x, router.values, kind, activations)[0])
    chosen = np.take_along_axis(probabilities, ids, axis=-1)
    assert_close(weights, chosen, 1e-4 * chosen)
    assert_close(weights, np.sort(probabilities, axis=-1)[:, ::-1][:, :top_k], 1e-4 * chosen)
    check_grouping(ids, start, pairs, experts)
    for row in (0, 19):
        alone = runner.route(x[row:row + 1], router.placed, top_k, False).contents()
        assert same_bits(alone[0][0], ids[row]) and same_bits(alone[1][0], weights[row])


def test_route_breaks_ties_by_the_lowest_expert(backend):
    runner = backend()
    logits = np.zeros((4, 64), dtype=np.float32)
    logits[1, [3, 40]] = 1
    logits[2] = np.arange(64) // 8 % 2
    logits[3, 63] = -1
    ids = runner.route(logits, float_weight(runner, np.eye(64)), 6).contents()[0]
    assert same_bits(ids, route(logits.astype(np.float64), np.eye(64), 6)[0].astype(np.int32))


def test_route_of_nan_gives_different_experts_and_leaves_other_rows(backend):
    runner = backend()
    for experts, top_k in ((1, 1), (8, 3), (128, 8), (256, 32)):
        logits = random_rows(4, experts)
        clean = runner.route(logits, float_weight(runner, np.eye(experts)), top_k).contents()
        logits[1] = np.nan
        logits[2, -1] = np.nan
        ids, weights, start, pairs = runner.route(logits, float_weight(runner, np.eye(experts)), top_k).contents()
        assert all(len(set(row)) == top_k and min(row) >= 0 and max(row) < experts for row in ids.tolist())
        assert same_bits(ids[[0, 3]], clean[0][[0, 3]]) and same_bits(weights[[0, 3]], clean[1][[0, 3]])
        check_grouping(ids, start, pairs, experts)


@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_route_of_large_logits_has_no_nan(backend, size):
    runner = backend()
    logits = np.zeros((3, 32), dtype=np.float32)
    logits[0, 7], logits[1], logits[2, ::2] = size, -size, -size
    ids, weights, *_ = runner.route(logits, float_weight(runner, np.eye(32)), 4).contents()
    assert np.isfinite(weights).all() and ids[0, 0] == 7
    assert_close(weights.sum(axis=-1), np.ones(3), 8 * EPS)


# experts

def routed(runner, ids, experts):
    """A Routing to the given experts, in this order of k."""
    logits = np.full((len(ids), experts), -5.0, dtype=np.float32)
    for k in range(ids.shape[1]):
        logits[np.arange(len(ids)), ids[:, k]] = 1 - 0.25 * k
    routing = runner.route(logits, float_weight(runner, np.eye(experts)), ids.shape[1])
    assert same_bits(routing.contents()[0], ids.astype(np.int32))
    return routing


def expert_choices(rows, experts, top_k, skewed):
    """Random different experts; skewed: everyone's first choice is expert 1, and the last third stays empty."""
    rng = np.random.default_rng(rows + experts)
    if not skewed:
        return np.array([rng.permutation(experts)[:top_k] for _ in range(rows)])
    others = [e for e in range(max(top_k, 2 * experts // 3)) if e != 1]
    return np.array([[1, *rng.permutation(others)[:top_k - 1]] for _ in range(rows)])


EXPERT_SHAPES = [("F32", 33, 31), ("F16", 64, 40), ("BF16", 32, 65), ("Q8_0", 64, 96), ("Q8_0", 96, 32), ("Q4_K", 256, 256), ("Q6_K", 512, 256), ("Q5_K", 256, 512), ("Q3_K", 512, 256), ("Q2_K", 256, 256),
                 ("Q4_0", 64, 96), ("Q4_1", 96, 32), ("Q5_0", 32, 160), ("Q5_1", 160, 64), ("IQ4_NL", 64, 96), ("IQ4_XS", 256, 512)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("kind,hidden,width", EXPERT_SHAPES)
def test_experts_gate_up_equals_the_three_steps(backend, kind, hidden, width, activations, threads):
    runner = backend(threads=threads, activations=activations)
    E, K = 6, 3
    gate, up = (WeightCase(runner, kind, (E, width, hidden), seed) for seed in (1, 2))
    x = random_rows(33, hidden)
    for rows, skewed in ((1, False), (3, False), (17, True), (33, False), (33, True)):
        ids = expert_choices(rows, E, K, skewed)
        routing = routed(runner, ids, E)
        got = runner.experts_gate_up(x[:rows], routing, gate.placed, up.placed).values().reshape(rows, K, width)
        x_seen = seen(x[:rows], kind, activations)
        expected = experts_gate_up(x_seen, ids, gate.values, up.values)
        g, u, g_size, u_size = (np.einsum("th,tkfh->tkf", a, b[ids]) for a, b in
                                ((x_seen, gate.values), (x_seen, up.values), (np.abs(x_seen), np.abs(gate.values)), (np.abs(x_seen), np.abs(up.values))))
        tolerance = MATMUL_TOLERANCE * (1.1 * g_size * np.abs(u) + np.abs(silu(g)) * u_size) + 8 * EPS * np.abs(expected)
        assert_close(got, expected, tolerance, f"{rows} rows")
        for row in {0, rows - 1}:
            alone = runner.experts_gate_up(x[row:row + 1], routed(runner, ids[row:row + 1], E), gate.placed, up.placed).values()
            assert backend.alike(alone, got[row])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("kind,width,hidden", EXPERT_SHAPES)
def test_experts_down_is_the_weighted_sum_of_the_experts(backend, kind, hidden, width, activations, threads):
    runner = backend(threads=threads, activations=activations)
    E, K = 6, 3
    down = WeightCase(runner, kind, (E, hidden, width), 3)
    for rows, skewed in ((1, False), (3, False), (17, True), (33, False)):
        ids = expert_choices(rows, E, K, skewed)
        routing = routed(runner, ids, E)
        weights = routing.contents()[1]
        x = random_rows(rows * K, width, rows)
        got = runner.experts_down(x, routing, down.placed)
        x_seen = seen(x, kind, activations).reshape(rows, K, width)
        expected = experts_down(x_seen, ids, weights.astype(np.float64), down.values)
        size = experts_down(np.abs(x_seen), ids, weights.astype(np.float64), np.abs(down.values))
        assert_close(got, expected, MATMUL_TOLERANCE * size, f"{rows} rows")
        for row in {0, rows - 1}:
            alone = runner.experts_down(x[row * K:row * K + K], routed(runner, ids[row:row + 1], E), down.placed)
            assert backend.alike(alone[0], got[row])


@pytest.mark.parametrize("kind", BLOCK_OF)
def test_experts_of_many_tokens_on_one_expert(backend, kind):
    """More pairs of one expert than a tile holds."""
    runner = backend(threads=2)
    rows, E, K = 150, 4, 2
    gate, down = WeightCase(runner, kind, (E, 256, 256), 1), WeightCase(runner, kind, (E, 256, 256), 2)
    ids = expert_choices(rows, E, K, True)
    x = random_rows(rows, 256)
    hidden = runner.experts_gate_up(x, routed(runner, ids, E), gate.placed, gate.placed, consumers=[down.placed])
    out = runner.experts_down(hidden, routed(runner, ids, E), down.placed)
    for row in (0, 77, 149):
        routing = routed(runner, ids[row:row + 1], E)
        alone = runner.experts_down(runner.experts_gate_up(x[row:row + 1], routing, gate.placed, gate.placed, consumers=[down.placed]), routing, down.placed)
        assert backend.alike(alone[0], out[row])


@pytest.mark.parametrize("size", [17, 32, 257])
def test_silu_of_large_values_has_no_nan(backend, size):
    """Gate values pass a unit matrix, up values are one."""
    runner = backend()
    values = np.resize(np.array([0, -0.0, 1, -1, 20, -20, 80, -80, 87.2, -87.2, 88.5, -88.5, 104, -104, 1e4, -1e4], dtype=np.float32), size)
    x = np.append(values, 1)[None].astype(np.float32)
    gate, up = np.hstack([np.eye(size), np.zeros((size, 1))]), np.hstack([np.zeros((size, size)), np.ones((size, 1))])
    routing = routed(runner, np.array([[0]]), 1)
    got = runner.experts_gate_up(x, routing, float_weight(runner, gate[None]), float_weight(runner, up[None])).values()[0]
    assert_close(got, silu(values.astype(np.float64)), 8 * EPS * np.abs(silu(values.astype(np.float64))) + 1e-33)


# gather_rows

def test_gather_rows_of_values_and_activations(backend):
    runner = backend()
    for cols in (1, 33, 256):
        x = random_rows(9, cols)
        for rows in ([0], [8], [0, 3, 8], list(range(9))):
            assert same_bits(runner.gather_rows(x, rows), x[rows])
            assert same_bits(runner.gather_rows(runner.activation(x), rows).values(), x[rows])


# top_candidates

def check_candidates(runner, logits, n, *, excluded=(), **options):
    got, after = runner.top_candidates(logits, n, excluded=excluded, **options)
    assert same_bits(after, logits)  # edits and exclusions are taken back
    visible = logits.astype(np.float32).copy()
    for row, token, penalty, bias in options.pop("edits", ()):
        value, penalty, bias = visible[row, token], np.float32(penalty), np.float32(bias)
        visible[row, token] = (value / penalty if value > 0 else value * penalty) + bias
    targets = options.pop("targets", None)
    if targets is not None:
        assert same_bits(got.target_logits, np.concatenate([visible[row, ids] for row, ids in enumerate(targets)]))
    visible[:, list(excluded)] = -np.inf
    order = visible.astype(np.float64)
    order[:, list(excluded)] = np.nan  # sorted last: never chosen
    ids = np.argsort(-order, axis=-1, kind="stable")[:, :n]
    assert same_bits(got.ids, ids.astype(np.int32))
    assert same_bits(got.logits, np.take_along_axis(visible, ids, axis=-1))
    temperatures = np.asarray(options.get("temperatures", np.ones(len(logits))), dtype=np.float32).astype(np.float64)
    for sums, scaled in ((got.log_sum_exp, visible.astype(np.float64)), (got.log_sum_exp_at_temperature, visible / temperatures[:, None])):
        expected = log_sum_exp(scaled)
        assert_close(sums, expected, (1e-12 if runner.name.startswith("cpu") else FLOAT_SUMS_TOLERANCE) * np.maximum(np.abs(expected), 1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1, 7, 31, 32, 33, 257, 8192, 20001])
def test_top_candidates_equal_a_full_sort(backend, vocab, threads):
    runner = backend(threads=threads)
    for rows in (1, 3):
        logits = random_rows(rows, vocab, vocab, 4.0)
        for n in sorted({1, min(5, vocab), min(64, vocab), vocab if vocab < 9000 else 1000}):
            check_candidates(runner, logits, n)
        check_candidates(runner, logits, min(8, vocab), temperatures=[0.3, 1.0, 7.5][:rows])


def test_top_candidates_order_ties_by_id(backend):
    runner = backend()
    logits = np.round(random_rows(3, 1000, 5, 1.5))
    for n in (1, 2, 17, 400, 1000):
        check_candidates(runner, logits, n)
    check_candidates(runner, np.zeros((2, 300), dtype=np.float32), 300)


def test_top_candidates_after_edits_without_the_excluded(backend):
    runner = backend()
    logits = random_rows(3, 500, 6, 3.0)
    largest = np.argsort(-logits[0])[:3]
    edits = [(0, int(largest[0]), 1.3, -100.0), (0, int(largest[1]), 2.0, 0.0), (2, 7, 1.0, 50.0), (2, 7, 1.5, 0.25), (1, 499, 1.0, -np.inf)]
    targets = [[int(largest[0]), 499], [499], [7, 7, 0]]
    check_candidates(runner, logits, 20, edits=edits, targets=targets, excluded=list(range(490, 500)), temperatures=[0.5, 2.0, 1.0])
    check_candidates(runner, logits, 490, edits=edits, excluded=list(range(490, 500)))
    check_candidates(runner, logits, 400, excluded=[int(largest[0]), *range(300, 399)] if largest[0] < 300 else list(range(300, 400)))


def test_top_candidates_of_rows_with_minus_infinity(backend):
    runner = backend()
    logits = np.full((2, 100), -np.inf, dtype=np.float32)
    logits[0, [50, 3, 77]] = 1, 2, 2
    logits[1, 99] = -1e30
    check_candidates(runner, logits, 10, excluded=[0, 98])
    check_candidates(runner, logits, 98, excluded=[0, 98])


def test_top_candidates_where_nothing_can_be_chosen(backend):
    """All -inf: ids are still different and allowed, and the sums say -inf, not NaN."""
    runner = backend()
    got, _ = runner.top_candidates(np.full((1, 40), -np.inf, dtype=np.float32), 5, excluded=[1], temperatures=[0.5])
    assert got.ids.tolist() == [[0, 2, 3, 4, 5]] and (got.logits == -np.inf).all()
    assert got.log_sum_exp[0] == -np.inf and got.log_sum_exp_at_temperature[0] == -np.inf


def test_top_candidates_of_nan_are_valid_ids(backend):
    runner = backend()
    logits = random_rows(2, 64)
    logits[0, :60] = np.nan
    logits[1] = np.nan
    ids = runner.top_candidates(logits, 10, excluded=[63])[0].ids
    assert all(len(set(row)) == 10 and 63 not in row and max(row) < 64 and min(row) >= 0 for row in ids.tolist())
    assert set(ids[0, :3].tolist()) == {60, 61, 62}


def test_top_candidates_of_large_logits(backend):
    runner = backend()
    logits = random_rows(2, 300, 8)
    logits[0, 5], logits[1] = 1e4, logits[1] - np.float32(1e4)
    check_candidates(runner, logits, 12, temperatures=[0.05, 0.05])


# Instruction sets

def everything(instruction_set, activations):
    """Outputs of all ops on the CPU for one set of inputs."""
    runner = make_runner("cpu", instruction_set, activations=activations)
    out = []
    for kind in TYPES:
        for cols in COLS[kind]:
            weight = WeightCase(runner, kind, (33, cols))
            x = random_rows(17, cols, 2)
            out += [runner.embed(weight.placed, [0, 32]), runner.linear(x, [weight.placed]), runner.linear(x[:3], [weight.placed])]
            out += runner.route(x, weight.placed, 8).contents()
            stack = WeightCase(runner, kind, (5, 40, cols))
            routing = routed(runner, expert_choices(17, 5, 2, False), 5)
            out.append(runner.experts_gate_up(x, routing, stack.placed, stack.placed).values())
            out.append(runner.experts_down(random_rows(34, cols), routing, stack.placed))
            out.append(runner.norm(x, float_weight(runner, x[0]), 1e-6, x)[1].values())
    for kv_type in KV_TYPES:
        paged = Paged(runner, heads=4, kv_heads=2, head_dim=96, kv_type=kv_type, contexts=[600, 40])
        cos, sin = rope_cos_sin(np.arange(640), 96, 1e6)
        out.append(paged.write([(0, 0, 600), (1, 0, 40)], np.hstack([cos, sin]).astype(np.float32), 96, q_norm=float_weight(runner, random_rows(1, 96)[0])))
        out.append(paged.attend([(0, 590, 600), (1, 0, 40)])[0].values())
        out.append(paged.attend([(0, 599, 600)])[0].values())
    logits = random_rows(2, 3001, 3, 5.0)
    candidates = runner.top_candidates(logits, 50, temperatures=[0.7, 1.3])[0]
    return out + [candidates.ids, candidates.logits]


@pytest.mark.parametrize("activations", ["int8", "float32"])
@pytest.mark.parametrize("instruction_set", VECTORS)
def test_instruction_sets_give_equal_bits(instruction_set, activations):
    for index, (vectors, scalar) in enumerate(zip(everything(instruction_set, activations), everything("scalar", activations))):
        assert same_bits(vectors, scalar), f"output {index}, shape {vectors.shape}"


def test_the_default_is_the_first_instruction_set_that_the_machine_has():
    def named(name):
        try:
            return _native.OpRunner("cpu", instruction_set=name).name
        except ValueError:
            return None
    assert _native.OpRunner("cpu").name == next(filter(None, map(named, (*VECTORS, "scalar"))))


def test_f16_values_round_as_numpy_does(backend):
    """One key: attention gives back its value as the cache stored it, so every kind of float16 can be looked at."""
    runner = backend()
    limits = [0, -0.0, 65504, 65519.9, 6e-8, 2.9e-8, 3e-8, 6.1e-5, 1 + 2 ** -11, 1 + 3 * 2 ** -11]
    patterns = np.random.default_rng(3).integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([np.float32(limits), patterns[np.abs(patterns) < 65520]])[:2048].reshape(4, 512)
    paged = Paged(runner, heads=1, kv_heads=1, head_dim=512, kv_type="f16", contexts=[1] * 4)
    for s in range(4):
        paged.qkv[s][0, 2] = values[s]
    parts = [(s, 0, 1) for s in range(4)]
    paged.write(parts)
    assert np.array_equal(paged.attend(parts)[0].values(), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("kv_type", ["q8_0"])
def test_q8_0_values_round_as_the_reference_does(backend, kv_type):
    """One key: attention gives back its value as the cache stored it. Groups of one size each, of zeros, of what is below the least float16
    and of what needs a scale just above one."""
    runner = backend()
    rng = np.random.default_rng(3)
    sizes = np.concatenate([[0, 1e-12, 2 ** -24 * 127, 2 ** -24 * 127.5, 127 * (1 + 2 ** -12), 8e6], 10 ** rng.uniform(-9, 6.9, 58)])
    values = (rng.uniform(-1, 1, (64, 32)) * sizes[:, None]).astype(np.float32)
    values[np.arange(64), rng.integers(0, 32, 64)] = sizes
    paged = Paged(runner, heads=1, kv_heads=1, head_dim=512, kv_type=kv_type, contexts=[1] * 4)
    for s in range(4):
        paged.qkv[s][0, 2] = values[16 * s:16 * s + 16].ravel()
    parts = [(s, 0, 1) for s in range(4)]
    paged.write(parts)
    got = paged.attend(parts)[0].values().reshape(64, 32)
    expected = as_stored(values, kv_type)
    assert_close(got, expected, 4 * EPS * np.abs(expected))
    assert (np.abs(expected - values) <= (sizes[:, None] / 127 * (1 + 2 ** -10) + 2 ** -24) / 2).all()


@pytest.mark.parametrize("kv_type", ["q8_0"])
def test_a_nan_key_or_value_of_q8_0_makes_what_sees_it_nan(backend, kv_type):
    for head in (1, 2):
        paged = Paged(backend(), heads=1, kv_heads=1, head_dim=64, kv_type=kv_type, contexts=[40])
        paged.qkv[0][20, head, 5] = np.nan
        paged.write([(0, 0, 40)])
        got = paged.attend([(0, 0, 40)])[0].values()
        assert np.isfinite(got[:20]).all() and np.isnan(got[20:, :32]).all()


def test_place_weight_refuses_unknown_types(backend):
    with pytest.raises(ValueError, match="type 16"):
        backend().place_weight(np.zeros(66, dtype=np.uint8), 16, (1, 256))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("place", [0, 7, 200, 255])
def test_a_nan_activation_makes_every_product_nan_and_no_other_row(backend, kind, place):
    runner = backend()
    raw = random_tensor(kind, (9, 256), 0.1, np.random.default_rng(3))
    weight = runner.place_weight(raw, TYPES[kind], (9, 256))
    x = random_rows(3, 256)
    x[1, place] = np.nan
    got = runner.linear(x, [weight])
    assert np.isnan(got[1]).all() and np.isfinite(got[[0, 2]]).all()
