"""A sequence that is saved and loaded goes on with the bits that it would have had; files that are not its own are refused by name."""

import json
import os
import resource
from dataclasses import replace

import numpy as np
import pytest
from reference import as_stored, dequantize
from tiny_models import TinyConfig, random_token_ids, write_tiny_model

from ferrum import session_file
from ferrum.errors import ContextFull, DeviceError, KVPoolExhausted, SessionFileError, UnknownSequence
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine

CONFIG = TinyConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=2, expert_ffn=96, vocab=512, context=256)
TOKENS = random_token_ids(CONFIG, 75)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return GGUFFile.open(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", config=CONFIG, types="Q8_0"))


def save(path, engine, model, sequence, tokens):
    session_file.save(path, engine, model, tokens, engine.export_kv(sequence))


def load(path, engine, model, sequence):
    tokens, kv = session_file.load(path, engine, model)
    engine.import_kv(sequence, tokens[: kv.shape[2]], kv)
    return tokens


def engine_of(model, **options):
    return Engine(model, **{"threads": 1, "kv_tokens": 256, "device": "cpu", **options})


@pytest.fixture
def saved(model, tmp_path):
    """A file of a sequence of 75 tokens."""
    with engine_of(model) as engine:
        engine.prefill(7, TOKENS)
        save(tmp_path / "saved", engine, model, 7, TOKENS)
    return tmp_path / "saved"


@pytest.fixture
def engine(model):
    with engine_of(model) as engine:
        yield engine


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, change):
    """Write the file anew with its header changed in place by `change`."""
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(engine, model, path, match):
    before = engine.stats()
    with pytest.raises(SessionFileError, match=match) as caught:
        load(path, engine, model, 3)
    assert str(caught.value).startswith(f"{path}: ") and engine.stats() == before


@pytest.mark.parametrize("kv_type", ["f16", "f32", "q8_0"])
@pytest.mark.parametrize("length", [1, 16, 17, 75])
def test_a_loaded_sequence_goes_on_with_the_same_bits(model, tmp_path, kv_type, length):
    path, more = tmp_path / "saved", random_token_ids(CONFIG, 30, seed=2)
    with engine_of(model, kv_type=kv_type) as engine:
        engine.prefill(0, TOKENS[:length])
        save(path, engine, model, 0, TOKENS[:length])
        expected = [np.array(engine.prefill(0, more)), np.array(engine.decode(0, 5))]
    with engine_of(model, kv_type=kv_type, poison_freed_kv=True) as engine:
        engine.prefill(1, random_token_ids(CONFIG, 100, seed=3))
        engine.release(1)
        assert load(path, engine, model, 4) == TOKENS[:length]
        assert engine.length(4) == length
        assert np.array_equal(expected, [np.array(engine.prefill(4, more)), np.array(engine.decode(4, 5))])


def test_what_was_loaded_is_found_by_prompts_that_begin_so(engine, model, saved):
    load(saved, engine, model, 0)
    assert engine.cached_prefix(TOKENS) == (64, 4)


def test_tokens_that_were_not_computed_are_saved_too(engine, model, tmp_path):
    engine.prefill(0, TOKENS[:20])
    save(tmp_path / "saved", engine, model, 0, TOKENS[:22])
    assert load(tmp_path / "saved", engine, model, 1) == TOKENS[:22] and engine.length(1) == 20
    with pytest.raises(ValueError, match="keys and values of 20 tokens were given with 19 tokens"):
        save(tmp_path / "saved", engine, model, 0, TOKENS[:19])
    with pytest.raises(UnknownSequence):
        save(tmp_path / "saved", engine, model, 9, TOKENS)


def test_the_file_holds_nothing_but_the_tokens_of_its_sequence(engine, model, saved):
    header, data = header_of(saved)
    assert header["kv"] == {"dtype": "F16", "shape": [2, 2, 75, 2, 32], "data_offsets": [300, 300 + 2 * 2 * 75 * 2 * 32 * 2]}
    assert header["tokens"] == {"dtype": "I32", "shape": [75], "data_offsets": [0, 300]}
    assert np.frombuffer(data, "<i4", 75).tolist() == TOKENS and len(data) == header["kv"]["data_offsets"][1]
    assert sorted(os.listdir(saved.parent)) == ["saved"]


def test_keys_and_values_of_q8_0_are_saved_as_the_blocks_of_gguf(model, tmp_path):
    path = tmp_path / "saved"
    exported = {}
    for kv_type in ("f32", "q8_0"):
        with engine_of(model, kv_type=kv_type) as engine:
            engine.prefill(0, TOKENS)
            exported[kv_type] = engine.export_kv(0)
            save(path, engine, model, 0, TOKENS)
    header, data = header_of(path)
    assert header["kv"] == {"dtype": "U8", "shape": [2, 2, 75, 2, 34], "data_offsets": [300, 300 + 2 * 2 * 75 * 2 * 34]}
    rows = np.frombuffer(data, np.uint8, offset=300).reshape(2, 2, 75, 2, 34)
    assert np.array_equal(rows, exported["q8_0"])
    stored = dequantize(rows.reshape(-1, 34), "Q8_0").reshape(2, 2, 75, 2, 32)
    assert np.array_equal(stored[0], as_stored(exported["f32"][0], "q8_0"))  # of the first layer, which no attention came before


def test_another_model_is_refused(model, saved, tmp_path):
    for index, config in enumerate((CONFIG, replace(CONFIG, layers=1))):
        other = GGUFFile.open(write_tiny_model(tmp_path / f"{index}.gguf", config=config, types="Q8_0", seed=9))
        with engine_of(other) as engine:
            refused(engine, other, saved, "is of another model. Load the model that it was saved with")


@pytest.mark.parametrize("options,match", [
    ({"kv_type": "f32"}, "was saved with kv_type f16, this engine has f32"),
    ({"kv_type": "q8_0"}, "was saved with kv_type f16, this engine has q8_0"),
    ({"activations": "float32"}, "was saved with activations int8, this engine has float32"),
])
def test_other_options_are_refused(model, saved, options, match):
    with engine_of(model, **options) as engine:
        refused(engine, model, saved, match)


@pytest.mark.parametrize("name,value,match", [
    ("version", "2", "has version 2 of the format, this ferrum reads 1. Update ferrum"),
    ("version", "x", "has version x of the format"),
    ("format", "pt", "is not a saved session of ferrum"),
    ("device", "metal", "was saved with device metal, this engine has cpu"),
    ("head_dim", "64", "was saved with head_dim 64, this engine has 32"),
    ("sha256", "0" * 64, "do not match their checksum"),
])
def test_a_header_that_differs_is_named(engine, model, saved, name, value, match):
    rewrite(saved, lambda header: header["__metadata__"].update({name: value}))
    refused(engine, model, saved, match)


@pytest.mark.parametrize("change", [
    lambda header: header.pop("kv"),
    lambda header: header["kv"].update(shape=[2, 2, 75, 2]),
    lambda header: header["kv"].update(shape=[2, 2, -75, 2, -32]),
    lambda header: header["kv"].update(shape=[2, 2, "75", 2, 32]),
    lambda header: header["kv"].update(dtype="BF16"),
    lambda header: header["tokens"].update(shape=[74]),
    lambda header: header["tokens"].update(data_offsets=[0, 1 << 60]),
    lambda header: header.update(kv=7),
])
def test_a_header_that_contradicts_itself_is_refused(engine, model, saved, change):
    rewrite(saved, change)
    refused(engine, model, saved, "its header contradicts itself")


def test_every_damaged_byte_is_seen(engine, model, saved):
    data = saved.read_bytes()
    for at in [*range(0, len(data), 997), len(data) - 1]:
        saved.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        refused(engine, model, saved, "^.*saved: .")


def test_a_file_that_was_cut_short_is_refused(engine, model, saved):
    data = saved.read_bytes()
    for length in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        refused(engine, model, saved, "cut short")
    saved.write_bytes(data + b"x")
    refused(engine, model, saved, "added to")


def test_what_is_no_session_is_refused(engine, model, tmp_path):
    refused(engine, model, tmp_path / "missing", "cannot be read")
    refused(engine, model, tmp_path, "cannot be read|is not a saved session")
    (tmp_path / "text").write_bytes(b"\x10" + bytes(7) + b"no json at all!!" + b"more")
    refused(engine, model, tmp_path / "text", "its header cannot be read")
    refused(engine, model, os.fspath(model.paths[0]), "is not a saved session")


def test_a_file_stays_as_it_was_where_writing_fails(engine, model, saved):
    before = saved.read_bytes()
    engine.prefill(0, TOKENS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a full disk
    try:
        with pytest.raises(SessionFileError, match="cannot be written .File too large."):
            save(saved, engine, model, 0, TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["saved"]
    with pytest.raises(SessionFileError, match="cannot be written"):
        save(saved / "below a file", engine, model, 0, TOKENS)


def test_a_session_that_does_not_fit_starts_nothing(model, saved):
    with engine_of(model, kv_tokens=64) as engine:
        with pytest.raises((KVPoolExhausted, ContextFull)):
            load(saved, engine, model, 0)
        assert engine.stats()["kv_blocks_free"] == 4 and engine.stats()["live_sequences"] == 0


def test_a_live_sequence_is_not_overwritten(engine, model, saved):
    engine.prefill(3, [1, 2])
    with pytest.raises(ValueError, match="sequence 3 is live already"):
        load(saved, engine, model, 3)
    assert engine.length(3) == 2


def test_an_import_that_fails_starts_nothing(model):
    with engine_of(model) as engine:
        engine.prefill(0, TOKENS)
        kv = engine.export_kv(0)
    with engine_of(model, fail_at=0) as engine:
        with pytest.raises(DeviceError):
            engine.import_kv(0, TOKENS, kv)
        assert engine.stats()["kv_blocks_free"] == 16 and engine.cached_prefix(TOKENS) == (0, 0)
        engine.import_kv(0, TOKENS, kv)
        assert np.array_equal(engine.export_kv(0), kv)


def test_keys_and_values_of_another_shape_or_type_are_refused(engine):
    engine.prefill(0, TOKENS)
    kv = engine.export_kv(0)
    for tokens, given in ((TOKENS[:-1], kv), (TOKENS, kv.astype("f4")), (TOKENS, kv[:1]), ([], kv[:, :, :0]), ([600] * 75, kv)):
        with pytest.raises(ValueError):
            engine.import_kv(1, tokens, given)
    engine.import_kv(1, TOKENS, np.asfortranarray(kv))
    assert np.array_equal(engine.export_kv(1), kv)
