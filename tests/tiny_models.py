"""Small random GGUF files of arch qwen3moe, equal for equal seeds: everything a real file has, in a megabyte or a few.

Weights are scaled so that activations stay near 1 and logits spread with a standard deviation of about 2.5. Tensors of quantized types but Q8_0 are random
blocks that use every bit pattern of the format; others are the rounded values of Gaussian weights.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass

import gguf
import numpy as np

from reference import dequantize

LOGIT_STD = 2.5
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED_TOKENS = ("<think>", "</think>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
WORDS = ("the and to of was in he she it that they said you on with little day one his her had for not but once upon time there big dog cat tree "
         "went home happy saw play very friend were from").split()


@dataclass(frozen=True)
class TinyConfig:
    """Shape of a tiny model; head_dim is not hidden / heads, as in the real ones."""

    layers: int = 3
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    experts: int = 8
    top_k: int = 3
    expert_ffn: int = 256
    vocab: int = 512
    context: int = 4096
    rope_theta: float = 1_000_000.0
    eps: float = 1e-6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order with their GGUF types, and the merges in rank order."""

    tokens: list[str]
    types: list[gguf.TokenType]
    merges: list[str]

    @property
    def num_normal(self):
        """Ids below this are bytes and merged pieces."""
        return sum(kind == gguf.TokenType.NORMAL for kind in self.types)


def byte_characters():
    """The printable character of each byte in byte-level BPE (GPT-2): itself where printable, else 256 + running number."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + unprintable.index(byte)) for byte in range(256)]


def make_vocabulary(size):
    """Byte-level BPE of `size` tokens: bytes, pieces of a few English words, control and user-defined tokens, then unused [PADn]."""
    alphabet = byte_characters()
    room = size - len(alphabet) - len(CONTROL_TOKENS) - len(USER_DEFINED_TOKENS)
    if room < 0:
        raise ValueError(f"a vocabulary needs {size - room} tokens for the bytes and special tokens, got {size}")
    pieces, merges = [], []
    for word in WORDS:
        left = alphabet[ord(" ")]
        for character in word:
            if left + character not in pieces:
                pieces.append(left + character)
                merges.append(f"{left} {character}")
            left += character
    pieces, merges = pieces[:room], merges[:room]
    tokens = [*alphabet, *pieces, *CONTROL_TOKENS, *USER_DEFINED_TOKENS]
    padding = [f"[PAD{n}]" for n in range(len(tokens), size)]
    types = ([gguf.TokenType.NORMAL] * (len(alphabet) + len(pieces)) + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS)
             + [gguf.TokenType.USER_DEFINED] * len(USER_DEFINED_TOKENS) + [gguf.TokenType.UNUSED] * len(padding))
    return Vocabulary(tokens + padding, types, merges)


def random_token_ids(config, count, seed=0):
    """`count` ids of normal tokens."""
    return np.random.default_rng(seed).integers(0, make_vocabulary(config.vocab).num_normal, count).tolist()


SCALE_PLACES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
"""Quantized types: where a block's float16 d lies, and its minimum's (dmin, or m of the types with blocks of 32)."""

MINIMUM_PER_SCALE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""dmin / d, or m / d, with which the mean of a block is 0."""


def random_blocks(weight_type, shape, std, rng):
    """Random valid blocks, uint8 [..., bytes of a row], whose values have mean about 0 and standard deviation `std`."""
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[weight_type]]
    if shape[-1] % block_weights:
        raise ValueError(f"{weight_type} rows are multiples of {block_weights} values, got {shape[-1]}")
    count = int(np.prod(shape)) // block_weights
    blocks = np.frombuffer(rng.bytes(count * block_bytes), dtype=np.uint8).reshape(count, -1).copy()
    spread = rng.uniform(0.8, 1.25, count)
    if weight_type in ("Q4_0", "Q5_0", "IQ4_NL"):  # whose values have a mean below 0
        spread *= rng.choice([-1, 1], count)
    set_block_scale(blocks, weight_type, spread)
    with np.errstate(all="ignore"):
        spread *= std / np.sqrt(np.mean(dequantize(blocks, weight_type) ** 2))
    set_block_scale(blocks, weight_type, spread)
    return blocks.reshape(*shape[:-1], -1)


def set_block_scale(blocks, weight_type, d, minimum_per_scale=None):
    """Write the float16 scale d of blocks [..., bytes], and the scale of their minima where they have it."""
    ratio = MINIMUM_PER_SCALE.get(weight_type) if minimum_per_scale is None else minimum_per_scale
    for place, scale in zip(SCALE_PLACES[weight_type], (1.0, ratio)):
        blocks[..., place:place + 2] = np.asarray(scale * d, dtype="<f2")[..., None].view(np.uint8)


def random_tensor(weight_type, shape, std, rng):
    """Random weights of any supported type, as the array a GGUFWriter takes."""
    if weight_type in SCALE_PLACES and weight_type != "Q8_0":
        return random_blocks(weight_type, shape, std, rng)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[weight_type])


MIXES = ("Q3_K_M", "Q4_K_M", "Q5_K_M")
"""Mixes of types in the files that people share."""

FOR_SHORT_ROWS = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What mixes have in place of a type whose blocks of 256 do not fill the rows."""


def more_bits(layer, layers):
    """Whether mixes keep this layer's attn_v and ffn_down in a larger type: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def type_of(name, cols, types, config, tied):
    """The type of a matrix with rows of `cols`: `types` names a mix, or maps full names or kinds ('attn_v', 'output', ...) or 'default' to types."""
    parts = name.split(".")
    kind = parts[-2]
    if not isinstance(types, str):
        return types.get(name, types.get(kind, types.get("default", "F32")))
    if types not in MIXES:
        return types
    layer = int(parts[1]) if parts[0] == "blk" else 0
    chosen = "Q6_K" if kind == "output" or (kind == "token_embd" and tied) else type_in_mix(types, kind, layer, config.layers)
    return FOR_SHORT_ROWS[chosen] if cols % 256 else chosen


def type_in_mix(mix, kind, layer, layers):
    """The type of a matrix but the output, with rows of a multiple of 256, in a file of a mix of `MIXES`."""
    more = kind in ("attn_v", "ffn_down_exps") and more_bits(layer, layers)
    if mix == "Q3_K_M":
        if kind == "attn_v":
            return "Q5_K" if layer < 2 else "Q4_K"
        return "Q4_K" if kind == "attn_output" or more else "Q3_K"
    return "Q6_K" if more else mix.removesuffix("_M")


def matrices(config, tied):
    """(name, shape, standard deviation) of every weight that may be quantized."""
    c = config
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    yield "token_embd.weight", (c.vocab, c.hidden), LOGIT_STD * c.hidden ** -0.5 if tied else 1.0
    if not tied:
        yield "output.weight", (c.vocab, c.hidden), LOGIT_STD * c.hidden ** -0.5
    for layer in range(c.layers):
        prefix = f"blk.{layer}."
        yield prefix + "attn_q.weight", (queries, c.hidden), c.hidden ** -0.5
        yield prefix + "attn_k.weight", (keys, c.hidden), c.hidden ** -0.5
        yield prefix + "attn_v.weight", (keys, c.hidden), c.hidden ** -0.5
        yield prefix + "attn_output.weight", (c.hidden, queries), queries ** -0.5
        yield prefix + "ffn_gate_exps.weight", (c.experts, c.expert_ffn, c.hidden), c.hidden ** -0.5
        yield prefix + "ffn_up_exps.weight", (c.experts, c.expert_ffn, c.hidden), c.hidden ** -0.5
        yield prefix + "ffn_down_exps.weight", (c.experts, c.hidden, c.expert_ffn), 2 * c.expert_ffn ** -0.5


def float_tensors(config, rng):
    """(name, float32 values) of the norms and routers, which are F32 in every file."""
    c = config

    def around(mean, size):
        return (mean + 0.1 * rng.standard_normal(size)).astype(np.float32)

    yield "output_norm.weight", around(1.0, c.hidden)
    for layer in range(c.layers):
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", around(1.0, c.hidden)
        yield prefix + "attn_q_norm.weight", around(1.2, c.head_dim)
        yield prefix + "attn_k_norm.weight", around(1.2, c.head_dim)
        yield prefix + "ffn_norm.weight", around(1.0, c.hidden)
        yield prefix + "ffn_gate_inp.weight", (1.5 * c.hidden ** -0.5 * rng.standard_normal((c.experts, c.hidden))).astype(np.float32)


def write_tiny_model(path, *, config=TinyConfig(), types="F32", seed=0, tied=False, rope_scaling=None, vocabulary=None):
    """Write a random model to `path` and return the path; without a `Vocabulary` it gets a small one, padded to its size.

    types is a type for every matrix, such as 'F32' or 'Q4_K', a mix of `MIXES` such as 'Q4_K_M', or a mapping (see `type_of`).
    tied leaves output.weight out. rope_scaling is a `reference.RopeScaling`.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    write_metadata(writer, config, rope_scaling)
    write_vocabulary(writer, vocabulary or make_vocabulary(config.vocab))
    for name, values in float_tensors(config, rng):
        writer.add_tensor(name, values)
    for name, shape, std in matrices(config, tied):
        weight_type = type_of(name, shape[-1], types, config, tied)
        writer.add_tensor(name, random_tensor(weight_type, shape, std, rng), raw_dtype=gguf.GGMLQuantizationType[weight_type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(writer, config, rope_scaling):
    c = config
    writer.add_name("tiny random model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(3 * c.hidden)
    writer.add_expert_feed_forward_length(c.expert_ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_expert_count(c.experts)
    writer.add_expert_used_count(c.top_k)
    if rope_scaling is None:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling.kind))
    writer.add_rope_scaling_factor(rope_scaling.factor)
    if rope_scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope_scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(rope_scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope_scaling.beta_slow)
    if rope_scaling.attention_factor != 1:
        writer.add_rope_scaling_attn_factors(rope_scaling.attention_factor)


def write_vocabulary(writer, vocabulary):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_token_merges(vocabulary.merges)
    end_of_text, end_of_turn = vocabulary.tokens.index("<|endoftext|>"), vocabulary.tokens.index("<|im_end|>")
    writer.add_bos_token_id(end_of_text)
    writer.add_eos_token_id(end_of_turn)
    writer.add_eot_token_id(end_of_turn)
    writer.add_pad_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def tensor_digest(path):
    """SHA-256 over the names and bytes of all tensors: tells whether two files hold the same weights."""
    digest = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        digest.update(tensor.name.encode())
        digest.update(np.ascontiguousarray(tensor.data).tobytes())
    return digest.hexdigest()
