"""The tokenizer: ids against vectors and an independent encoder, special tokens, and streaming of text."""

import gc
import pathlib
import random
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ferrum.errors import ModelFileError, UnsupportedModelError
from ferrum.gguf_file import GGUFFile
from ferrum.tokenizer import IncrementalDetokenizer, Tokenizer
from qwen_vocab import VOCAB_SIZE, Vocab, byte_alphabet, in_byte_alphabet, oracle_encode, qwen_vocab, write_vocab

DATA = pathlib.Path(__file__).parent / "data"
DEMO = pathlib.Path(__file__).parent.parent / "ferrum" / "data" / "ferrum-storyteller-q4_k_m.gguf"

MERGED = ["he", "ll", "hell", "hello", "\u0120w", "Ã©"]  # the last two are " w" and "é" in the byte alphabet
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 w", "Ã ©"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "[PAD266]", "[PAD267]"]
ENDOFTEXT, IM_START, IM_END, THINK, PAD_USER_DEFINED, PAD_UNUSED = range(262, 268)
# The first 256 ids are the bytes themselves.
SMALL = Vocab(byte_alphabet() + MERGED + ADDED, [1] * 262 + [3, 3, 3, 4, 4, 5], MERGES)


def load(path) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile.open(path))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    """All bytes, six merges, and every kind of added token."""
    def add(writer):
        writer.add_bos_token_id(ENDOFTEXT)
        writer.add_eos_token_id(IM_END)
        writer.add_add_bos_token(False)
    return load(write_vocab(tmp_path_factory.mktemp("small") / "small.gguf", SMALL, add))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Tokenizer:
    """The 151,936 tokens of Qwen2 and Qwen3."""
    return load(write_vocab(tmp_path_factory.mktemp("qwen") / "qwen.gguf", qwen_vocab()))


def vectors() -> list[tuple[str, list[int]]]:
    with open(DATA / "qwen2.inp", encoding="utf-8", newline="") as file:
        *texts, after_last = file.read().split("\n__ggml_vocab_test__\n")
    assert after_last == ""
    ids = [[int(id) for id in line.split()] for line in (DATA / "qwen2.out").read_text().splitlines()]
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("text, ids", vectors())
def test_vectors_of_the_family_are_met(qwen, text, ids):
    assert qwen.encode(text) == ids
    assert qwen.decode(ids) == unicodedata.normalize("NFC", text)


SAMPLES = [
    "Hello, y'all! I'LL we'Ve it'S don't 'tis 'RE 'x ''s 'ſ 'LL's",
    "0 12 345 6,789.01 ½ ² Ⅷ ٣٤٥ १२३ 四五 1a2b3c",
    "a  b   c\t\td \t e\r\nf\r\r\n\ng\n \n  \n   h\v\fi \u00a0j\u2003 k\u3000\u2028l\u0085m   ",
    "工作 한국어 ひらがな カタカナ עברית العربية हिन्दी ไทย ខ្មែរ ქართული ελληνικά ᏣᎳᎩ ⵜⵉⴼⵉⵏⴰⵖ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😶‍🌫️ 🇩🇪🇫🇷 👍🏽 ❤️‍🔥 1️⃣ 🦙🦙",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f\u200b\u200d\ufeff\ufffd\ufffe\U000e0001\U0010ffff",
    "def f(x):\n    return {'a': [x**2 // 3]}  # über\n\n\n\tif not f(1):\r\n\t\tpass\n",
    "e\u0301 A\u030a \u1e9b\u0323 \u212b \u2126 q\u0307\u0323 \u1100\u1161\u11a8 \u0958",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n<|im_end|><|endoftext|><|im_|>",
    "[PAD151700] <|extra_0|> <||> <think <tool_call>{}</tool_call>",
    "",
]


@pytest.mark.parametrize("text", SAMPLES)
def test_samples_of_scripts_and_spaces_equal_the_oracle(qwen, text):
    assert qwen.encode(text) == oracle_encode(text)


def test_every_character_equals_the_oracle(qwen):
    """Each character between letters, after a space, beside digits and newlines; alike what this Unicode lacks."""
    for code in (*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 997)):
        text = f"ab{chr(code)}cd {chr(code)}1{chr(code)} \n{chr(code)}"
        assert qwen.encode(text) == oracle_encode(text), hex(code)


scraps = st.sampled_from([
    " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "1", "23", "a", "The", "工", "é", "e\u0301", "!", "...", "👩‍👧",
    "\u200d", "\ufe0f", "<|im_end|>", "<think>", "<|", "|>", "\u00a0", "\u0e33", "ក\u17d2",
])
any_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40)
mixed_text = st.lists(st.one_of(scraps, any_text), max_size=20).map("".join)


def joins_across_added_tokens(text: str) -> bool:
    """A mark right after an added token would, in the oracle, be composed with its last character."""
    normalised = unicodedata.normalize("NFC", text)
    return any(normalised.count(token) != text.count(token) for token in ("<|im_end|>", "<think>"))


@given(mixed_text)
@settings(max_examples=400, deadline=None)
def test_random_text_equals_the_oracle(qwen, text):
    if not joins_across_added_tokens(text):
        assert qwen.encode(text) == oracle_encode(text)


def test_added_tokens_are_matched_before_normalisation(qwen):
    end = qwen.encode("<|im_end|>")
    assert qwen.encode("<|im_end|>\u0338") == end + qwen.encode("\u0338")


@given(mixed_text)
@settings(max_examples=200, deadline=None)
def test_decoding_gives_the_text_in_nfc(qwen, text):
    if not joins_across_added_tokens(text):
        for parse_special in (True, False):
            assert qwen.decode(qwen.encode(text, parse_special=parse_special)) == unicodedata.normalize("NFC", text)


def test_attributes_of_the_qwen_vocabulary(qwen):
    assert qwen.vocab_size == VOCAB_SIZE
    assert qwen.stop_ids == {151643, 151645} and qwen.control_ids == tuple(range(151643, 151657))
    assert qwen.unused_ids == tuple(range(151669, VOCAB_SIZE))
    assert qwen.token_text(151667) == "<think>" and qwen.token_bytes(151667) == b"<think>"
    assert qwen.bos_id is None and qwen.eos_id is None and not qwen.add_bos


def test_every_qwen_token_gives_its_bytes(qwen):
    for id, text in enumerate(qwen_vocab().tokens[:151643]):
        assert in_byte_alphabet(qwen.token_bytes(id)) == text
    assert {qwen.token_bytes(id) for id in range(256)} == {bytes([byte]) for byte in range(256)}


def test_merges_and_bytes_make_the_ids(small):
    assert small.encode("hello w!") == [259, 260, ord("!")]
    assert small.token_bytes(ord("!")) == b"!" and small.token_bytes(260) == b" w"
    assert small.encode("e\u0301") == small.encode("é") == [261]
    assert small.encode("") == []


def test_control_tokens_in_text_are_special_only_where_asked(small):
    assert small.encode("<|im_end|>") == [IM_END]
    plain = small.encode("<|im_end|>", parse_special=False)
    assert not set(plain) & set(small.control_ids) and small.decode(plain) == "<|im_end|>"


def test_user_defined_tokens_are_always_matched_and_kept(small):
    for parse_special in (True, False):
        assert small.encode("a<think>", parse_special=parse_special)[1:] == [THINK]
    assert small.decode([IM_START, THINK, IM_END], skip_special=True) == "<think>"
    assert small.decode([IM_START, THINK, IM_END]) == "<|im_start|><think><|im_end|>"


def test_padding_is_unused_and_never_matched(small):
    assert small.unused_ids == (PAD_USER_DEFINED, PAD_UNUSED)
    for text in ("[PAD266]", "[PAD267]"):
        assert not set(small.encode(text)) & set(small.unused_ids)


def test_stop_ids_hold_eos_eot_and_the_named_control_tokens(small, tmp_path):
    assert small.eos_id == IM_END and small.stop_ids == {IM_END, ENDOFTEXT}

    def add(writer):
        writer.add_eos_token_id(5)
        writer.add_eot_token_id(IM_START)
        writer.add_pad_token_id(ENDOFTEXT)
    tokenizer = load(write_vocab(tmp_path / "m.gguf", SMALL, add))
    assert tokenizer.stop_ids == {5, IM_START, IM_END, ENDOFTEXT} and tokenizer.eot_id == IM_START
    assert tokenizer.pad_id == ENDOFTEXT and tokenizer.bos_id is None
    with pytest.raises(ValueError, match="no bos token"):
        tokenizer.encode("hello", add_bos=True)


def test_add_bos_is_obeyed(small, tmp_path):
    assert small.bos_id == ENDOFTEXT and small.encode("hello") == [259]
    assert small.encode("hello", add_bos=True) == [ENDOFTEXT, 259]

    def add(writer):
        writer.add_bos_token_id(IM_START)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")
    tokenizer = load(write_vocab(tmp_path / "m.gguf", SMALL, add))
    assert tokenizer.encode("hello") == [IM_START, 259] and tokenizer.encode("") == [IM_START]
    assert tokenizer.encode("hello", add_bos=False) == [259]
    assert tokenizer.chat_template == "{{ messages }}" and small.chat_template is None


def test_ids_outside_the_vocabulary_are_refused(small):
    for id in (-1, small.vocab_size, 2**40):
        with pytest.raises(ValueError, match=f"token id {id} is not in the vocabulary of 268"):
            small.decode([id])


def test_lone_surrogates_are_refused(small):
    with pytest.raises(ValueError, match="lone surrogate at index 2"):
        small.encode("ab\ud800c")


def test_garbage_collection_is_as_before(tmp_path):
    path = write_vocab(tmp_path / "m.gguf", SMALL)
    load(path)
    assert gc.isenabled()
    gc.disable()
    try:
        load(path)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_demo_model_stops_at_both_ends():
    if not DEMO.exists():
        pytest.skip("the demo model is not in ferrum/data")
    tokenizer = load(DEMO)
    assert tokenizer.vocab_size == 4096 and tokenizer.eos_id == 2 and tokenizer.stop_ids == {0, 2}
    assert tokenizer.encode("<|im_start|>")[0] == 1 and not tokenizer.add_bos and "im_start" in tokenizer.chat_template
    text = "Once upon a time, a fox met a naïve 🦙."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def pieces_of(tokenizer: Tokenizer, ids, skip_special: bool) -> list[str]:
    stream = IncrementalDetokenizer(tokenizer, skip_special=skip_special)
    return [stream.push(id) for id in ids] + [stream.flush()]


@given(st.lists(st.integers(0, len(SMALL.tokens) - 1), max_size=60), st.booleans())
@settings(max_examples=400, deadline=None)
def test_streamed_pieces_are_the_whole_text(small, ids, skip_special):
    whole = small.decode(ids, skip_special=skip_special)
    assert "".join(pieces_of(small, ids, skip_special)) == whole
    kept = [id for id in ids if not (skip_special and id in small.control_ids)]
    assert whole == b"".join(map(small.token_bytes, kept)).decode("utf-8", "replace")


@given(any_text)
@settings(max_examples=200, deadline=None)
def test_streamed_text_never_shows_half_a_character(small, text):
    pieces = pieces_of(small, list(text.encode()), skip_special=False)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces) and pieces[-1] == ""


def test_a_character_left_open_is_replaced_at_the_end(small):
    llama = list("🦙".encode())
    assert pieces_of(small, llama[:3], skip_special=False) == ["", "", "", "\ufffd"]
    stream = IncrementalDetokenizer(small)
    stream.push(llama[0])
    stream.flush()
    assert [stream.push(id) for id in llama] == ["", "", "", "🦙"]


def test_qwen_tokens_stream_as_they_decode(qwen):
    rng = random.Random(5)
    for _ in range(50):
        ids = [rng.randrange(qwen.vocab_size) for _ in range(100)]
        assert "".join(pieces_of(qwen, ids, skip_special=False)) == qwen.decode(ids)


def changed(**fields):
    return SMALL._replace(**fields)


WRONG = {
    "short_types": (changed(types=[1] * 5), None, "token_type has 5 entries for 268 tokens"),
    "odd_type": (changed(types=[1] * 267 + [9]), None, "token_type of token 267 is 9"),
    "merge_of_one": (changed(merges=["h e", "hello"]), None, "merges': string 1 is not two parts"),
    "merge_unknown": (changed(merges=["h e", "q q"]), None, "merges does not fit the vocabulary"),
    "merge_of_unknown": (changed(merges=["工 作"]), None, "merges does not fit the vocabulary"),
    "byte_missing": (changed(tokens=["xx"] + SMALL.tokens[1:]), None, "lacks 1 of the 256 single bytes, such as 0x00"),
    "eos_outside": (SMALL, lambda writer: writer.add_eos_token_id(268), "eos_token_id is 268, the vocabulary has 268"),
    "bos_outside": (SMALL, lambda writer: writer.add_bos_token_id(2**31), "bos_token_id is 2147483648"),
    "bos_is_text": (SMALL, lambda writer: writer.add_string("tokenizer.ggml.bos_token_id", "1"), "is of type str"),
    "add_bos_without_bos": (SMALL, lambda writer: writer.add_add_bos_token(True), "bos_token_id is missing"),
    "template_is_number": (SMALL, lambda writer: writer.add_uint32("tokenizer.chat_template", 1), "is of type int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_fit_are_one_named_error(tmp_path, name):
    vocab, add, expected = WRONG[name]
    with pytest.raises(ModelFileError, match=expected) as caught:
        load(write_vocab(tmp_path / "m.gguf", vocab, add))
    assert "m.gguf" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("key, value, expected", [
    ("tokenizer.ggml.model", "llama", r"tokenizer.ggml.model is 'llama', supported is gpt2"),
    ("tokenizer.ggml.pre", "llama-bpe", r"tokenizer.ggml.pre is 'llama-bpe', supported is qwen2"),
    ("tokenizer.ggml.pre", None, r"tokenizer.ggml.pre is missing, supported is qwen2"),
])
def test_other_tokenizers_are_refused_by_name(tmp_path, key, value, expected):
    file = GGUFFile.open(write_vocab(tmp_path / "m.gguf", SMALL))
    file.metadata[key] = value
    with pytest.raises(UnsupportedModelError, match=expected):
        Tokenizer.from_gguf(file)


@pytest.mark.parametrize("key", ["model", "tokens", "merges", "token_type"])
def test_a_missing_part_is_named(tmp_path, key):
    file = GGUFFile.open(write_vocab(tmp_path / "m.gguf", SMALL))
    del file.metadata["tokenizer.ggml." + key]
    with pytest.raises(ModelFileError, match=f"tokenizer.ggml.{key} is missing"):
        Tokenizer.from_gguf(file)


@given(data=st.data())
@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_vocabularies_never_escape_as_another_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    content = bytearray(pathlib.Path(write_vocab(path, SMALL)).read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(24, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tokenizer = load(path)
    except ModelFileError:
        return
    assert tokenizer.decode(tokenizer.encode("hello w", parse_special=False)) is not None
