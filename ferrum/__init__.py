"""ferrum: Qwen3-MoE language models inside a Python process.

    from ferrum import LLM, SamplingParams

    with LLM() as llm:
        for output in llm.generate(["Once upon a time", "The little fox"], SamplingParams(max_tokens=64, seed=1)):
            print(output.prompt + output.outputs[0].text)

`import ferrum` loads nothing heavy: every name below is imported at first use.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it as true; the typing module is half of the import time

__version__ = "0.1.0"

_HOME = {
    "LLM": "ferrum.llm",
    "AsyncLLM": "ferrum.async_llm",
    "AsyncStream": "ferrum.async_llm",
    "Stream": "ferrum.stream",
    "Session": "ferrum.stream",
    "RequestOutput": "ferrum.outputs",
    "CompletionOutput": "ferrum.outputs",
    "Logprob": "ferrum.outputs",
    "Piece": "ferrum.outputs",
    "Score": "ferrum.outputs",
    "Usage": "ferrum.outputs",
    "Timings": "ferrum.outputs",
    "SamplingParams": "ferrum.sampling",
    "Plan": "ferrum.memory_plan",
    "plan": "ferrum.memory_plan",
    "EngineOptions": "ferrum.options",
    "GGUFFile": "ferrum.gguf_file",
    "Tokenizer": "ferrum.tokenizer",
    "IncrementalDetokenizer": "ferrum.tokenizer",
    "ChatTemplate": "ferrum.chat_template",
    "Engine": "ferrum_native._native",
    "FerrumError": "ferrum.errors",
    "ModelFileError": "ferrum.errors",
    "UnsupportedModelError": "ferrum.errors",
    "SessionFileError": "ferrum.errors",
    "KVPoolExhausted": "ferrum.errors",
    "ContextFull": "ferrum.errors",
    "UnknownSequence": "ferrum.errors",
    "LogitRowsExceeded": "ferrum.errors",
    "StaleLogits": "ferrum.errors",
    "Cancelled": "ferrum.errors",
    "EngineClosed": "ferrum.errors",
    "DeviceError": "ferrum.errors",
    "OutOfMemory": "ferrum.errors",
    "OptionError": "ferrum.errors",
    "ChatTemplateError": "ferrum.errors",
    "BatchError": "ferrum.errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from ferrum.async_llm import AsyncLLM as AsyncLLM, AsyncStream as AsyncStream
    from ferrum.chat_template import ChatTemplate as ChatTemplate
    from ferrum import batch as batch
    from ferrum.errors import (
        BatchError as BatchError,
        Cancelled as Cancelled,
        ChatTemplateError as ChatTemplateError,
        ContextFull as ContextFull,
        DeviceError as DeviceError,
        EngineClosed as EngineClosed,
        FerrumError as FerrumError,
        KVPoolExhausted as KVPoolExhausted,
        LogitRowsExceeded as LogitRowsExceeded,
        ModelFileError as ModelFileError,
        OptionError as OptionError,
        SessionFileError as SessionFileError,
        OutOfMemory as OutOfMemory,
        StaleLogits as StaleLogits,
        UnknownSequence as UnknownSequence,
        UnsupportedModelError as UnsupportedModelError,
    )
    from ferrum.gguf_file import GGUFFile as GGUFFile
    from ferrum.llm import LLM as LLM
    from ferrum.options import EngineOptions as EngineOptions
    from ferrum.outputs import (
        CompletionOutput as CompletionOutput,
        Logprob as Logprob,
        Piece as Piece,
        RequestOutput as RequestOutput,
        Score as Score,
        Timings as Timings,
        Usage as Usage,
    )
    from ferrum.memory_plan import Plan as Plan, plan as plan
    from ferrum.sampling import SamplingParams as SamplingParams
    from ferrum.stream import Session as Session, Stream as Stream
    from ferrum.tokenizer import IncrementalDetokenizer as IncrementalDetokenizer, Tokenizer as Tokenizer
    from ferrum_native._native import Engine as Engine


def __getattr__(name: str):
    if name == "batch":
        return import_module("ferrum.batch")
    if name not in _HOME:
        raise AttributeError(f"module 'ferrum' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
