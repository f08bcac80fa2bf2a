"""Text to token ids and back: the byte-level BPE of the Qwen family, built from a GGUF file's metadata.

Encoding is that of the family's own tokenizer: text is normalised to NFC, split by the qwen2 expression, and
merged over a byte-level alphabet. Added tokens are matched first, in the text as given, before normalisation.
"""

from __future__ import annotations

import codecs
import gc
import re
from array import array
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cached_property
from typing import NoReturn

from ferrum.errors import ModelFileError, UnsupportedModelError
from ferrum.gguf_file import GGUFFile, StringArray

# How text is split before merging, by tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
             r"|\s+(?!\S)|\s+",
}
# Token types of tokenizer.ggml.token_type, as in llama.cpp's llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # they end a text whatever the file names as eos

_PADDING = re.compile(r"\[PAD\d+\]")
_CONVERT = "Convert the model anew with a current llama.cpp."


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in token texts: itself if printable in latin-1, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(256 + index), byte) for index, byte in enumerate(others))
    return alphabet


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """The tokenizer of one model.

    `control_ids` are never part of plain text (`<|im_start|>`), `unused_ids` pad the vocabulary and must never be
    sampled, `stop_ids` end a generation; ids the file does not name are None.
    """

    def __init__(self, fields: _Fields):
        self._tokens = fields.tokens
        self._added = frozenset(fields.control + fields.user_defined + fields.unused)
        self.vocab_size = len(fields.tokens)
        self.control_ids: tuple[int, ...] = fields.control
        self.unused_ids: tuple[int, ...] = fields.unused
        self.bos_id = fields.token_id("bos")
        self.eos_id = fields.token_id("eos")
        self.eot_id = fields.token_id("eot")
        self.pad_id = fields.token_id("padding")
        self.add_bos: bool = fields.add_bos
        self.chat_template: str | None = fields.chat_template
        named = {id for id in self.control_ids if self._tokens[id] in STOP_TOKENS}
        self.stop_ids = frozenset(named | {id for id in (self.eos_id, self.eot_id) if id is not None})
        self._control = frozenset(self.control_ids)
        self._with_control, self._without_control = fields.build()

    @property
    def plain_ids(self) -> list[int]:
        """Ids of plain text: no added tokens, padding, or tokens that end a text."""
        special = self._added | self.stop_ids
        return [id for id in range(self.vocab_size) if id not in special]

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer described by a file's metadata.

        Raises UnsupportedModelError for another kind of tokenizer, ModelFileError where its parts do not fit together.
        """
        with _gc_paused():
            return cls(_Fields(file))

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The ids of `text`.

        With `parse_special` control tokens written in the text become their ids; without, they are plain text
        (use it for what users wrote). User-defined tokens such as `<think>` are matched either way. `add_bos` None
        does what the file asks for. Raises ValueError for lone surrogates, and for a bos the model has not.
        """
        add_bos = self.add_bos if add_bos is None else add_bos
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos is set, but the model has no bos token. Pass add_bos=False.")
        tokenizer = self._with_control if parse_special else self._without_control
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has a lone surrogate at index {error.start}, which is no character. Decode "
                             f"it with errors='replace' where it is read.") from None
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos else ids

    def fewest_tokens(self, text: str) -> int:
        """A number of ids that `encode(text)` gives at least, found without encoding."""
        if text.isascii():
            nbytes = len(text)
        else:
            nbytes = len(text.encode("utf-8", "surrogatepass")) // 3  # NFC keeps at least a third (U+212A to K)
        return -(-nbytes // self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of the longest token; each character of a normal one stands for a byte."""
        return max(max(map(len, self._tokens)), *(len(self._tokens[id].encode()) for id in self._added), 1)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `skip_special` leaves control tokens out."""
        return b"".join(self._pieces(ids, skip_special)).decode("utf-8", "replace")

    def _pieces(self, ids: Iterable[int], skip_special: bool) -> Iterable[bytes]:
        for id in ids:
            if not (skip_special and id in self._control):
                yield self.token_bytes(id)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` adds to a text; they may end inside a UTF-8 character."""
        text = self.token_text(id)
        if id not in self._added:
            try:
                return bytes([_BYTE_OF[character] for character in text])
            except KeyError:
                pass  # not written in the byte alphabet: the text stands for itself
        return text.encode()

    def token_text(self, id: int) -> str:
        """Token `id` as the file writes it: byte-level for normal tokens (`Ġthe`), plain for added ones."""
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size}. Pass ids of this model.")
        return self._tokens[id]


class IncrementalDetokenizer:
    """Turns token ids into text as they come; the pieces put together are what `decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.control_ids) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a UTF-8 character is still open."""
        piece = self._tokenizer.token_bytes(token_id)
        return "" if token_id in self._skipped else self._decoder.decode(piece)

    def flush(self) -> str:
        """The rest, at the end: U+FFFD where a character was left open. Afterwards a new text may begin."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class _Fields:
    """The tokenizer's part of a file's metadata, checked."""

    def __init__(self, file: GGUFFile):
        self.path = file.paths[0]
        self.metadata = file.metadata
        self.pattern = self.read_pattern()
        self.tokens: list[str] = self.strings("tokenizer.ggml.tokens").tolist()
        if not self.tokens:
            self.fail("tokenizer.ggml.tokens is empty")
        self.control, self.user_defined, self.unused = self.read_types()
        if len(self.unused) == len(self.tokens):
            self.fail("tokenizer.ggml.token_type marks every token as unused: there is nothing to generate")
        self.add_bos: bool = self.optional("tokenizer.ggml.add_bos_token", bool, False)
        if self.add_bos and self.token_id("bos") is None:
            self.fail("tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is missing")
        self.chat_template = self.optional("tokenizer.chat_template", str, None)

    def fail(self, what: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: {what}. {_CONVERT}")

    def read_pattern(self) -> str:
        model = self.metadata.get("tokenizer.ggml.model")
        pre = self.metadata.get("tokenizer.ggml.pre")
        if model is None:
            self.fail("tokenizer.ggml.model is missing: the file has no tokenizer")
        if model != "gpt2":
            self.unsupported("tokenizer.ggml.model", model, ["gpt2"])
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            self.unsupported("tokenizer.ggml.pre", pre, sorted(PRE_TOKENIZERS))
        return PRE_TOKENIZERS[pre]

    def unsupported(self, key: str, value, supported: list[str]) -> NoReturn:
        shown = "missing" if value is None else repr(value)[:80]
        raise UnsupportedModelError(f"{self.path}: {key} is {shown}, supported is {', '.join(supported)}. "
                                    f"Use a model of the Qwen2 or Qwen3 family, converted with a current llama.cpp.")

    def optional(self, key: str, kind: type, default):
        value = self.metadata.get(key, default)
        if value is not default and type(value) is not kind:
            self.fail(f"{key} is of type {type(value).__name__} ({kind.__name__} expected)")
        return value

    def strings(self, key: str) -> StringArray:
        value = self.metadata.get(key)
        if not isinstance(value, StringArray):
            self.fail(f"{key} is {'missing' if value is None else 'not an array of strings'}")
        return value

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        id = self.optional(key, int, None)
        if id is not None and not 0 <= id < len(self.tokens):
            self.fail(f"{key} is {id}, the vocabulary has {len(self.tokens)} tokens")
        return id

    def read_types(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Ids of the control, user-defined and unused tokens."""
        key = "tokenizer.ggml.token_type"
        types = self.metadata.get(key)
        if not isinstance(types, array):
            self.fail(f"{key} is {'missing' if types is None else 'not an array of numbers'}: control tokens cannot "
                      f"be told from text")
        if len(types) != len(self.tokens):
            self.fail(f"{key} has {len(types)} entries for {len(self.tokens)} tokens")
        by_type: dict[int, list[int]] = {CONTROL: [], USER_DEFINED: [], UNUSED: []}
        for id, type_ in enumerate(types):
            if type_ == NORMAL:
                continue
            if type_ not in (UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
                self.fail(f"{key} of token {id} is {str(type_)[:40]} (1 to 6 expected)")
            # Older converters wrote padding as user-defined tokens.
            if type_ == USER_DEFINED and _PADDING.fullmatch(self.tokens[id]):
                type_ = UNUSED
            if type_ in by_type:
                by_type[type_].append(id)
        return tuple(by_type[CONTROL]), tuple(by_type[USER_DEFINED]), tuple(by_type[UNUSED])

    def build(self):
        """Two tokenizers over one BPE model: one matches control tokens in text, one does not."""
        from tokenizers import AddedToken, Tokenizer, models

        vocab = dict(zip(self.tokens, range(len(self.tokens))))
        missing = [byte for character, byte in _BYTE_OF.items() if character not in vocab]
        if missing:
            self.fail(f"tokenizer.ggml.tokens lacks {len(missing)} of the 256 single bytes, such as {missing[0]:#04x}")
        try:
            bpe = models.BPE(vocab, self.strings("tokenizer.ggml.merges").merges())
        except ModelFileError:
            raise
        except Exception as error:  # the library has no error class of its own
            self.fail(f"tokenizer.ggml.merges does not fit the vocabulary ({error})")
        user_defined = [AddedToken(self.tokens[id], normalized=False, special=False) for id in self.user_defined]
        control = [AddedToken(self.tokens[id], normalized=False, special=True) for id in self.control]
        pair = Tokenizer(bpe), Tokenizer(bpe)
        for tokenizer, added in zip(pair, (user_defined + control, user_defined)):
            self.add_text_stages(tokenizer)
            tokenizer.add_tokens(added)
        return pair

    def add_text_stages(self, tokenizer) -> None:
        from tokenizers import Regex, normalizers, pre_tokenizers

        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])


@contextmanager
def _gc_paused():
    """No garbage collection while half a million strings and tuples are made: none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
