"""What callers may give as prompts, params and messages, and what it becomes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from time import perf_counter
from typing import Any

import numpy as np

from ferrum.request import Terms
from ferrum.sampling import SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]

_ADVICE = "Give a str, or token ids as whole numbers."
# What people pass to the chat functions of other libraries, and what none of the templates reads.
_NOT_FOR_TEMPLATES = frozenset({"use_tqdm", "lora_request", "chat_template_content_format", "mm_processor_kwargs", "stream"})


def several(prompts: Any) -> list[Any]:
    """A list of prompts; a single one is a text, whole numbers or a mapping."""
    single = isinstance(prompts, (str, bytes, bytearray, memoryview, Mapping, set, frozenset)) or getattr(prompts, "ndim", 1) == 0
    if single or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and _is_whole_number(prompts[0]) else prompts


def text_or_ids(prompt: Any, what: str = "The prompt") -> str | list[int]:
    """A prompt as text or token ids: those of {"prompt": ...} or {"prompt_token_ids": ...} too, as vLLM takes them."""
    if isinstance(prompt, Mapping):
        given = [name for name in ("prompt_token_ids", "prompt") if prompt.get(name) is not None]
        if not given:
            raise TypeError(f"{what} is a {type(prompt).__name__} without 'prompt' or 'prompt_token_ids'. {_ADVICE}")
        prompt = prompt[given[0]]
    return prompt if isinstance(prompt, str) else _checked_ids(prompt, what)


def params_for(prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """Params for each prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, (SamplingParams, str, Mapping)) or not isinstance(params, Iterable):
        return [checked_params(params)] * len(prompts)
    params = [checked_params(each) for each in params]
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(params)} sampling_params were given. Give one for all, or one each.")
    return params


def checked_params(params: Any) -> SamplingParams:
    """`params`, or the default of None."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params is {repr(params)[:40]}. Give SamplingParams(...), or a list of one for each prompt.")
    return params


def checked_terms(priority: Any, timeout: Any) -> Terms:
    """How a request is to be served that is made now."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority is {priority!r}: give a whole number; lower ones come first.")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
        raise TypeError(f"timeout is {timeout!r}: give seconds, or None.")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is {timeout}: give seconds above 0, or None to wait as long as it takes.")
    return Terms(priority, None if timeout is None else perf_counter() + timeout)


def conversations(messages: Any) -> list[Any]:
    """A list of conversations; a single one has messages, which are mappings."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages is {type(messages).__name__}: give a list of messages, which have role and content, or a list of such lists.")
    messages = list(messages)
    return [messages] if not messages or isinstance(messages[0], Mapping) else messages


def joined_parts(message: Any) -> Any:
    """A message whose content is a list of texts, with them as one text: most templates take no lists, and some drop them silently."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)) or not content:
        return message
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "\n".join(texts)}


def template_variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a template; those of `chat_template_kwargs`, as vLLM calls them, too. TypeError for what is plainly something else."""
    options = dict(options)
    options.update(options.pop("chat_template_kwargs", None) or {})
    sampling = {field.name for field in fields(SamplingParams)}
    for name in options:
        if name in sampling:
            raise TypeError(f"{name} is a field of SamplingParams: pass SamplingParams({name}=...).")
        if name in _NOT_FOR_TEMPLATES:
            raise TypeError(f"there is no argument {name}: further names are variables of the chat template.")
    return options


def _is_whole_number(value: Any) -> bool:
    """Whether it may be a token id; arrays of more than one number have `__index__` too."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _checked_ids(prompt: Any, what: str) -> list[int]:
    """Token ids as ints; bytes and truth values, which Python takes for whole numbers, are refused."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(f"{what} is {type(prompt).__name__}, not text: decode it first. {_ADVICE}")
    if isinstance(prompt, (set, frozenset)) or not isinstance(prompt, Iterable) or getattr(prompt, "ndim", 1) == 0:
        raise TypeError(f"{what} is {type(prompt).__name__}. {_ADVICE}")
    given = list(prompt)
    for id in given:
        if isinstance(id, (bool, np.bool_)) or not _is_whole_number(id):
            raise TypeError(f"{what} has the token id {repr(id)[:40]}. {_ADVICE}")
    return [operator.index(id) for id in given]
