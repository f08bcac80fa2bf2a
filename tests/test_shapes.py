"""The shapes of the real models, as sparse files: checked, planned and opened whole; one layer of each runs."""

import os

import gguf
import numpy as np
import pytest
from tiny_models import TinyConfig, float_tensors, make_vocabulary, matrices, type_of, write_metadata, write_vocabulary

from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine, plan

REAL = dict(kv_heads=4, head_dim=128, experts=128, top_k=8, vocab=151936)
MODELS = {
    "Qwen3-30B-A3B": TinyConfig(layers=48, hidden=2048, heads=32, expert_ffn=768, context=40960, **REAL),
    "Qwen3-Coder-30B-A3B": TinyConfig(layers=48, hidden=2048, heads=32, expert_ffn=768, context=262144, rope_theta=1e7, **REAL),
    "Qwen3-235B-A22B": TinyConfig(layers=94, hidden=4096, heads=64, expert_ffn=1536, context=40960, **REAL),
}
GIB = 1 << 30


def tensor_list(config):
    """(name, shape, type) of all tensors of a Q4_K_M file."""
    norms = TinyConfig(layers=config.layers, hidden=8, head_dim=config.head_dim, experts=1)  # for the names alone
    H, D, E = config.hidden, config.head_dim, config.experts
    sizes = {"attn_q_norm": (D,), "attn_k_norm": (D,), "ffn_gate_inp": (E, H)}
    for name, _ in float_tensors(norms, np.random.default_rng(0)):
        yield name, sizes.get(name.split(".")[-2], (H,)), "F32"
    for name, shape, _ in matrices(config, tied=False):
        yield name, shape, type_of(name, shape[-1], "Q4_K_M", config, False)


def write_sparse_model(path, config, vocabulary):
    """A file whose header is whole and whose weights are a hole: zeros that take no disk."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    write_metadata(writer, config, None)
    write_vocabulary(writer, vocabulary)
    data = 0
    for name, shape, kind in tensor_list(config):
        weight_type = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[weight_type]
        row = shape[-1] // block * block_bytes if kind != "F32" else shape[-1]
        raw = (*shape[:-1], row)
        nbytes = int(np.prod(raw)) * (4 if kind == "F32" else 1)
        writer.add_tensor_info(name, raw, np.dtype(np.float32 if kind == "F32" else np.uint8), nbytes, raw_dtype=None if kind == "F32" else weight_type)
        data += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-os.path.getsize(path) // 32) * 32
    os.truncate(path, header + data)
    return GGUFFile.open(path)


@pytest.fixture(scope="module")
def vocabulary():
    return make_vocabulary(REAL["vocab"])


@pytest.mark.slow_under_sanitizers
@pytest.mark.parametrize("name", MODELS)
def test_a_real_shape_is_checked_planned_and_opened(name, tmp_path, vocabulary):
    config = MODELS[name]
    try:
        file = write_sparse_model(tmp_path / "sparse.gguf", config, vocabulary)
    except OSError as error:
        pytest.skip(f"this file system takes no sparse file of that size: {error}")
    planned = plan(file, threads=2, kv_tokens=4096)
    read = planned["config"]
    expected = {"num_layers": config.layers, "hidden_size": config.hidden, "num_heads": config.heads, "head_dim": 128, "num_experts": 128, "top_k": 8,
                "expert_ffn_size": config.expert_ffn, "vocab_size": 151936, "context_length": config.context, "rope_theta": config.rope_theta}
    assert {key: read[key] for key in expected} == expected
    assert planned["kv_bytes_per_token"] == config.layers * 2 * 4 * 128 * 2  # 96 KiB with 48 layers
    assert planned["weights_bytes"] == pytest.approx((17.3 if config.layers == 48 else 132) * GIB, rel=0.05)
    assert planned["scratch_bytes"] < GIB // 4
    with Engine(file, threads=2, kv_tokens=4096) as engine:
        assert engine.kv_capacity == 4096


@pytest.mark.slow_under_sanitizers
@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-235B-A22B"])
def test_one_layer_of_a_real_shape_runs(name, tmp_path, vocabulary):
    config = TinyConfig(**{**vars(MODELS[name]), "layers": 1})
    file = write_sparse_model(tmp_path / "layer.gguf", config, vocabulary)
    with Engine(file, threads=2, kv_tokens=64) as engine:
        logits = np.asarray(engine.prefill(0, [1, 2, 3]))
        assert logits.shape == (151936,) and not logits.any()  # all weights are zero
        assert engine.candidates(3).ids.tolist() == [[0, 1, 2]]
