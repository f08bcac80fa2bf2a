"""The Metal kernels of embed, linear, experts_gate_up and experts_down, each by itself on the fiber executor, against float64 numpy.

Every kernel, weight type and size around the widths of vectors, blocks and tiles. Rows that do not exist hold NaN before, and still do after.
"""
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from metal_runner import mslc, run
from reference import BLOCK_OF, dequantize, experts_down, experts_gate_up, silu
from tiny_models import random_tensor, set_block_scale

if not mslc.find_clang():
    pytest.skip("no clang++ of version 15 or later: apt-get install --no-install-recommends clang-19", allow_module_level=True)

TYPES = {kind: int(gguf.GGMLQuantizationType[kind]) for kind in ("F32", "F16", "BF16", *BLOCK_OF)}
COLS_OF_BLOCK = {1: (1, 31, 36, 32, 33, 257), 32: (32, 64, 96, 288), 256: (768, 256, 512, 1280)}
COLS = {kind: COLS_OF_BLOCK[BLOCK_OF.get(kind, 1)] for kind in TYPES}
TOLERANCE = 1e-6  # of the sum of the products' magnitudes
PADDING = 2       # rows after those that exist

FILES = [Path(__file__).parent.parent / "metal_src" / f"{op}.metal" for op in ("embed", "linear", "experts_gate_up", "experts_down")]

# Geometry, as in metal_src/shared.
GEMV_BLOCK, GEMV_THREADS = 8, 128
GEMM_ROWS, GEMM_COLUMNS, GEMM_THREADS, GEMM_BYTES = 64, 32, 128, 13824
EMBED_THREADS, EMBED_BLOCK = 64, 256
DOWN_ROWS, DOWN_SUM_THREADS = 4, 256
TILE_PAIRS = 32


class Runner:
    """Runs kernels, each time with another order of lanes and threadgroups."""

    def __init__(self, checks):
        self.checks, self.seed = checks, 0

    def some(self, cases):
        """All of them, but only the second and third where checks make each ten times as long."""
        return cases[1:3] if self.checks else cases

    def run(self, kernel, args, buffers, grid, threads, threadgroup=0, constants=None):
        self.seed += 1
        file = next(file for file in FILES if kernel.startswith(file.stem))
        run(file, kernel, args, buffers, grid, threads, threadgroup_bytes=threadgroup, constants=constants, seed=self.seed, checks=self.checks)


@pytest.fixture(params=["", "all"], ids=["plain", "checked"])
def runner(request):
    """As compiled for use, and with every access and alignment checked."""
    return Runner(request.param)


class Weight:
    """A random weight [.., rows, cols] as a file holds it, and the float64 values it stands for."""

    def __init__(self, kind, shape, seed=0, std=None):
        self.kind, self.shape = kind, shape
        raw = random_tensor(kind, shape, shape[-1] ** -0.5 if std is None else std, np.random.default_rng(seed))
        self.values = dequantize(raw, kind).reshape(shape)
        self.bytes = np.ascontiguousarray(raw).view(np.uint8).reshape(*shape[:-1], -1)
        self.row_bytes = self.bytes.shape[-1]

    @classmethod
    def of(cls, kind, stored):
        """Of given bytes [.., rows, row_bytes]."""
        weight = object.__new__(cls)
        weight.kind, weight.bytes, weight.row_bytes = kind, np.ascontiguousarray(stored), stored.shape[-1]
        weight.values = dequantize(weight.bytes if kind != "F32" else weight.bytes.view(np.float32), kind)
        weight.shape = weight.values.shape
        return weight

    @classmethod
    def of_floats(cls, values):
        return cls.of("F32", np.ascontiguousarray(values, dtype=np.float32).view(np.uint8))

    def head(self, rows):
        return Weight.of(self.kind, self.bytes[:rows])


def random_rows(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def nothing(rows, cols):
    """An output with room for rows that must stay as they are."""
    return np.full((rows + PADDING, cols), np.nan, dtype=np.float32)


def taken(out, rows):
    assert np.isnan(out[rows:]).all(), "wrote beyond the rows"
    return out[:rows]


def blocks(n, block):
    return -(-n // block)


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_close(got, expected, size, what="", tolerance=TOLERANCE):
    error = np.abs(got - expected) / np.maximum(size, 1e-30)
    assert not np.isnan(error).any(), f"{what}: NaN at {np.argwhere(np.isnan(error))[0]}"
    assert error.max(initial=0) <= tolerance, f"{what}: {error.max():.3g} of the size at {np.unravel_index(error.argmax(), error.shape)}"


def count_buffer(n):
    return np.array([n], dtype=np.int32)


def constants(*weights):
    return {i: TYPES[weights[i].kind] if i < len(weights) else -1 for i in range(3)}


def padded(rows):
    """Rows followed by NaN rows, as in a buffer of the largest step."""
    return np.concatenate([rows, np.full((PADDING, rows.shape[1]), np.nan, dtype=np.float32)])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_product_kernels_keep_the_rules_of_metal(file):
    """Address spaces, C++14, nothing that Metal lacks."""
    mslc.check([file])


# embed

def run_embed(runner, table, ids):
    T, H = len(ids), table.shape[-1]
    out = nothing(T, H)
    ids = np.array([*ids, *[10**6] * PADDING], dtype=np.int32)
    runner.run("embed", struct.pack("<iI", H, table.row_bytes), [table.bytes, ids, count_buffer(T), out], (blocks(H, EMBED_BLOCK), T + PADDING), EMBED_THREADS,
               constants=constants(table))
    return taken(out, T)


@pytest.mark.parametrize("kind", TYPES)
def test_embed_gives_the_rows_of_the_table(runner, kind):
    for cols in runner.some(COLS[kind]):
        table = Weight(kind, (37, cols), seed=cols)
        for ids in ([36, 0, 5, 5, 17], [3]):
            got = run_embed(runner, table, ids)
            if kind == "Q4_K":  # a difference, rounded once more
                assert_close(got, table.values[ids], np.abs(table.values).max(), tolerance=3e-7)
            else:
                assert same_bits(got, table.values[ids].astype(np.float32)), f"{kind} {cols}"


# linear

def linear_args(weights):
    rows, row_bytes = ([w.shape[0] for w in weights] + [0, 0])[:3], ([w.row_bytes for w in weights] + [0, 0])[:3]
    return struct.pack("<4i3I", weights[0].shape[-1], *rows, *row_bytes)


def run_linear(runner, kernel, x, weights):
    n, out_cols = len(x), sum(w.shape[0] for w in weights)
    out = nothing(n, out_cols)
    bytes_of = [w.bytes for w in weights] + [np.zeros(16, np.uint8)] * (3 - len(weights))
    if kernel == "linear_gemm":
        grid = (sum(blocks(w.shape[0], GEMM_ROWS) for w in weights), blocks(n + PADDING, GEMM_COLUMNS))
        geometry = {"threads": GEMM_THREADS, "threadgroup": GEMM_BYTES}
    else:
        grid = (sum(blocks(w.shape[0], GEMV_BLOCK) for w in weights), blocks(n + PADDING, int(kernel[len("linear_gemv_c"):])))
        geometry = {"threads": GEMV_THREADS}
    runner.run(kernel, linear_args(weights), [*bytes_of, padded(x), count_buffer(n), out], grid, constants=constants(*weights), **geometry)
    return taken(out, n)


GEMV = ("linear_gemv_c1", "linear_gemv_c2", "linear_gemv_c4", "linear_gemv_c8")


@pytest.mark.parametrize("kind", TYPES)
def test_linear_gemv_of_any_rows_and_columns(runner, kind):
    """And the bits of a row depend neither on the rows beside it nor on how many columns a pass takes."""
    for cols in runner.some(COLS[kind]):
        weight, x = Weight(kind, (33, cols), seed=cols), random_rows(33, cols, seed=cols + 1)
        full = run_linear(runner, "linear_gemv_c8", x, [weight])
        assert_close(full, x.astype(np.float64) @ weight.values.T, np.abs(x).astype(np.float64) @ np.abs(weight.values).T, f"{kind} {cols}")
        for kernel in GEMV:
            for rows, columns in runner.some(((1, 1), (1, 3), (9, 7), (3, 2), (7, 4), (8, 5), (17, 8), (31, 9), (32, 16), (33, 17), (33, 31), (2, 33))):
                got = run_linear(runner, kernel, x[:columns], [weight.head(rows)])
                assert same_bits(got, full[:columns, :rows]), f"{kernel} {kind} {cols}: {rows} rows, {columns} columns"


@pytest.mark.parametrize("kind", TYPES)
def test_linear_gemm_of_any_rows_and_columns(runner, kind):
    for cols in runner.some(COLS[kind]):
        weight, x = Weight(kind, (65 if cols > 300 or runner.checks else 257, cols), seed=cols), random_rows(33, cols, seed=cols + 1)
        expected, size = x.astype(np.float64) @ weight.values.T, np.abs(x).astype(np.float64) @ np.abs(weight.values).T
        full = run_linear(runner, "linear_gemm", x, [weight])
        assert_close(full, expected, size, f"{kind} {cols}")
        for rows, columns in runner.some(((1, 1), (31, 2), (65, 8), (32, 31), (33, 32), (63, 33), (64, 7))):
            assert same_bits(run_linear(runner, "linear_gemm", x[:columns], [weight.head(rows)]), full[:columns, :rows]), f"{kind} {cols}: {rows} rows, {columns} columns"


@pytest.mark.parametrize("kernel", ["linear_gemv_c1", "linear_gemv_c4", "linear_gemm"])
@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "F32", "Q4_K"), ("F16", "BF16"), ("Q6_K", "Q8_0")], ids="+".join)
def test_linear_puts_weights_of_different_types_side_by_side(runner, kernel, kinds):
    x = random_rows(5, 512)
    weights = [Weight(kind, (rows, 512), seed=rows) for kind, rows in zip(kinds, (72, 17, 9))]
    apart = np.hstack([run_linear(runner, kernel, x, [weight]) for weight in weights])
    assert same_bits(run_linear(runner, kernel, x, weights), apart)


@pytest.mark.parametrize("kind", BLOCK_OF)
def test_products_of_blocks_with_every_field_at_its_limit(runner, kind):
    x = random_rows(3, 2 * BLOCK_OF[kind])
    for fill in (0x00, 0x5A, 0x7F, 0x80, 0xA5, 0xFF):
        raw = np.full((3, 2, gguf.GGML_QUANT_SIZES[TYPES[kind]][1]), fill, dtype=np.uint8)
        set_block_scale(raw, kind, np.ones((3, 2)), minimum_per_scale=1)
        weight = Weight.of(kind, raw.reshape(3, -1))
        expected, magnitude = x.astype(np.float64) @ weight.values.T, np.abs(x).astype(np.float64) @ np.abs(weight.values).T
        for kernel in ("linear_gemv_c2", "linear_gemm"):
            assert_close(run_linear(runner, kernel, x, [weight]), expected, magnitude, f"{kernel} {kind} {fill:#x}")


@pytest.mark.parametrize("kernel", ["linear_gemv_c4", "linear_gemm"])
def test_linear_keeps_a_nan_in_its_row(runner, kernel):
    weight, x = Weight("Q4_K", (9, 256)), random_rows(5, 256)
    clean = run_linear(runner, kernel, x, [weight])
    x[2, 77] = np.nan
    got = run_linear(runner, kernel, x, [weight])
    assert np.isnan(got[2]).all() and same_bits(np.delete(got, 2, 0), np.delete(clean, 2, 0))


# experts

class Pairs:
    """n tokens' experts, as `route` leaves them on the device."""

    def __init__(self, n, top_k, experts, seed=0, skew=False):
        rng = np.random.default_rng(seed)
        chosen = max(top_k, experts // 3) if skew else experts
        self.fill([rng.permutation(chosen)[:top_k] for _ in range(n)], rng.random((n, top_k)), experts)

    @classmethod
    def of(cls, ids, weights, experts):
        pairs = object.__new__(cls)
        pairs.fill(ids, weights, experts)
        return pairs

    def fill(self, ids, weights, experts):
        self.ids, self.weights = np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32)
        self.n, self.top_k = self.ids.shape
        flat = self.ids.ravel()
        self.pairs = np.argsort(flat, kind="stable").astype(np.int32)
        self.start = np.searchsorted(np.sort(flat), np.arange(experts + 1)).astype(np.int32)
        tiles = [(e, first) for e in range(experts) for first in range(self.start[e], self.start[e + 1], TILE_PAIRS)]
        self.most_tiles = min(len(flat), len(flat) // TILE_PAIRS + experts)
        self.tiles = np.full((self.most_tiles, 2), -(10**6), dtype=np.int32)
        self.tiles[:len(tiles)] = tiles
        self.tile_count = count_buffer(len(tiles))


def columns_in_a_pass(pairs):
    return 1 if pairs.n == 1 else 4


def run_gate_up(runner, variant, x, pairs, gate, up):
    H, F, total = gate.shape[-1], gate.shape[-2], pairs.n * pairs.top_k
    out = nothing(total, F)
    args = struct.pack("<2i2Ii", H, F, gate.row_bytes, up.row_bytes, pairs.top_k)
    if variant == "gemm":
        runner.run("experts_gate_up_gemm", args, [gate.bytes, up.bytes, padded(x), pairs.start, pairs.pairs, pairs.tiles, pairs.tile_count, out],
                   (blocks(F, GEMM_ROWS // 2), pairs.most_tiles), GEMM_THREADS, threadgroup=GEMM_BYTES, constants=constants(gate, up))
    else:
        runner.run(f"experts_gate_up_gemv_c{columns_in_a_pass(pairs)}", args,
                   [gate.bytes, up.bytes, padded(x), pairs.ids, pairs.start, pairs.pairs, count_buffer(pairs.n), out],
                   (blocks(F, GEMV_BLOCK), total + PADDING), GEMV_THREADS, constants=constants(gate, up))
    return taken(out, total)


def run_down(runner, variant, hidden, pairs, down):
    F, H, total = down.shape[-1], down.shape[-2], pairs.n * pairs.top_k
    out, args = nothing(pairs.n, H), struct.pack("<2iIi", F, H, down.row_bytes, pairs.top_k)
    weights = pairs.weights.ravel()
    if variant == "gemm":
        products = nothing(total, H)
        runner.run("experts_down_gemm", args, [down.bytes, padded(hidden), pairs.start, pairs.pairs, pairs.tiles, pairs.tile_count, products],
                   (blocks(H, GEMM_ROWS), pairs.most_tiles), GEMM_THREADS, threadgroup=GEMM_BYTES, constants=constants(down))
        taken(products, total)
        runner.run("experts_down_sum", args, [products, weights, count_buffer(pairs.n), out], (blocks(H, DOWN_SUM_THREADS), pairs.n + PADDING), DOWN_SUM_THREADS,
                   constants=constants(down))
    else:
        runner.run(f"experts_down_gemv_c{columns_in_a_pass(pairs)}", args,
                   [down.bytes, padded(hidden), pairs.ids, weights, pairs.start, pairs.pairs, count_buffer(pairs.n), out],
                   (blocks(H, DOWN_ROWS),), GEMV_THREADS, threadgroup=total * DOWN_ROWS * 4, constants=constants(down))
    return taken(out, pairs.n)


def gate_up_size(x, pairs, gate, up):
    """The size that the error of silu(gate x) * (up x) is measured against."""
    x, ids = np.abs(x).astype(np.float64), pairs.ids
    g, u = np.abs(gate.values), np.abs(up.values)
    both = [[(x[t] @ g[e].T) * (x[t] @ u[e].T) + x[t] @ g[e].T + x[t] @ u[e].T for e in ids[t]] for t in range(pairs.n)]
    return np.array(both).reshape(pairs.n * pairs.top_k, -1)


CASES = [(1, 1, 1), (1, 8, 8), (9, 3, 6), (2, 2, 5), (3, 4, 9), (33, 2, 4), (40, 1, 1)]  # n, top_k, experts


@pytest.mark.parametrize("variant", ["gemv", "gemm"])
@pytest.mark.parametrize("kind", TYPES)
def test_experts_gate_up_of_every_pair(runner, kind, variant):
    for cols in runner.some(COLS[kind]):
        for F in runner.some((33, 1, 31)) if cols <= 257 else (7,):
            gate, up = (Weight(kind, (9, F, cols), seed=seed) for seed in (cols, cols + 1))
            for n, top_k, experts in runner.some(CASES) if F == 31 else CASES[3:5]:
                pairs = Pairs(n, top_k, experts, seed=n, skew=n == 9)
                x = random_rows(n, cols, seed=n)
                got = run_gate_up(runner, variant, x, pairs, gate, up)
                expected = experts_gate_up(x.astype(np.float64), pairs.ids, gate.values, up.values).reshape(got.shape)
                assert_close(got, expected, gate_up_size(x, pairs, gate, up), f"{kind} {cols} {F} {n} {top_k} {experts}")


@pytest.mark.parametrize("variant", ["gemv", "gemm"])
@pytest.mark.parametrize("kinds", [("Q4_K", "Q6_K"), ("F16", "Q8_0"), ("Q8_0", "F32")], ids="+".join)
def test_experts_gate_up_of_different_types(runner, kinds, variant):
    gate, up = (Weight(kind, (5, 33, 256), seed=seed) for seed, kind in enumerate(kinds))
    pairs, x = Pairs(9, 3, 5), random_rows(9, 256)
    got = run_gate_up(runner, variant, x, pairs, gate, up)
    expected = experts_gate_up(x.astype(np.float64), pairs.ids, gate.values, up.values).reshape(got.shape)
    assert_close(got, expected, gate_up_size(x, pairs, gate, up))


@pytest.mark.parametrize("variant", ["gemv", "gemm"])
def test_experts_gate_up_of_extreme_gates(runner, variant):
    """The gate is the first column of x, up the second."""
    gates = np.array([-3e38, -1e4, -104, -88, -86, -20, -1e-30, 0, 1e-30, 1, 20, 88, 1e4, 3e38], dtype=np.float32)
    gate, up = (Weight.of_floats(np.eye(4)[None, i:i + 1]) for i in (0, 1))
    x = np.zeros((len(gates), 4), dtype=np.float32)
    x[:, 0], x[:, 1] = gates, 1
    got = run_gate_up(runner, variant, x, Pairs(len(gates), 1, 1), gate, up)[:, 0]
    expected = silu(gates.astype(np.float64))
    assert_close(got, expected, np.abs(expected) + 1e-37 / TOLERANCE)
    nan_rows = run_gate_up(runner, variant, np.full((2, 4), np.nan, dtype=np.float32), Pairs(2, 1, 1), gate, up)
    assert np.isnan(nan_rows).all()


@pytest.mark.parametrize("variant", ["gemv", "gemm"])
@pytest.mark.parametrize("kind", TYPES)
def test_experts_down_adds_the_weighted_products(runner, kind, variant):
    for cols in runner.some(COLS[kind]):
        for H in runner.some((257, 1, 33, 31)) if cols <= 257 else (7,):
            down = Weight(kind, (9, H, cols), seed=cols)
            for n, top_k, experts in runner.some(CASES) if H == 33 else CASES[3:5]:
                pairs = Pairs(n, top_k, experts, seed=n, skew=n == 9)
                hidden = random_rows(n * top_k, cols, seed=n)
                got = run_down(runner, variant, hidden, pairs, down)
                by_token = hidden.astype(np.float64).reshape(n, top_k, cols)
                expected = experts_down(by_token, pairs.ids, pairs.weights.astype(np.float64), down.values)
                size = experts_down(np.abs(by_token), pairs.ids, pairs.weights.astype(np.float64), np.abs(down.values))
                assert_close(got, expected, size, f"{kind} {cols} {H} {n} {top_k} {experts}")


@pytest.mark.parametrize("variant", ["gemv", "gemm"])
def test_experts_down_adds_in_the_order_of_k(runner, variant):
    """Products 1, 2^24, -2^24 of experts in any order: their sum in float shows the order."""
    H = 5
    values = np.zeros((3, H, 32))
    values[:, :, 0] = np.array([1.0, 2.0**24, -(2.0**24)])[:, None]
    down = Weight.of_floats(values)
    orders = [[0, 1, 2], [1, 2, 0], [1, 0, 2], [2, 1, 0], [2, 0, 1], [0, 2, 1]]
    pairs = Pairs.of(orders, np.ones((6, 3)), 3)
    hidden = np.zeros((18, 32), dtype=np.float32)
    hidden[:, 0] = 1
    expected = []
    for order in orders:
        total = np.float32(0)
        for expert in order:
            total += np.float32(values[expert, 0, 0])
        expected.append([total] * H)
    assert same_bits(run_down(runner, variant, hidden, pairs, down), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("op", ["gate_up", "down"])
def test_expert_products_of_few_pairs_have_the_bits_of_a_token_alone(runner, op):
    kind, experts = "Q4_K", 4
    many = Pairs(9, 3, experts)
    first = Weight(kind, (experts, 13, 256), seed=1)
    x = random_rows(9 if op == "gate_up" else 27, 256)
    run = (lambda x, pairs: run_gate_up(runner, "gemv", x, pairs, first, first)) if op == "gate_up" else (lambda x, pairs: run_down(runner, "gemv", x, pairs, first))
    together = run(x, many).reshape(9, -1)
    for token in (0, 5, 8):
        alone = Pairs.of(many.ids[token:token + 1], many.weights[token:token + 1], experts)
        own = x[token:token + 1] if op == "gate_up" else x[3 * token:3 * token + 3]
        assert same_bits(run(own, alone).reshape(-1), together[token])
