"""The reference against `transformers` and llama.cpp themselves; needs the extra `oracle`."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import reference  # noqa: E402
from reference import ReferenceModel, RopeScaling  # noqa: E402
from tiny_models import TinyConfig, random_token_ids, write_tiny_model  # noqa: E402

pytestmark = pytest.mark.oracle
TOKENS = 256
YARN = RopeScaling("yarn", 4.0, original_context=64)
MODELS = {
    "f32": dict(types="F32"),
    "f32_tied_head_dim_64": dict(types="F32", tied=True, config=TinyConfig(heads=8, head_dim=64)),
    "f32_linear": dict(types="F32", rope_scaling=RopeScaling("linear", 2.0)),
    "f32_yarn": dict(types="F32", rope_scaling=YARN),
    "f32_yarn_attention_factor": dict(types="F32", rope_scaling=RopeScaling("yarn", 4.0, original_context=64, attention_factor=1.25)),
    "q8_0": dict(types="Q8_0"),
    "q4_k_m": dict(types="Q4_K_M"),
    "q6_k_tied": dict(types="Q6_K", tied=True),
    "q5_k_m": dict(types="Q5_K_M"),
    "q3_k_m": dict(types="Q3_K_M"),
    "q2_k": dict(types="Q2_K"),
    **{kind.lower(): dict(types=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS")},
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request, tmp_path_factory):
    """Name, path and token ids of a tiny model."""
    options = MODELS[request.param]
    path = write_tiny_model(tmp_path_factory.mktemp("oracle") / f"{request.param}.gguf", seed=42, **options)
    return request.param, path, random_token_ids(options.get("config", TinyConfig()), TOKENS, seed=7)


def test_reference_equals_transformers(model):
    pytest.importorskip("torch", reason="needs the extra oracle: torch is not installed")
    pytest.importorskip("transformers", reason="needs the extra oracle: transformers is not installed")
    from oracle import transformers_logits

    _, path, token_ids = model
    distances = reference.relative_l2(transformers_logits(path, token_ids), ReferenceModel(path).logits(token_ids))
    # transformers rounds angles to float32, 1e-5 at position 255; a token whose routing hangs on that may differ more.
    assert np.median(distances) < 2e-6 and np.quantile(distances, 0.98) < 1e-4


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_reference_agrees_with_llama_cpp(model, kv_type):
    pytest.importorskip("llama_cpp", reason="needs the extra oracle: llama-cpp-python is not installed")
    from oracle import llama_cpp_logits

    name, path, token_ids = model
    got = llama_cpp_logits(path, token_ids, kv_type=kv_type)
    exact = reference.logit_statistics(ReferenceModel(path).logits(token_ids), got)
    if name.startswith("f32"):
        assert exact["median_relative_l2"] < (1e-5 if kv_type == "f32" else 2e-3)
    else:
        assert exact["median_relative_l2"] < 8e-2 and exact["median_kl"] < 2e-2
    if ("_k" in name or name == "iq4_xs") and kv_type == "f32":  # types with blocks of 256
        simulated = ReferenceModel(path, activations="int8", kv_type=kv_type, max_factor=1).logits(token_ids)
        assert reference.logit_statistics(simulated, got)["median_relative_l2"] < 0.75 * exact["median_relative_l2"]
