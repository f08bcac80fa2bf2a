"""Logits of other implementations for a GGUF file: `transformers` (on the dequantized weights) and llama.cpp. Needs the extra `oracle`."""
from __future__ import annotations

import math

import gguf
import numpy as np

KV_TYPES = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def transformers_model(path, dtype):
    """Qwen3MoeForCausalLM with eager attention and experts, holding the file's dequantized weights in `dtype` ('float64' or 'float32')."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    reader = gguf.GGUFReader(path)
    metadata = {name.removeprefix("qwen3moe."): field.contents() for name, field in reader.fields.items() if name.startswith("qwen3moe.")}
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    config = Qwen3MoeConfig(
        vocab_size=len(tensors["token_embd.weight"]), hidden_size=metadata["embedding_length"], intermediate_size=metadata["feed_forward_length"],
        num_hidden_layers=metadata["block_count"], num_attention_heads=metadata["attention.head_count"],
        num_key_value_heads=metadata["attention.head_count_kv"], head_dim=metadata["attention.key_length"],
        rms_norm_eps=metadata["attention.layer_norm_rms_epsilon"], max_position_embeddings=metadata["context_length"],
        rope_parameters=rope_parameters(metadata), num_experts=metadata["expert_count"], num_experts_per_tok=metadata["expert_used_count"],
        moe_intermediate_size=metadata["expert_feed_forward_length"], norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        tie_word_embeddings=False, attention_bias=False, use_sliding_window=False, pad_token_id=None)
    config._attn_implementation = config._experts_implementation = "eager"
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.load_state_dict(state_dict(tensors, config.num_hidden_layers), strict=True)
    return model


def rope_parameters(metadata):
    """transformers' rope_parameters from GGUF metadata without the architecture prefix."""
    kind = metadata.get("rope.scaling.type", "none")
    parameters = {"rope_type": "default" if kind == "none" else kind, "rope_theta": metadata["rope.freq_base"]}
    if kind == "none":
        return parameters
    parameters["factor"] = metadata["rope.scaling.factor"]
    if kind == "yarn":
        parameters |= {"original_max_position_embeddings": metadata["rope.scaling.original_context_length"],
                       "beta_fast": metadata["rope.scaling.yarn_beta_fast"], "beta_slow": metadata["rope.scaling.yarn_beta_slow"]}
        if "rope.scaling.attn_factor" in metadata:
            parameters["attention_factor"] = metadata["rope.scaling.attn_factor"] * (0.1 * math.log(parameters["factor"]) + 1)
    return parameters


def state_dict(tensors, num_layers):
    """GGUF tensors under the names transformers uses; gate and up are one tensor there."""
    import torch

    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"],
             "lm_head.weight": tensors.get("output.weight", tensors["token_embd.weight"])}
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
             "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
    for layer in range(num_layers):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        for name, other in names.items():
            state[f"{theirs}{other}.weight"] = tensors[f"{ours}{name}.weight"]
        state[f"{theirs}mlp.experts.gate_up_proj"] = torch.cat([tensors[f"{ours}ffn_gate_exps.weight"], tensors[f"{ours}ffn_up_exps.weight"]], dim=1)
        state[f"{theirs}mlp.experts.down_proj"] = tensors[f"{ours}ffn_down_exps.weight"]
    return state


def transformers_logits(path, token_ids, dtype="float64"):
    """Logits [T, V] as float64. transformers rounds norms, both softmaxes and RoPE to float32 whatever the dtype: agreement ends at 1e-6."""
    import torch

    with torch.no_grad():
        return transformers_model(path, dtype)(torch.tensor([list(token_ids)])).logits[0].double().numpy()


class LlamaCpp:
    """llama.cpp on the CPU with logits of every position."""

    def __init__(self, path, *, context, kv_type="f32", batch=256, threads=2, flash_attention=False):
        from llama_cpp import Llama

        kv = int(KV_TYPES[kv_type])
        self._llama = Llama(model_path=str(path), n_ctx=context, n_batch=batch, n_ubatch=batch, n_threads=threads, n_threads_batch=threads,
                            n_gpu_layers=0, logits_all=True, type_k=kv, type_v=kv, flash_attn=flash_attention, verbose=False)

    def logits(self, token_ids):
        """Logits [T, V] float32 of one sequence from position 0; forgets the sequence before."""
        self._llama.reset()
        self._llama.eval(list(token_ids))
        return np.array(self._llama.scores[:len(token_ids)], dtype=np.float32)

    def tokenize(self, text):
        """Ids of text with its control tokens, no bos."""
        return self._llama.tokenize(text.encode(), add_bos=False, special=True)


def llama_cpp_logits(path, token_ids, **options):
    """Logits [T, V] of llama.cpp for one sequence."""
    return LlamaCpp(path, context=max(512, len(token_ids)), **options).logits(token_ids)
