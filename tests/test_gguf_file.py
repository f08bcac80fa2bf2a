"""The GGUF reader: what gguf.GGUFWriter writes is read back, and whatever is wrong with a file is one named error."""

import os
import re
import struct
import subprocess
import sys
import tracemalloc
from array import array

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import TinyConfig, write_tiny_model

from ferrum.errors import ModelFileError
from ferrum.gguf_file import DEPTH_LIMIT, ELEMENT_LIMIT, ENTRY_LIMIT, HEADER_LIMIT, QUANT_TYPES, GGUFFile

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
F32, Q4_K = 0, 12


def string(text) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def entry(key, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def u32_entry(key, value: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", value))


def array_entry(key, item_type: int, count: int, items: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", item_type, count) + items)


def tensor(name, dims=(8,), type_id=F32, offset=0, num_dims=None) -> bytes:
    num_dims = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", num_dims, *dims, type_id, offset)


def image(entries=(), tensors=(), *, version=3, data=64, num_entries=None, num_tensors=None, alignment=32) -> bytes:
    """A whole file, with `data` bytes of tensor data."""
    num_entries = len(entries) if num_entries is None else num_entries
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    header = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(data)


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def refusal(path) -> str:
    """The text of the ModelFileError for `path`: at most three lines that name the file and end with advice."""
    with pytest.raises(ModelFileError) as caught:
        GGUFFile.open(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and text.endswith(".")
    assert len(text.splitlines()) <= 3 and len(text) < len(str(path)) + 400
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    return text


SCALARS = {
    "t.uint8": (250, "add_uint8"), "t.int8": (-5, "add_int8"), "t.uint16": (65000, "add_uint16"),
    "t.int16": (-30000, "add_int16"), "t.uint32": (2**32 - 5, "add_uint32"), "t.int32": (-(2**31), "add_int32"),
    "t.uint64": (2**63 + 5, "add_uint64"), "t.int64": (-(2**62), "add_int64"), "t.float32": (0.5, "add_float32"),
    "t.float64": (1e-300, "add_float64"), "t.true": (True, "add_bool"), "t.false": (False, "add_bool"),
    "t.string": ("naïve 🦙\n", "add_string"),
}
ARRAYS = {
    "t.strings": ["a", "", "Ġthe", "工作"], "t.ints": [1, -2, 3], "t.floats": [0.5, -1.5], "t.bools": [True, False],
    "t.nested": [[1, 2], [3]],
}


def write_sample(path, version=3, alignment=None) -> dict[str, np.ndarray]:
    """A file with every type of metadata and four tensors, whose raw bytes are returned."""
    rng = np.random.default_rng(7)
    tensors = {"f32.weight": rng.random((3, 5), np.float32), "f16.weight": rng.random((2, 3, 4)).astype(np.float16),
               "q4_k.weight": rng.integers(0, 256, (2, 3, 288), np.uint8), "scalar.weight": np.ones(1, np.float32)}
    writer = gguf.GGUFWriter(path, "qwen3moe")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, add) in SCALARS.items():
        getattr(writer, add)(key, value)
    for key, value in ARRAYS.items():
        writer.add_array(key, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_K if name.startswith("q4_k") else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", version))
    return tensors


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type_is_read_back(tmp_path, version):
    write_sample(tmp_path / "m.gguf", version)
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.version == version and file.architecture == "qwen3moe"
    assert file.paths == (str(tmp_path / "m.gguf"),) and file.file_bytes == os.path.getsize(file.paths[0])
    for key, (value, _) in SCALARS.items():
        assert file.metadata[key] == value and type(file.metadata[key]) is type(value), key
    assert list(file.metadata["t.strings"]) == ARRAYS["t.strings"] and file.metadata["t.strings"][2] == "Ġthe"
    assert file.metadata["t.ints"] == array("i", ARRAYS["t.ints"])
    assert file.metadata["t.floats"] == array("f", ARRAYS["t.floats"])
    assert file.metadata["t.bools"] == ARRAYS["t.bools"]
    assert [list(inner) for inner in file.metadata["t.nested"]] == ARRAYS["t.nested"]


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_tensor_offsets_and_shapes_are_those_written(tmp_path, alignment):
    written = write_sample(tmp_path / "m.gguf", alignment=alignment)
    file = GGUFFile.open(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    assert list(sorted(file.tensors)) == sorted(written)
    for name, data in written.items():
        found = file.tensors[name]
        assert content[found.offset:found.offset + found.nbytes] == data.tobytes(), name
        assert found.file_index == 0 and found.offset % (alignment or 32) == 0
    assert file.tensors["f16.weight"].shape == (2, 3, 4)
    assert file.tensors["q4_k.weight"].shape == (2, 3, 512)
    assert file.tensors["q4_k.weight"][1:3] == (Q4_K, "Q4_K")


def test_type_table_agrees_with_the_gguf_package():
    sizes = {int(type_id): (type_id.name, *size) for type_id, size in gguf.GGML_QUANT_SIZES.items()}
    common = QUANT_TYPES.keys() & sizes.keys()
    assert len(common) >= 30  # a package of another age may lack the newest types, or know more
    assert {type_id: tuple(QUANT_TYPES[type_id]) for type_id in common} == {id: sizes[id] for id in common}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)  # the writer leaves empty values out
int32s = st.integers(-(2**31), 2**31 - 1)
metadata_values = st.one_of(int32s, st.booleans(), texts, st.floats(width=32, allow_nan=False),
                            st.lists(int32s, min_size=1, max_size=20), st.lists(texts, min_size=1, max_size=20))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_.0-9]{0,20}", fullmatch=True), metadata_values, max_size=8))
@settings(max_examples=40, deadline=None)
def test_any_metadata_the_writer_takes_is_read_back(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("round") / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    kinds = {int: "add_int32", bool: "add_bool", str: "add_string", float: "add_float32", list: "add_array"}
    for key, value in metadata.items():
        getattr(writer, kinds[type(value)])("x." + key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile.open(path).metadata
    for key, value in metadata.items():
        assert (list(found["x." + key]) if isinstance(value, list) else found["x." + key]) == value


def test_the_demo_model_opens():
    path = os.path.join(os.path.dirname(__file__), "..", "ferrum", "data", "ferrum-storyteller-q4_k_m.gguf")
    if not os.path.exists(path):
        pytest.skip("the demo model is not in ferrum/data")
    file = GGUFFile.open(path)
    assert file.architecture == "qwen3moe" and len(file.metadata["tokenizer.ggml.tokens"]) == 4096
    assert file.tensors["blk.0.ffn_gate_exps.weight"].shape == (16, 256, 256)


def test_tensors_beyond_four_gigabytes_cost_nothing_to_open(tmp_path):
    dims = (1 << 20, 5 << 10)
    content = image([], [tensor("big", dims), tensor("after", (8,), offset=4 * dims[0] * dims[1])], data=0)
    path = write(tmp_path / "sparse.gguf", content)
    try:
        os.truncate(path, len(content) + 4 * dims[0] * dims[1] + 32)
    except OSError:
        pytest.skip("the file system has no room for a sparse file of 20 GiB")
    assert GGUFFile.open(path).tensors["after"].offset == len(content) + 4 * dims[0] * dims[1]


def test_the_file_is_closed_and_unmapped_after_open(tmp_path):
    path = tmp_path / "unmapped.gguf"
    write_sample(path)
    file = GGUFFile.open(path)
    if os.path.exists("/proc/self/maps"):
        assert "unmapped.gguf" not in open("/proc/self/maps").read()
        assert not any("unmapped.gguf" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                       if os.path.islink(f"/proc/self/fd/{fd}"))
    path.unlink()
    assert file.metadata["t.strings"] == ARRAYS["t.strings"]


def test_importing_the_reader_imports_nothing_heavy():
    code = ("import ferrum.gguf_file, sys; "
            "print([name for name in ('numpy', 'gguf', 'ferrum_native._native') if name in sys.modules])")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == "[]"


def write_split(directory) -> list[str]:
    writer = gguf.GGUFWriter(directory / "m.gguf", "qwen3moe", split_max_tensors=2)
    writer.add_string("t.note", "only the first shard says so")
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full(8, index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(str(path) for path in directory.iterdir())


def test_any_shard_opens_the_whole_model(tmp_path):
    paths = write_split(tmp_path)
    assert len(paths) == 3
    for path in paths:
        file = GGUFFile.open(path)
        assert file.paths == tuple(paths) and file.metadata["t.note"]
        assert file.file_bytes == sum(os.path.getsize(path) for path in paths)
        for index in range(5):
            found = file.tensors[f"t{index}"]
            with open(file.paths[found.file_index], "rb") as shard:
                shard.seek(found.offset)
                assert shard.read(found.nbytes) == np.full(8, index, np.float32).tobytes()


def test_a_missing_shard_is_named(tmp_path):
    paths = write_split(tmp_path)
    os.remove(paths[2])
    with pytest.raises(ModelFileError, match=r"m-00003-of-00003\.gguf: shard not found.*Fetch all shards"):
        GGUFFile.open(paths[0])


def test_a_renamed_shard_is_refused(tmp_path):
    paths = write_split(tmp_path)
    os.rename(paths[0], tmp_path / "model.gguf")
    assert "is one of 3 shards, but is not named like NAME-00001-of-00003.gguf" in refusal(tmp_path / "model.gguf")
    os.rename(tmp_path / "model.gguf", tmp_path / "other-00002-of-00003.gguf")
    assert "shard 1 of 3 by its metadata" in refusal(tmp_path / "other-00002-of-00003.gguf")


def split_image(number: int, count: int, tensors, total: int) -> bytes:
    return image([u32_entry("split.no", number), u32_entry("split.count", count),
                  u32_entry("split.tensors.count", total)], tensors)


@pytest.mark.parametrize("second, expected", [
    (split_image(1, 2, [tensor("b")], 3), "hold 2 tensors, 3 were split"),
    (split_image(1, 2, [tensor("a")], 3), "hold 2 tensors, 3 were split"),
    (split_image(1, 2, [tensor("a")], 2), "tensor 'a' is also in"),
    (split_image(0, 2, [tensor("b")], 2), "expected shard 2 of 2, its metadata says 1 of 2"),
    (split_image(1, 3, [tensor("b")], 2), "its metadata says 2 of 3"),
    (image([u32_entry("split.count", 2)], [tensor("b")]), "split.no is missing"),
])
def test_shards_that_do_not_belong_together_are_refused(tmp_path, second, expected):
    total = int(expected.partition("tensors, ")[2][:1] or 2)
    first = write(tmp_path / "m-00001-of-00002.gguf", split_image(0, 2, [tensor("a")], total))
    write(tmp_path / "m-00002-of-00002.gguf", second)
    with pytest.raises(ModelFileError, match=expected):
        GGUFFile.open(first)


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQB", UINT8, 1, 5)


DAMAGED = {
    "version_1": (image(version=1), "GGUF version 1 is not supported"),
    "version_0": (image(version=0), "version 0 is unknown"),
    "version_4": (image(version=4), "version 4 is unknown.*update ferrum"),
    "big_endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only_magic": (b"GGUF", "ends inside the header"),
    "half_header": (image()[:20], "ends inside the header"),
    "absurd_entries": (image(num_entries=1 << 62), "claims 4611686018427387904 metadata entries"),
    "absurd_tensors": (image(num_tensors=1 << 62), "claims 4611686018427387904 tensors"),
    "many_tensors": (image(num_tensors=ENTRY_LIMIT + 1, data=(ENTRY_LIMIT + 1) * 32), "at most 65536 are accepted"),
    "absurd_key": (image([struct.pack("<QI", 1 << 63, 0)]), "ends inside the key of metadata entry 1 of 1"),
    "empty_key": (image([u32_entry("", 1)]), "0 characters long"),
    "long_key": (image([u32_entry("k" * 65536, 1)]), "65536 characters long"),
    "key_not_utf8": (image([u32_entry(b"a\xff", 1)]), "key of metadata entry 1 of 1 is not UTF-8"),
    "value_not_utf8": (image([entry("a.b", STRING, string(b"\xe4\xf6"))]), "value of 'a.b' is not UTF-8"),
    "absurd_string": (image([entry("a.b", STRING, struct.pack("<Q", 2**64 - 1))]), "ends inside the value of 'a.b'"),
    "duplicate_key": (image([u32_entry("a.b", 1), u32_entry("a.b", 1)]), "'a.b' appears twice"),
    "unknown_type": (image([entry("a.b", 13, bytes(8))]), "'a.b' has the unknown metadata type 13"),
    "unknown_item_type": (image([array_entry("a.b", 77, 1, bytes(8))]), "unknown metadata type 77"),
    "odd_bool": (image([entry("a.b", BOOL, b"\2")]), "bool that is neither 0 nor 1"),
    "absurd_array": (image([array_entry("a.b", UINT64, 1 << 61, b"")]), "array of 2305843009213693952 elements"),
    "absurd_numbers": (image([array_entry("a.b", UINT64, 1 << 20, b"")]), "8388608 bytes needed"),
    "absurd_strings": (image([array_entry("a.b", STRING, 1 << 20, b"")]), "1048576 strings that runs out of bytes"),
    "string_too_long": (image([array_entry("a.b", STRING, 2, string("x") + struct.pack("<Q", 1 << 40))]),
                        "string 1 claims 1099511627776 bytes"),
    "absurd_nested": (image([array_entry("a.b", ARRAY, 1 << 20, b"")]), "claims 1048576 nested arrays"),
    "deep_nested": (image([entry("a.b", ARRAY, nested(DEPTH_LIMIT + 1))]), "nests arrays deeper than 4"),
    "alignment_7": (image([u32_entry("general.alignment", 7)]), "general.alignment is 7"),
    "alignment_4": (image([u32_entry("general.alignment", 4)]), "general.alignment is 4"),
    "alignment_0": (image([u32_entry("general.alignment", 0)]), "general.alignment is 0"),
    "alignment_48": (image([u32_entry("general.alignment", 48)]), "general.alignment is 48"),
    "alignment_text": (image([entry("general.alignment", STRING, string("32"))]), "general.alignment is a str"),
    "five_dims": (image([], [tensor("a", (1, 1, 1, 1, 1))]), "'a' has 5 dimensions"),
    "no_dims": (image([], [tensor("a", (1,), num_dims=0)]), "'a' has 0 dimensions"),
    "absurd_dims": (image([], [tensor("a", (1,), num_dims=2**32 - 1)]), "'a' has 4294967295 dimensions"),
    "zero_dim": (image([], [tensor("a", (8, 0))]), "'a' has a dimension of zero"),
    "overflowing_dims": (image([], [tensor("a", (2**63, 2**63, 2**63, 2**63))]), "lies outside the file"),
    "wrapping_dims": (image([], [tensor("a", (2**32, 2**32))]), "lies outside the file"),
    "unknown_quant": (image([], [tensor("a", type_id=99)]), "'a' has the unknown type id 99"),
    "withdrawn_quant": (image([], [tensor("a", type_id=31)]), "'a' has the unknown type id 31"),
    "broken_row": (image([], [tensor("a", (128, 2), Q4_K)]), "128 values, not a multiple of Q4_K's block of 256"),
    "misaligned": (image([], [tensor("a", offset=8)]), "starts at offset 8, .* not a multiple of the alignment 32"),
    "outside": (image([], [tensor("a", offset=64)]), "lies outside the file"),
    "far_outside": (image([], [tensor("a", offset=2**64 - 32)]), "lies outside the file"),
    "overlap": (image([], [tensor("a", (16,)), tensor("b", offset=32)], data=128), "'a' and 'b' overlap"),
    "duplicate_tensor": (image([], [tensor("a"), tensor("a", offset=32)]), "tensor name 'a' appears twice"),
    "name_not_utf8": (image([], [tensor(b"\xff")]), "entry 1 of 1 of the tensor table is not UTF-8"),
    "name_with_newlines": (image([], [tensor("a\n" * 300, type_id=99)]),
                           r"a\\na\\n.*\.\.\.' has the unknown type id 99"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_named_error(tmp_path, name):
    content, expected = DAMAGED[name]
    text = refusal(write(tmp_path / "m.gguf", content))
    assert re.search(expected, text), text


@pytest.mark.parametrize("content, expected", [
    (b"", "the file is empty"),
    (b"GG", "not a GGUF file"),
    (b"\x93NUMPY" + bytes(60), "not a GGUF file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"PK\3\4" + bytes(60), "zip or PyTorch"),
])
def test_other_files_are_told_apart(tmp_path, content, expected):
    assert expected in refusal(write(tmp_path / "m.gguf", content))


def test_paths_that_are_no_files_are_told_apart(tmp_path):
    assert "file not found" in refusal(tmp_path / "none.gguf")
    assert "it is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a regular file" in refusal(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("path", ["a\0b", b"a\0b", "\ud800.gguf"])
def test_a_path_that_no_file_can_have_is_refused(path):
    with pytest.raises(ModelFileError, match="no file can have this path") as caught:
        GGUFFile.open(path)
    assert "\0" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(tmp_path):
    path = write(tmp_path / "m.gguf", image())
    os.chmod(path, 0)
    assert "cannot be read" in refusal(path)


def test_a_string_array_that_is_not_utf8_is_refused_at_first_use(tmp_path):
    path = write(tmp_path / "m.gguf", image([array_entry("a.b", STRING, 2, string("x") + string(b"\xff"))]))
    strings = GGUFFile.open(path).metadata["a.b"]
    with pytest.raises(ModelFileError, match=r"m\.gguf: the value of 'a\.b': string 1 is not UTF-8"):
        list(strings)


def test_a_missing_architecture_is_named(tmp_path):
    file = GGUFFile.open(write(tmp_path / "m.gguf", image()))
    with pytest.raises(ModelFileError, match="general.architecture is missing"):
        file.architecture


def test_a_header_past_the_limit_is_refused(tmp_path):
    content = image([entry("a.b", STRING, struct.pack("<Q", HEADER_LIMIT))])
    path = write(tmp_path / "m.gguf", content)
    os.truncate(path, 2 * HEADER_LIMIT)
    assert "lies past the first 256 MiB" in refusal(path)


def test_elements_are_limited_over_all_arrays(tmp_path):
    half = array_entry("{}", UINT8, ELEMENT_LIMIT // 2 + 1, bytes(ELEMENT_LIMIT // 2 + 1))
    entries = [half.replace(string("{}"), string(key)) for key in ("a", "b")]
    assert "'b' is an array of 8388609 elements" in refusal(write(tmp_path / "m.gguf", image(entries)))


def test_arrays_are_limited_over_all_nestings(tmp_path):
    row = struct.pack("<IQ", ARRAY, 256) + 256 * struct.pack("<IQ", UINT8, 0)
    path = write(tmp_path / "m.gguf", image([array_entry("a", ARRAY, 256, 256 * row)]))
    assert "'a' is past the 65536 arrays" in refusal(path)


@pytest.mark.parametrize("name", [name for name in DAMAGED if "absurd" in name])
def test_absurd_counts_allocate_nothing(tmp_path, name):
    path = write(tmp_path / "m.gguf", DAMAGED[name][0])
    refusal(path)
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[bytes, str]:
    """The bytes of a sound file, and a path for damaged copies of it."""
    directory = tmp_path_factory.mktemp("fuzz")
    write_sample(directory / "sound.gguf")
    return (directory / "sound.gguf").read_bytes(), str(directory / "damaged.gguf")


def open_damaged(content: bytes, path: str) -> None:
    """Opening must work or be a ModelFileError, and so must reading the strings."""
    with open(path, "wb") as file:
        file.write(content)
    try:
        for value in GGUFFile.open(path).metadata.values():
            if hasattr(value, "tolist"):
                value.tolist()
    except ModelFileError as error:
        assert len(str(error).splitlines()) <= 3


def test_a_file_cut_anywhere_is_refused(sample):
    content, path = sample
    padding = -len(content) % 32
    for size in range(0, len(content) - padding - 32):
        with open(path, "wb") as file:
            file.write(content[:size])
        with pytest.raises(ModelFileError):
            GGUFFile.open(path)


@given(data=st.data())
@settings(max_examples=600, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bytes_never_escape_as_another_error(sample, data):
    content, path = sample
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    open_damaged(bytes(damaged), path)


@given(data=st.data())
@settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
def test_overwritten_counts_never_escape_as_another_error(sample, data):
    content, path = sample
    at = data.draw(st.integers(4, len(content) - 8))
    edges = st.sampled_from([2**31, 2**32 - 1, 2**61, 2**63, 2**64 - 1])
    value = data.draw(st.one_of(st.integers(0, 2**64 - 1), edges))
    open_damaged(content[:at] + struct.pack("<Q", value) + content[at + 8:], path)


def split_plainly(data: bytes, offset: int, count: int) -> tuple[list[str], int]:
    strings = []
    for _ in range(count):
        length = int.from_bytes(data[offset:offset + 8], "little")
        if offset + 8 + length > len(data):
            raise ValueError
        strings.append(data[offset + 8:offset + 8 + length].decode())
        offset += 8 + length
    return strings, offset


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(-2, 12), st.integers(-1, 8), st.binary(max_size=9))
@settings(max_examples=300, deadline=None)
def test_string_arrays_are_split_like_the_plain_loop(strings, offset, count, tail):
    from ferrum_native import _native

    data = b"".join(map(string, strings)) + tail
    try:
        assert 0 <= offset <= len(data) and count >= 0, "outside"
        expected = split_plainly(data, offset, count)
    except (ValueError, AssertionError):
        with pytest.raises(ValueError):
            _native.split_strings(data, offset, count)
        return
    assert _native.split_strings(data, offset, count) == expected
    assert _native.skip_strings(data, offset, count) == expected[1]


def test_merges_are_split_at_their_space(tmp_path):
    path = write(tmp_path / "m.gguf", image([array_entry("m", STRING, 2, string("a bc") + string("Ġ ü"))]))
    merges = GGUFFile.open(path).metadata["m"]
    assert merges.merges() == [("a", "bc"), ("Ġ", "ü")] and merges == ["a bc", "Ġ ü"]
    for bad in (" ", "a", "", "a ", " a"):
        path = write(tmp_path / "m.gguf", image([array_entry("m", STRING, 1, string(bad))]))
        with pytest.raises(ModelFileError, match="'m': string 0 is not two parts with a space between them"):
            GGUFFile.open(path).metadata["m"].merges()


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=5000)
def test_noise_after_the_magic_never_escapes_as_another_error(sample, noise):
    open_damaged(b"GGUF" + struct.pack("<I", 3) + noise, sample[1])


def test_the_fingerprint_tells_models_apart_and_survives_a_move(tmp_path):
    one = write_tiny_model(tmp_path / "one.gguf", config=TinyConfig(layers=1, experts=4))
    other = write_tiny_model(tmp_path / "other.gguf", config=TinyConfig(layers=1, experts=4), seed=1)
    fingerprint = GGUFFile.open(one).fingerprint()
    assert len(fingerprint) == 64 and fingerprint != GGUFFile.open(other).fingerprint()
    os.rename(one, tmp_path / "moved.gguf")
    assert GGUFFile.open(tmp_path / "moved.gguf").fingerprint() == fingerprint
    data = bytearray((tmp_path / "moved.gguf").read_bytes())
    data[GGUFFile.open(tmp_path / "moved.gguf").tensors["blk.0.attn_q.weight"].offset] ^= 1
    (tmp_path / "moved.gguf").write_bytes(data)
    assert GGUFFile.open(tmp_path / "moved.gguf").fingerprint() != fingerprint
    file = GGUFFile.open(tmp_path / "moved.gguf")
    os.unlink(tmp_path / "moved.gguf")
    with pytest.raises(ModelFileError, match="moved.gguf: cannot be read"):
        file.fingerprint()
