"""Makes the golden values in this folder; needs the extra `oracle`.

    python tests/golden/make_golden.py                          tiny models and RoPE: cases.json and one .npz each
    python tests/golden/make_golden.py --demo MODEL-f16.gguf    greedy texts of the demo model: demo_f16_greedy.json

Each case of cases.json says how to write its model again (tiny_models.write_tiny_model) and carries the digest of its tensors. An .npz holds
token_ids; whole logit rows at positions `rows`; at all positions the logits of ids `columns` and the log-sum-exp; from transformers in
float64 with eager attention and from llama.cpp with float32 KV.
"""
import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent
sys.path[:0] = [str(GOLDEN.parent), str(GOLDEN.parent / "oracle")]

from oracle import LlamaCpp, llama_cpp_logits, transformers_logits, transformers_model  # noqa: E402
from reference import RopeScaling, log_sum_exp  # noqa: E402
from tiny_models import TinyConfig, random_token_ids, tensor_digest, write_tiny_model  # noqa: E402

TOKENS = 48
ROWS = (0, 1, 17, TOKENS - 1)
COLUMNS = tuple(range(0, 512, 32))
YARN = RopeScaling("yarn", 4.0, original_context=32)
CASES = {
    "f32": dict(types="F32"),
    "f32_tied": dict(types="F32", tied=True),
    "f32_head_dim_64": dict(types="F32", config=TinyConfig(layers=2, heads=8, head_dim=64)),
    "f32_head_dim_96": dict(types="F32", config=TinyConfig(layers=2, heads=8, kv_heads=1, head_dim=96, hidden=160, expert_ffn=96, experts=5)),
    "f32_linear": dict(types="F32", rope_scaling=RopeScaling("linear", 8.0)),
    "f32_yarn": dict(types="F32", rope_scaling=YARN),
    "f16": dict(types="F16"),
    "bf16": dict(types="BF16"),
    "q8_0": dict(types="Q8_0"),
    "q4_k_m": dict(types="Q4_K_M"),
    "q4_k_m_tied": dict(types="Q4_K_M", tied=True),
}
ROPE = {
    "default": dict(rotary_dim=128, theta=1e6, scaling=None),
    "linear": dict(rotary_dim=128, theta=1e6, scaling=RopeScaling("linear", 4.0)),
    "yarn": dict(rotary_dim=128, theta=1e6, scaling=RopeScaling("yarn", 4.0, original_context=32768)),
    "yarn_attention_factor": dict(rotary_dim=64, theta=1e4, scaling=RopeScaling("yarn", 16.0, 4096, beta_fast=24.0, beta_slow=2.0, attention_factor=0.75)),
}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = (
    "Once upon a time",
    "One rainy morning, a small otter named Pip",
    "Anna and her brother found an old map in the attic.",
    "The baker was sad because the oven",
    "\"Wait for me!\" said the little goat.\n\n",
    "Every night the moon",
    CHAT.format("Tell me a story about a brave kitten."),
    CHAT.format("Tell me a story about a shy whale."),
    CHAT.format("Who are you?"),
    CHAT.format("What is the opposite of cold?"),
    CHAT.format("Hi!") + "Hello! What would you like to hear?<|im_end|>\n" + CHAT.format("A story about two friends and a bridge."),
)
NEW_TOKENS = 120
STOP_IDS = (0, 2)
LEAST_GAP = 2e-4
"""A prompt on whose way two logits come closer than this would ask for more than float32 can promise: choose another."""


def plain(scaling):
    return asdict(scaling) if scaling else None


def make_case(name, options, folder, seed):
    """Write one .npz and return its row of cases.json."""
    options = {"config": TinyConfig(), "tied": False, "rope_scaling": None, **options}
    path = write_tiny_model(folder / f"{name}.gguf", seed=seed, **options)
    token_ids = random_token_ids(options["config"], TOKENS, seed=seed)
    arrays = {"token_ids": token_ids, "rows": ROWS, "columns": COLUMNS}
    for oracle, logits in (("transformers", transformers_logits(path, token_ids)), ("llama_cpp", llama_cpp_logits(path, token_ids))):
        arrays[f"{oracle}_rows"] = logits[list(ROWS)].astype(np.float32)
        arrays[f"{oracle}_columns"] = logits[:, COLUMNS].astype(np.float32)
        arrays[f"{oracle}_log_sum_exp"] = log_sum_exp(logits.astype(np.float64))
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
    return {"name": name, "seed": seed, "types": options["types"], "tied": options["tied"], "config": asdict(options["config"]),
            "rope_scaling": plain(options["rope_scaling"]), "tensor_digest": tensor_digest(path)}


def make_rope():
    """Frequencies and factors of transformers' own RoPE functions."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    arrays = {}
    for name, case in ROPE.items():
        parameters = {"rope_type": "default", "rope_theta": case["theta"]}
        scaling = case["scaling"]
        if scaling:
            parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling and scaling.kind == "yarn":
            parameters |= {"original_max_position_embeddings": scaling.original_context, "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        embedding = Qwen3MoeRotaryEmbedding(Qwen3MoeConfig(head_dim=case["rotary_dim"], rope_parameters=parameters, max_position_embeddings=131072))
        arrays[f"{name}_frequencies"] = embedding.inv_freq.numpy()
        arrays[f"{name}_factor"] = embedding.attention_scaling * (scaling.attention_factor if scaling else 1.0)
    np.savez_compressed(GOLDEN / "rope.npz", **arrays)
    return {name: case | {"scaling": plain(case["scaling"])} for name, case in ROPE.items()}


def versions():
    import llama_cpp
    import torch
    import transformers

    return {"numpy": np.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "llama_cpp_python": llama_cpp.__version__}


def make_tiny():
    with tempfile.TemporaryDirectory() as folder:
        cases = [make_case(name, options, Path(folder), seed) for seed, (name, options) in enumerate(CASES.items(), start=100)]
    write_json("cases.json", {"versions": versions(), "rope": make_rope(), "cases": cases})


def greedy(model, prompt_ids):
    """Greedy continuation and, for each of its tokens, by how much its logit leads the next."""
    import torch

    ids, gaps, cache, fresh = [], [], None, prompt_ids
    with torch.no_grad():
        while len(ids) < NEW_TOKENS and not (ids and ids[-1] in STOP_IDS):
            out = model(torch.tensor([fresh]), past_key_values=cache, use_cache=True)
            first, second = out.logits[0, -1].topk(2).values.tolist()
            cache, fresh = out.past_key_values, [int(out.logits[0, -1].argmax())]
            ids += fresh
            gaps.append(round(first - second, 4))
    return ids, gaps


def make_greedy(path):
    """Greedy texts of the demo model in float32."""
    tokenizer, model, texts = LlamaCpp(path, context=512), transformers_model(path, "float32"), []
    for prompt in PROMPTS:
        prompt_ids = tokenizer.tokenize(prompt)
        ids, gaps = greedy(model, prompt_ids)
        if min(gaps) < LEAST_GAP:
            raise SystemExit(f"{prompt!r}: two logits are {min(gaps):.1e} apart, less than {LEAST_GAP}; choose another prompt")
        texts.append({"prompt": prompt, "prompt_ids": prompt_ids, "greedy_ids": ids, "min_top2_gap": min(gaps), "top2_gaps": gaps})
    write_json("demo_f16_greedy.json", {"versions": versions(), "tensor_digest": tensor_digest(path), "stop_ids": STOP_IDS, "max_new_tokens": NEW_TOKENS,
                                        "texts": texts})


def write_json(name, value):
    """Indented, but lists of numbers on one line."""
    lines, depth = [], 0
    for line in json.dumps(value, indent=1, ensure_ascii=False).splitlines():
        stripped = line.strip()
        number = stripped.rstrip(",").replace(".", "").replace("-", "").replace("e", "").isdigit()
        closes_numbers = stripped.startswith("]") and depth
        if number or closes_numbers:
            lines[-1] += stripped + (" " if number and stripped.endswith(",") else "")
        else:
            lines.append(line)
        depth = 1 if stripped.endswith("[") or number else 0
    (GOLDEN / name).write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", metavar="MODEL", help="the demo model's F16 file")
    arguments = parser.parse_args()
    if arguments.demo:
        make_greedy(arguments.demo)
    else:
        make_tiny()


if __name__ == "__main__":
    main()
