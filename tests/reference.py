"""Qwen3-MoE in plain numpy float64: the definition of correctness for every backend.

Read it top to bottom: positions, the ops in the order of a layer, quantized activations, the model over a GGUF file, and the measures that
compare logits. Every op has the name it has in `core/backend.h`; where an op of the engine also writes to the KV pool or groups pairs by
expert, only the values are defined here.

Legend of shapes: T tokens, H hidden_size, N num_heads, G num_kv_heads, D head_dim, E num_experts, K top_k, F expert width, V vocabulary.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_OF = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256, "IQ4_NL": 32, "IQ4_XS": 256}
"""Quantized weight types, and how many activations share one float scale when they meet weights of that type."""

MAX_FACTOR = 8
"""Each 32 activations of a block of 256 have an integer factor of that scale, from 1 to this."""


# Positions

@dataclass(frozen=True)
class RopeScaling:
    """How positions are stretched: `kind` is 'linear' or 'yarn', `attention_factor` multiplies YaRN's own factor (GGUF's attn_factor)."""

    kind: str
    factor: float
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


def rope_frequencies(rotary_dim, theta, scaling=None):
    """Angle per position of each pair, float64 [rotary_dim / 2], and the factor on cosine and sine.

    YaRN (Peng et al. 2023, arXiv 2309.00071, section 3): pairs that turn more than beta_fast times over the original context keep their
    frequency, those below beta_slow turns are divided by the factor, with a linear ramp between; the softmax temperature goes into the factor.
    """
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    frequencies = theta ** (-2.0 * pairs / rotary_dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, scaling.attention_factor
    if scaling.kind != "yarn":
        raise ValueError(f"RoPE scaling {scaling.kind!r} is not defined; linear and yarn are")

    def pair_with_turns(turns):
        return rotary_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), rotary_dim - 1)
    stretched = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
    own_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies * (1 - stretched + stretched / scaling.factor), own_factor * scaling.attention_factor


def rope_cos_sin(positions, rotary_dim, theta, scaling=None):
    """Cosine and sine of every position, two float64 arrays [T, rotary_dim / 2]."""
    frequencies, factor = rope_frequencies(rotary_dim, theta, scaling)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles) * factor, np.sin(angles) * factor


# The ops of a layer

def embed(table, token_ids):
    """Rows of `table` [V, H] -> [T, H]."""
    token_ids = np.asarray(token_ids)
    if token_ids.size and not (0 <= token_ids.min() and token_ids.max() < len(table)):
        raise ValueError(f"token ids must lie in 0..{len(table) - 1}")
    return table[token_ids].astype(np.float64)


def rms_normalise(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def norm(residual, weight, eps, delta=None):
    """Add the sublayer's `delta` to the residual [T, H] if given, then normalise: (new residual, normalised), both [T, H]."""
    if delta is not None:
        residual = residual + delta
    return residual, rms_normalise(residual, weight, eps)


def linear(x, weight, bias=None):
    """x [T, in] by weight [out, in] -> [T, out]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def rotate(x, cos, sin):
    """RoPE of heads x [T, heads, D] with NEOX pairing: dimension i turns with i + rotary_dim / 2; dimensions past rotary_dim stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def qk_norm_rope(heads, norm_weight, cos, sin, eps):
    """QK-norm (over each head on its own; none if `norm_weight` is None), then RoPE, of queries [T, N, D] or keys [T, G, D]."""
    if norm_weight is not None:
        heads = rms_normalise(heads, norm_weight, eps)
    return rotate(heads, cos, sin)


KV_TYPES = ("f32", "f16", "q8_0")


def as_stored(x, kv_type):
    """Keys or values [..., D] as a cache of the type gives them back, in float64.

    q8_0: 32 neighbours have one float16 scale, the least that is not below their largest magnitude / 127, and are rounded to its multiples; in
    the float32 operations that the engine takes.
    """
    x = np.asarray(x, dtype=np.float32)
    if kv_type != "q8_0":
        return x.astype({"f32": np.float32, "f16": np.float16}[kv_type]).astype(np.float64)
    groups = x.reshape(*x.shape[:-1], -1, 32)
    needed = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    scale = needed.astype(np.float16)
    scale = np.where(scale < needed, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return (scale.astype(np.float64) * np.rint(groups * inverse)).reshape(x.shape)


def attention(queries, keys, values, scale=None, window=None):
    """Causal grouped-query attention: queries [T, N, D], keys and values [C, G, D] -> [T, N, D].

    The queries are the last T of the C positions. Query head n reads KV head n // (N / G). With `window` w a query sees itself and the w - 1
    positions before it.
    """
    T, N, D = queries.shape
    C, G, _ = keys.shape
    scale = D ** -0.5 if scale is None else scale
    grouped = queries.reshape(T, G, N // G, D).transpose(1, 2, 0, 3).reshape(G, N // G * T, D)
    scores = (grouped @ keys.transpose(1, 2, 0)).reshape(G, N // G, T, C) * scale
    age = (C - T + np.arange(T))[:, None] - np.arange(C)
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    probabilities = softmax(np.where(visible, scores, -np.inf)).reshape(G, N // G * T, C)
    mixed = (probabilities @ values.transpose(1, 0, 2)).reshape(G, N // G, T, D)
    return mixed.transpose(2, 0, 1, 3).reshape(T, N, D)


def softmax(x):
    """Softmax over the last axis."""
    exponentials = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def route(x, router_weight, top_k, renormalise=True):
    """Experts of each token: softmax over all E, then the top_k: ids [T, K] by falling logit and weights [T, K].

    Equal logits: lowest index first. NaN logits come last, and make the weights of their row NaN.
    """
    router_logits = x @ router_weight.T
    ids = np.argsort(-router_logits, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(softmax(router_logits), ids, axis=-1)
    if renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return ids, weights


def silu(x):
    """x * sigmoid(x), without overflow at large negative x."""
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def experts_gate_up(x, ids, gate, up):
    """silu(gate x) * (up x) of every (token, expert) pair: x [T, H], ids [T, K], gate and up [E, F, H] -> [T, K, F]."""
    out = np.empty((*ids.shape, gate.shape[1]))
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        out[token, slot] = silu(x[token] @ gate[expert].T) * (x[token] @ up[expert].T)
    return out


def experts_down(hidden, ids, weights, down):
    """Down projection of every pair and the weighted sum over K: hidden [T, K, F], down [E, H, F] -> [T, H]."""
    pairs = np.empty((*ids.shape, down.shape[1]))
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        pairs[token, slot] = hidden[token, slot] @ down[expert].T
    return (pairs * weights[..., None]).sum(axis=1)


@dataclass(frozen=True)
class Candidates:
    """The n largest logits of each row [L, n] with their ids, log-sum-exp [L] at temperature 1 and at the row's, and the targets' logits."""

    ids: np.ndarray
    logits: np.ndarray
    log_sum_exp: np.ndarray
    log_sum_exp_at_temperature: np.ndarray
    target_logits: np.ndarray | None


def top_candidates(logits, n, *, vocab_size=None, temperatures=None, targets=None, edits=()):
    """What sampling needs of logits [L, V]; equal logits: lowest id first.

    `vocab_size` excludes the padded ids from there on, `temperatures` [L] is 1 if absent, `targets` [L, M] are ids whose logits are
    wanted, `edits` are (row, id, penalty, bias), applied in order before anything else.
    """
    logits = np.array(logits, dtype=np.float64)[:, :vocab_size]
    for row, token_id, penalty, bias in edits:
        value = logits[row, token_id]
        logits[row, token_id] = (value / penalty if value > 0 else value * penalty) + bias
    temperatures = np.ones(len(logits)) if temperatures is None else np.asarray(temperatures, dtype=np.float64)
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :n]
    return Candidates(ids, np.take_along_axis(logits, ids, axis=-1), log_sum_exp(logits), log_sum_exp(logits / temperatures[:, None]),
                      None if targets is None else np.take_along_axis(logits, np.asarray(targets), axis=-1))


def log_sum_exp(x):
    """log(sum(exp(x))) over the last axis."""
    largest = np.max(x, axis=-1, keepdims=True)
    return np.log(np.exp(x - largest).sum(axis=-1)) + largest[..., 0]


# Quantized weights and activations

def quantize_activations(x, weight_type, max_factor=MAX_FACTOR):
    """x [..., K] as it meets quantized weights: (int8 q [..., K], float64 d [..., K / 32]) with x ~ q * d, in float32 steps.

    Types with blocks of 32: d = a / 127 with a = max |x| of the 32 values. Those with blocks of 256: with A = max |x| of 256 values and steps = 8 * 127, d = (A / steps) * factor,
    factor = ceil(a * (8 / A)) in 1..8. q = x * (1 / d) rounded half to even; a block of zeros has d = 0. `max_factor` 1 in place of 8 gives one
    scale for all 256, as llama.cpp has.
    """
    blocks = np.asarray(x, dtype=np.float32).reshape(*x.shape[:-1], -1, BLOCK_OF[weight_type] // 32, 32)
    largest = np.abs(blocks).max(axis=-1)
    if BLOCK_OF[weight_type] == 32:
        steps, factor = np.float32(127), np.ones_like(largest)
    else:
        steps = np.float32(127 * max_factor)
        block_largest = largest.max(axis=-1, keepdims=True)
        factor = np.clip(np.ceil(largest * _inverse(np.float32(max_factor), block_largest)), 1, max_factor).astype(np.float32)
        largest = np.broadcast_to(block_largest, largest.shape)
    inverse = _inverse(steps, largest) / factor
    q = np.rint(blocks * inverse[..., None]).astype(np.int8)
    d = (largest / steps).astype(np.float64) * factor
    return q.reshape(x.shape), d.reshape(*x.shape[:-1], -1)


def _inverse(numerator, x):
    """numerator / x in float32; 0 where x is 0."""
    return np.divide(numerator, x, out=np.zeros_like(x), where=x != 0)


def as_quantized(x, weight_type, max_factor=MAX_FACTOR):
    """The float64 values that weights of `weight_type` see in int8 mode; x itself for float weights."""
    if weight_type not in BLOCK_OF:
        return x
    q, d = quantize_activations(x, weight_type, max_factor)
    return q.astype(np.float64) * np.repeat(d, 32, axis=-1)


def float16_values(raw):
    """Little-endian float16 bytes [..., 2] -> float64 [...]."""
    return np.ascontiguousarray(raw).view("<f2")[..., 0].astype(np.float64)


def nibbles_of_32(low):
    """Byte i holds weight i (low nibble) and 16 + i (high nibble): uint8 [..., 16] -> int64 [..., 32]."""
    return np.concatenate([low & 15, low >> 4], axis=-1).astype(np.int64)


def bits_of_32(high):
    """Bit i of four bytes, little-endian: uint8 [..., 4] -> int64 [..., 32]."""
    return np.unpackbits(high, axis=-1, bitorder="little").astype(np.int64)


def unpack_q4_0(blocks):
    """block_q4_0 {f16 d; u8 low[16]}: uint8 [..., 18] -> (q [..., 32] in -8..7, d [...])."""
    return nibbles_of_32(blocks[..., 2:]) - 8, float16_values(blocks[..., :2])


def unpack_q5_0(blocks):
    """block_q5_0 {f16 d; u8 high[4], low[16]}: uint8 [..., 22] -> (q [..., 32] in -16..15, d [...])."""
    return (nibbles_of_32(blocks[..., 6:]) | bits_of_32(blocks[..., 2:6]) << 4) - 16, float16_values(blocks[..., :2])


def unpack_q4_1(blocks):
    """block_q4_1 {f16 d, m; u8 low[16]}: uint8 [..., 20] -> (q [..., 32], d [...], m [...]). The weights are d * q + m."""
    return nibbles_of_32(blocks[..., 4:]), float16_values(blocks[..., :2]), float16_values(blocks[..., 2:4])


def unpack_q5_1(blocks):
    """block_q5_1 {f16 d, m; u8 high[4], low[16]}: uint8 [..., 24] -> as `unpack_q4_1`."""
    q = nibbles_of_32(blocks[..., 8:]) | bits_of_32(blocks[..., 4:8]) << 4
    return q, float16_values(blocks[..., :2]), float16_values(blocks[..., 2:4])


def unpack_q8_0(blocks):
    """block_q8_0 {f16 d; i8 q[32]}: uint8 [..., 34] -> (q [..., 32], d [...])."""
    return blocks[..., 2:34].view(np.int8).astype(np.int64), float16_values(blocks[..., :2])


def unpack_q4_k(blocks):
    """block_q4_K {f16 d, dmin; u8 scales[12], q[128]}: uint8 [..., 144] -> (q [..., 8, 32], scales [..., 8], minima [..., 8], d, dmin).

    The weights are d * scale * q - dmin * minimum. Scales and minima have 6 bits: the first four of each lie in bytes 0-3 and 4-7, whose top
    two bits are the top bits of the last four; bytes 8-11 hold the low nibbles of those (scale low, minimum high). Of 64 weights, the first 32 are
    the low nibbles of 32 bytes and the last 32 their high nibbles.
    """
    packed = blocks[..., 4:16].astype(np.int64)
    first_scales, first_minima, rest = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first_scales & 63, (rest & 15) | (first_scales >> 6 << 4)], axis=-1)
    minima = np.concatenate([first_minima & 63, (rest >> 4) | (first_minima >> 6 << 4)], axis=-1)
    nibbles = blocks[..., 16:144].astype(np.int64).reshape(*blocks.shape[:-1], 4, 1, 32)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-2).reshape(*blocks.shape[:-1], 8, 32)
    return q, scales, minima, float16_values(blocks[..., 0:2]), float16_values(blocks[..., 2:4])


def unpack_q5_k(blocks):
    """block_q5_K {f16 d, dmin; u8 scales[12], high[32], low[128]}: uint8 [..., 176] -> as `unpack_q4_k`.

    As Q4_K with a fifth bit: that of weight i of the s-th 32 is bit s of high[i].
    """
    q, scales, minima, d, dmin = unpack_q4_k(np.concatenate([blocks[..., :16], blocks[..., 48:]], axis=-1))
    high = blocks[..., None, 16:48].astype(np.int64) >> np.arange(8)[:, None] & 1
    return q | high << 4, scales, minima, d, dmin


def unpack_q6_k(blocks):
    """block_q6_K {u8 low[128], high[64]; i8 scales[16]; f16 d}: uint8 [..., 210] -> (q [..., 16, 16] in -32..31, scales [..., 16], d).

    The weights are d * scale * q. Of 128 weights, quarters 0 and 1 are the low nibbles of 64 bytes, quarters 2 and 3 the high ones; the two
    top bits of quarter j are bits 2j of 32 bytes.
    """
    shape = blocks.shape[:-1]
    low = blocks[..., :128].astype(np.int64).reshape(*shape, 2, 2, 32)
    high = blocks[..., 128:192].astype(np.int64).reshape(*shape, 2, 1, 32)
    quarters = np.concatenate([low & 15, low >> 4], axis=-2)
    tops = high >> np.array([0, 2, 4, 6])[:, None] & 3
    q = (quarters | tops << 4) - 32
    return q.reshape(*shape, 16, 16), blocks[..., 192:208].view(np.int8).astype(np.int64), float16_values(blocks[..., 208:210])


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
"""What the four bits of IQ4_NL and IQ4_XS stand for."""


def unpack_iq4_nl(blocks):
    """block_iq4_nl {f16 d; u8 low[16]}: uint8 [..., 18] -> (q [..., 32] of `IQ4_VALUES`, d [...])."""
    return IQ4_VALUES[nibbles_of_32(blocks[..., 2:])], float16_values(blocks[..., :2])


def unpack_iq4_xs(blocks):
    """block_iq4_xs {f16 d; u16 scales_high; u8 scales_low[4], low[128]}: uint8 [..., 136] -> (q [..., 8, 32] of `IQ4_VALUES`, scales [..., 8], d).

    The weights are d * scale * q, scales are in -32..31. Scale s has its lower four bits in a nibble of scales_low[s / 2], the low one for even s, and
    its upper two in bits 2s and 2s + 1 of scales_high.
    """
    shape, packed = blocks.shape[:-1], blocks[..., 2:8].astype(np.int64)
    lower = np.stack([packed[..., 2:] & 15, packed[..., 2:] >> 4], axis=-1).reshape(*shape, 8)
    upper = (packed[..., :1] | packed[..., 1:2] << 8) >> 2 * np.arange(8) & 3
    return IQ4_VALUES[nibbles_of_32(blocks[..., 8:].reshape(*shape, 8, 16))], (lower | upper << 4) - 32, float16_values(blocks[..., :2])


def two_bit_values(low):
    """Of 128 weights the g-th 32 are bits 2g and 2g + 1 of 32 bytes: uint8 [..., 64] -> int64 [..., 8, 32]."""
    halves = low.astype(np.int64).reshape(*low.shape[:-1], 2, 1, 32)
    return (halves >> np.array([0, 2, 4, 6])[:, None] & 3).reshape(*low.shape[:-1], 8, 32)


def unpack_q2_k(blocks):
    """block_q2_K {u8 scales[16], low[64]; f16 d, dmin}: uint8 [..., 84] -> (q [..., 16, 16], scales [..., 16], minima [..., 16], d, dmin).

    The weights are d * scale * q - dmin * minimum; scales are the low nibbles of their bytes, minima the high ones.
    """
    packed = blocks[..., :16].astype(np.int64)
    q = two_bit_values(blocks[..., 16:80]).reshape(*blocks.shape[:-1], 16, 16)
    return q, packed & 15, packed >> 4, float16_values(blocks[..., 80:82]), float16_values(blocks[..., 82:84])


def unpack_q3_k(blocks):
    """block_q3_K {u8 high[32], low[64], scales[12]; f16 d}: uint8 [..., 110] -> (q [..., 16, 16] in -4..3, scales [..., 16] in -32..31, d).

    The weights are d * scale * q. The third bit of weight i of the n-th 32 is bit n of high[i]. Of the six bits of a scale the lower four are the
    nibbles of bytes 0-7, first the low ones, then the high ones; the upper two of scales 4n to 4n + 3 are bits 2n and 2n + 1 of bytes 8-11.
    """
    shape, packed = blocks.shape[:-1], blocks[..., 96:108].astype(np.int64)
    third = blocks[..., None, :32].astype(np.int64) >> np.arange(8)[:, None] & 1
    q = (two_bit_values(blocks[..., 32:96]) | third << 2) - 4
    lower = np.concatenate([packed[..., :8] & 15, packed[..., :8] >> 4], axis=-1)
    upper = (packed[..., None, 8:] >> np.array([0, 2, 4, 6])[:, None] & 3).reshape(*shape, 16)
    return q.reshape(*shape, 16, 16), (lower | upper << 4) - 32, float16_values(blocks[..., 108:110])


BLOCKS_OF_32 = {"Q4_0": unpack_q4_0, "Q4_1": unpack_q4_1, "Q5_0": unpack_q5_0, "Q5_1": unpack_q5_1, "Q8_0": unpack_q8_0, "IQ4_NL": unpack_iq4_nl}
WITH_MINIMA = {"Q2_K": unpack_q2_k, "Q4_K": unpack_q4_k, "Q5_K": unpack_q5_k}
WITHOUT_MINIMA = {"Q3_K": unpack_q3_k, "Q6_K": unpack_q6_k, "IQ4_XS": unpack_iq4_xs}


def expand(blocks, weight_type):
    """Weights as products - offsets, both float64 [..., weights of a block], of uint8 [..., bytes of a block]."""
    if weight_type in BLOCKS_OF_32:
        q, d, *m = BLOCKS_OF_32[weight_type](blocks)
        return q * d[..., None], np.broadcast_to(-m[0][..., None] if m else 0.0, q.shape)
    if weight_type in WITHOUT_MINIMA:
        q, scales, d = WITHOUT_MINIMA[weight_type](blocks)
        minima, dmin = np.zeros_like(scales), np.zeros_like(d)
    else:
        q, scales, minima, d, dmin = WITH_MINIMA[weight_type](blocks)
    products = q * (d[..., None] * scales)[..., None]
    offsets = np.broadcast_to((dmin[..., None] * minima)[..., None], products.shape)
    return products.reshape(*blocks.shape[:-1], -1), offsets.reshape(*blocks.shape[:-1], -1)


def dot_quantized(weight_rows, weight_type, q, d):
    """Products of rows of blocks with int8 activations, exact up to float64 rounding: [T, R].

    weight_rows uint8 [R, bytes of a row], q int8 [T, K], d [T, K / 32] as `quantize_activations` makes them.
    """
    T, R = len(q), len(weight_rows)
    y = (q.astype(np.float64).reshape(T, -1, 32) * d[..., None]).reshape(T, -1)
    products, offsets = expand(np.ascontiguousarray(weight_rows).reshape(R, y.shape[1] // BLOCK_OF[weight_type], -1), weight_type)
    return y @ products.reshape(R, -1).T - y @ offsets.reshape(R, -1).T


def dequantize(data, weight_type):
    """A tensor's values as float64, from the bytes (or floats) `gguf.GGUFReader` shows and the name of its type."""
    import gguf

    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[weight_type]).astype(np.float64)


# The model

@dataclass(frozen=True)
class Config:
    """The hyperparameters that the computation needs, as the file states them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    renormalise: bool = True

    @classmethod
    def from_metadata(cls, metadata):
        """From GGUF metadata of arch qwen3moe: a mapping of full key names to values."""
        if metadata["general.architecture"] != "qwen3moe":
            raise ValueError(f"the reference defines qwen3moe, the file is {metadata['general.architecture']}")

        def of_model(key, *default):
            return metadata.get("qwen3moe." + key, *default) if default else metadata["qwen3moe." + key]

        scaling = None
        if of_model("rope.scaling.type", "none") != "none":
            scaling = RopeScaling(
                of_model("rope.scaling.type"), of_model("rope.scaling.factor"),
                of_model("rope.scaling.original_context_length", of_model("context_length")),
                of_model("rope.scaling.yarn_beta_fast", 32.0), of_model("rope.scaling.yarn_beta_slow", 1.0),
                of_model("rope.scaling.attn_factor", 1.0))
        return cls(of_model("block_count"), of_model("embedding_length"), of_model("attention.head_count"), of_model("attention.head_count_kv"),
                   of_model("attention.key_length"), of_model("expert_count"), of_model("expert_used_count"),
                   of_model("attention.layer_norm_rms_epsilon"), of_model("rope.freq_base"), scaling)


class ReferenceModel:
    """A GGUF file of arch qwen3moe, computed in float64 with all weights expanded (8 bytes each: for small models).

    activations 'float' keeps them in float64; 'int8' rounds what meets quantized weights as `quantize_activations` does. kv_type rounds keys and
    values as `as_stored` does.
    """

    def __init__(self, path, *, activations="float", kv_type="f32", max_factor=MAX_FACTOR):
        import gguf

        if activations not in ("float", "int8") or kv_type not in KV_TYPES:
            raise ValueError(f"activations is 'float' or 'int8', kv_type is one of {KV_TYPES}, not {activations!r}, {kv_type!r}")
        reader = gguf.GGUFReader(path)
        self.config = Config.from_metadata({name: field.contents() for name, field in reader.fields.items()
                                            if name.startswith(("general.architecture", "qwen3moe."))})
        self.activations = activations
        self.max_factor = max_factor
        self.kv_type = kv_type
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.weight = lru_cache(maxsize=None)(self._expand)

    def _expand(self, name):
        return dequantize(self._tensors[name].data, self.weight_type(name))

    def weight_type(self, name):
        """The name of a tensor's type, such as 'Q4_K'."""
        return self._tensors[name].tensor_type.name

    @property
    def head_name(self):
        """The output head's tensor: the embedding table where the file ties them."""
        return "output.weight" if "output.weight" in self._tensors else "token_embd.weight"

    @property
    def vocab_size(self):
        return self.weight("token_embd.weight").shape[0]

    def seen_by(self, x, name):
        """Activations x as the weights `name` see them."""
        return as_quantized(x, self.weight_type(name), self.max_factor) if self.activations == "int8" else x

    def project(self, x, name):
        return linear(self.seen_by(x, name), self.weight(name))

    def logits(self, token_ids):
        """Logits [T, V] of every position of one sequence that starts at position 0."""
        c = self.config
        cos, sin = rope_cos_sin(np.arange(len(token_ids)), c.head_dim, c.rope_theta, c.rope_scaling)
        residual, delta = embed(self.weight("token_embd.weight"), token_ids), None
        for layer in range(c.num_layers):
            prefix = f"blk.{layer}."
            residual, x = norm(residual, self.weight(prefix + "attn_norm.weight"), c.eps, delta)
            residual, x = norm(residual, self.weight(prefix + "ffn_norm.weight"), c.eps, self.attention_block(prefix, x, cos, sin))
            delta = self.experts_block(prefix, x)
        _, x = norm(residual, self.weight("output_norm.weight"), c.eps, delta)
        return self.project(x, self.head_name)

    def attention_block(self, prefix, x, cos, sin):
        """Attention sublayer of normalised x [T, H] -> delta [T, H]."""
        c, T = self.config, len(x)
        queries = self.project(x, prefix + "attn_q.weight").reshape(T, c.num_heads, c.head_dim)
        keys = self.project(x, prefix + "attn_k.weight").reshape(T, c.num_kv_heads, c.head_dim)
        values = self.project(x, prefix + "attn_v.weight").reshape(T, c.num_kv_heads, c.head_dim)
        queries = qk_norm_rope(queries, self.weight(prefix + "attn_q_norm.weight"), cos, sin, c.eps)
        keys = qk_norm_rope(keys, self.weight(prefix + "attn_k_norm.weight"), cos, sin, c.eps)
        if self.kv_type != "f32":
            keys, values = as_stored(keys, self.kv_type), as_stored(values, self.kv_type)
        mixed = attention(queries, keys, values).reshape(T, c.num_heads * c.head_dim)
        return self.project(mixed, prefix + "attn_output.weight")

    def experts_block(self, prefix, x):
        """Mixture-of-experts sublayer of normalised x [T, H] -> delta [T, H]."""
        c = self.config
        gate, up, down = (f"{prefix}ffn_{kind}_exps.weight" for kind in ("gate", "up", "down"))
        ids, weights = route(x, self.weight(prefix + "ffn_gate_inp.weight"), c.top_k, c.renormalise)
        if self.weight_type(gate) != self.weight_type(up):
            raise ValueError(f"{gate} is {self.weight_type(gate)}, {up} is {self.weight_type(up)}: one Activation cannot serve both")
        hidden = experts_gate_up(self.seen_by(x, gate), ids, self.weight(gate), self.weight(up))
        return experts_down(self.seen_by(hidden, down), ids, weights, self.weight(down))


# Measures

def relative_l2(ref, got):
    """|got - ref| / |ref| of each row."""
    ref, got = np.asarray(ref, dtype=np.float64), np.asarray(got, dtype=np.float64)
    return np.linalg.norm(got - ref, axis=-1) / np.linalg.norm(ref, axis=-1)


def kl_divergence(ref, got):
    """KL(softmax(ref) || softmax(got)) of each row of logits, in nats."""
    ref, got = np.asarray(ref, dtype=np.float64), np.asarray(got, dtype=np.float64)
    log_p, log_q = ref - log_sum_exp(ref)[..., None], got - log_sum_exp(got)[..., None]
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def logit_statistics(ref, got):
    """How logits `got` [T, V] depart from `ref`: median_relative_l2, median_kl and mean_kl (nats), and the share of rows of equal argmax."""
    distances, divergences = relative_l2(ref, got), kl_divergence(ref, got)
    return {"median_relative_l2": float(np.median(distances)), "median_kl": float(np.median(divergences)), "mean_kl": float(np.mean(divergences)),
            "argmax_equal": float(np.mean(np.argmax(ref, axis=-1) == np.argmax(got, axis=-1)))}
