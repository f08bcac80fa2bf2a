"""What a decode step must read from memory, which bounds its speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ferrum.gguf_file import GGUFFile


def distinct_experts(config: dict[str, Any], batch: int) -> float:
    """How many different experts of a layer a step of `batch` tokens reads, if each token takes any top_k of them alike.

    Of E experts a token leaves one out with probability 1 - K / E, and all tokens together with its power.
    """
    experts = config["num_experts"]
    return experts * (1 - (1 - config["top_k"] / experts) ** batch)


def decode_step_bytes(file: GGUFFile, config: dict[str, Any], kv_bytes_per_token: int, batch: int, context: float) -> float:
    """Bytes that one decode step of `batch` sequences must read, where attention sees `context` tokens of each.

    Every weight as stored, once, of expert stacks [E, rows, columns] the share of `distinct_experts`; and keys and values. The embedding
    table counts where it is the output head too; the rows that are gathered from it, and activations, are left out. `config` is that
    of the engine.
    """
    share = distinct_experts(config, batch) / config["num_experts"]
    weights = 0.0
    for tensor in file.tensors.values():
        if tensor.name != "token_embd.weight" or config["tied_embeddings"]:
            weights += tensor.nbytes * (share if len(tensor.shape) == 3 else 1)
    return weights + batch * context * kv_bytes_per_token
