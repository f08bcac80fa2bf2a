"""The public API: a loaded model that continues texts."""

from __future__ import annotations

import logging
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from ferrum.chat_template import ChatTemplate
from ferrum.engine_loop import EngineLoop, Retained
from ferrum.errors import ContextFull, EngineClosed, KVPoolExhausted, ModelFileError, OptionError
from ferrum.gguf_file import GGUFFile
from ferrum.options import available_memory, resolve
from ferrum.outputs import CompletionOutput, Piece, RequestOutput, Score
from ferrum.request import Request, Scoring
from ferrum.sampler import Sampler
from ferrum.sampling import SamplingParams
from ferrum.tokenizer import Tokenizer
from ferrum_native._native import Engine, plan

logger = logging.getLogger("ferrum")
logger.addHandler(logging.NullHandler())

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Progress = Callable[[int, int], None]

# Smaller files are read as they are used: nobody would see them come.
_WORTH_READING_AHEAD = 256 << 20  # bytes


class Stream:
    """A running generation of one text: iterate it for Pieces; afterwards `output` holds the whole.

    The text goes on only while somebody waits for its next piece. Close the stream (or leave its `with` block, or drop it) to end early:
    its KV cache is released, where a step is running by the next one, and `output` holds what was generated. One
    thread at a time may iterate a stream; any thread, and a signal handler, may close it.
    """

    def __init__(self, loop: EngineLoop, request: Request, session: Retained | None = None):
        self._loop = loop
        self._request = request
        self._session = session
        self._of: Session | None = None  # a session is closed with the last that uses it
        self._submitted = False
        self._raised = False
        self.prompt_token_ids: list[int] = request.prompt_token_ids

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        request = self._request
        assert request.stream is not None
        if not request.stream and not request.finished:
            self._wait()
        with suppress(IndexError):  # at the end, and where a signal handler has closed the stream a moment ago
            return request.stream.popleft()
        if request.error is not None and not self._raised:
            self._raised = True
            raise request.error
        raise StopIteration

    @property
    def output(self) -> RequestOutput:
        """The result, once the stream has ended or was closed; RuntimeError before."""
        if not self._request.finished:
            raise RuntimeError("The stream has not ended. Iterate it to its end, or close it, before reading its output.")
        return self._request.output()

    @property
    def completion(self) -> CompletionOutput:
        """The text of `output`."""
        return self.output.outputs[0]

    @property
    def prompt_tokens_read(self) -> int:
        """How many tokens of the prompt are in the KV cache; any thread may ask."""
        return min(self._request.texts[0].sequence.computed, len(self.prompt_token_ids))

    def close(self) -> None:
        request = self._request
        if request.stream is not None:
            request.stream.clear()
        if not request.finished:
            request.cancel()
            if self._submitted:
                self._loop.drop(request)

    def _wait(self) -> None:
        request = self._request
        self._loop.check_process()
        if not self._submitted:
            self._submitted = True
            self._loop.submit(request, self._session)
        self._loop.set_active(request, True)
        try:
            self._loop.drive(lambda: bool(request.stream) or request.finished)
        finally:
            self._loop.set_active(request, False)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "prompt_token_ids"):
            self.close()


class Session:
    """A text that goes on turn by turn and keeps its KV cache, made by `LLM.session`.

    A prompt is always the whole text so far. As far as its tokens are those of the turn before (prompt and reply), they
    are not computed again. Between turns others may take the memory; then the next turn computes everything, with the same result.
    """

    def __init__(self, llm: LLM):
        self._llm = llm
        self._retained = Retained()
        self._last: weakref.ref[Stream] | None = None

    @property
    def tokens_kept(self) -> int:
        """Tokens that are in the KV cache now."""
        sequence = self._retained.sequence
        return 0 if sequence is None else sequence.computed

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """As `LLM.stream`; RuntimeError while the stream of the turn before has not ended."""
        last = self._stream()
        if last is not None and not last._request.finished:
            raise RuntimeError("The session's last stream has not ended. Iterate it to its end, or close it, before the next turn.")
        params = SamplingParams() if sampling_params is None else sampling_params
        text = prompt if isinstance(prompt, str) else None
        stream = self._llm._stream(text, self._llm._checked(prompt, params), params, self._retained)
        stream._of, self._last = self, weakref.ref(stream)
        return stream

    def close(self) -> None:
        """Give the KV cache back."""
        stream = self._stream()
        if stream is not None:
            stream.close()
        self._llm._loop.drop(self._retained)

    def _stream(self) -> Stream | None:
        """The stream of the last turn, if anybody has it."""
        return None if self._last is None else self._last()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_last"):
            self.close()


class LLM:
    """A model in memory: its file, tokenizer and engine.

    `model`: path of a GGUF file (any shard of a split one); None: FERRUM_MODEL, else the demo model of this package.
    Options of None come from FERRUM_<OPTION>, else their default: see `ferrum.options.EngineOptions`, which gives
    units and allowed values, and `options` for what is in force. `progress` is called with bytes done and bytes in all while
    the weights of a large file are read from disk. Any thread may call; prompts of all threads run together. A
    process made by fork() cannot use its parent's LLM: RuntimeError.

    Raises ModelFileError, UnsupportedModelError, OptionError, OutOfMemory.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        *,
        device: str | None = None,
        threads: int | None = None,
        kv_tokens: int | None = None,
        memory_budget: int | str | None = None,
        kv_type: str | None = None,
        activations: str | None = None,
        max_sequences: int | None = None,
        prefill_chunk: int | None = None,
        max_logit_rows: int | None = None,
        profile: bool | None = None,
        progress: Progress | None = None,
    ):
        started = perf_counter()
        given = dict(device=device, threads=threads, kv_tokens=kv_tokens, memory_budget=memory_budget, kv_type=kv_type, activations=activations,
                     max_sequences=max_sequences, prefill_chunk=prefill_chunk, max_logit_rows=max_logit_rows, profile=profile)
        self.model, options, self.sources = resolve(model, given)
        self.file = GGUFFile.open(self.model)
        planned = plan(self.file, **options.arguments())  # refuses what cannot run before anything is taken
        _log_plan(planned)
        self.tokenizer = Tokenizer.from_gguf(self.file)
        vocab_size = planned["config"]["vocab_size"]
        if self.tokenizer.vocab_size > vocab_size:
            raise ModelFileError(f"{self.model}: the tokenizer has {self.tokenizer.vocab_size} tokens, the embedding table "
                                 f"{vocab_size} rows. Convert the model anew.")
        self._unused_ids = (*self.tokenizer.unused_ids, *range(self.tokenizer.vocab_size, vocab_size))
        self._vocab_size = vocab_size
        self.engine = Engine(self.file, unused_tokens=self._unused_ids, **options.arguments())
        self._context = self.engine.config["context_length"]
        sampler = Sampler(self.engine, self.tokenizer, self._unused_ids, vocab_size - len(self._unused_ids))
        self._loop = EngineLoop(self.engine, sampler)
        self._read_ahead(planned, progress)
        self.load_s = perf_counter() - started
        logger.info("model %s loaded in %.2f s", self.model, self.load_s)
        for name, value in self.options.items():
            logger.info("option %s = %s (%s)", name, value, self.sources.get(name, "default"))

    @property
    def options(self) -> dict[str, Any]:
        """Every option in force, with its value."""
        return self.engine.options

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template; UnsupportedModelError if it has none."""
        return ChatTemplate.from_tokenizer(self.tokenizer)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Continue prompts, all together; the outputs are in the order of the prompts.

        A prompt is a text (control tokens in it are recognised) or token ids; one may be given without a list.
        `sampling_params`: for all prompts, or one each. Each text is the one that it would be alone.

        Raises before anything runs: ValueError for an empty prompt or params that do not fit, TypeError for prompts
        that are neither text nor whole numbers, ContextFull or KVPoolExhausted for one that is too long, EngineClosed.
        DeviceError and other errors while running end the call; nothing of it is left behind.
        """
        prompts = _several(prompts)
        params = _params_for(prompts, sampling_params)
        checked = [self._checked(prompt, each) for prompt, each in zip(prompts, params)]
        return self._run([prompt if isinstance(prompt, str) else None for prompt in prompts], checked, params)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several together: as `generate` for the prompts that `chat_prompt` makes of them."""
        conversations = _conversations(messages)
        texts = [self.render_chat(conversation, **template_options) for conversation in conversations]
        params = _params_for(texts, sampling_params)
        checked = [self._checked(self._encode_rendered(text), each) for text, each in zip(texts, params)]
        return self._run(texts, checked, params)

    def render_chat(self, messages: Sequence[Message], *, chat_template: str | None = None, **template_options: Any) -> str:
        """The text of a conversation by the file's chat template, or by the Jinja source `chat_template`.

        A message has `role` and `content`. Options are those of `ChatTemplate.render`: `tools`, `add_generation_prompt`,
        `continue_final_message`, and variables of the template such as `enable_thinking`. Errors as there.
        """
        template = self.chat_template if chat_template is None else ChatTemplate(chat_template, **self.chat_template.special_tokens)
        return template.render(list(messages), **template_options)

    def chat_prompt(self, messages: Sequence[Message], **template_options: Any) -> list[int]:
        """The token ids of `render_chat`: a prompt for `generate`, `stream` and `Session.stream`."""
        return self._encode_rendered(self.render_chat(messages, **template_options))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Stream:
        """Continue a prompt piece by piece, with n = 1.

        Raises at once what `generate` does before anything runs. A text that runs out of room later ends with
        finish_reason "length" and a notice.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        return self._stream(prompt if isinstance(prompt, str) else None, self._checked(prompt, params), params)

    def stream_chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, **template_options: Any) -> Stream:
        """Answer a conversation piece by piece: as `stream` for the prompt that `chat_prompt` makes of it."""
        params = SamplingParams() if sampling_params is None else sampling_params
        text = self.render_chat(messages, **template_options)
        return self._stream(text, self._checked(self._encode_rendered(text), params), params)

    def session(self) -> Session:
        """A text that goes on turn by turn and keeps its KV cache."""
        return Session(self)

    def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[Score]:
        """How likely each continuation is after the prompt, which is read once.

        Texts of continuations are encoded on their own: give token ids where a token shall span the seam. The logits
        of max_logit_rows tokens are held at a time. Errors as of `generate`.
        """
        if isinstance(continuations, (str, bytes, bytearray, memoryview)) or not isinstance(continuations, Iterable):
            raise TypeError(f"continuations is {type(continuations).__name__}: give a list of them, each a str or token ids.")
        params = SamplingParams(max_tokens=1)
        ids = self._checked(prompt, params)
        parts: list[tuple[str | None, list[int]]] = []
        for continuation in continuations:
            text = continuation if isinstance(continuation, str) else None
            part = self.tokenizer.encode(text, add_bos=False) if text is not None else _checked_ids(continuation, "A continuation")
            if not part:
                raise ValueError("A continuation is empty: there is nothing to score.")
            self._check_ids(part, "a continuation")
            self._check_length(len(ids) + len(part) - 1, f"The prompt with a continuation has {len(ids) + len(part)}", params)
            parts.append((text, part))
        if not parts:
            return []
        scoring = Scoring(ids, parts)
        for _ in self._loop.run([scoring]):
            pass
        return scoring.output()

    def tokenize(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, parse_special=parse_special, add_bos=add_bos)

    def detokenize(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; see `Tokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special=skip_special)

    def profile(self) -> dict[str, Any] | None:
        """What the engine's ops took so far, if the option `profile` is on: see `Engine.profile`."""
        return self.engine.profile()

    def close(self) -> None:
        """Give the model's memory back. Streams that have not ended raise EngineClosed when they are continued."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_ahead(self, planned: dict[str, Any], progress: Progress | None) -> None:
        """Read the weights of a large file that is not in memory, in order: faster than page by page as they are used."""
        nbytes = planned["weights_bytes"]
        room = available_memory()
        if nbytes >= _WORTH_READING_AHEAD and (room is None or planned["total_bytes"] <= room) and self.engine.resident_fraction() < 0.9:
            self.engine.populate(progress)

    def _stream(self, text: str | None, ids: list[int], params: SamplingParams, session: Retained | None = None) -> Stream:
        if params.n != 1:
            raise ValueError(f"n is {params.n}, but a stream gives one text. Use generate, or open several streams.")
        return Stream(self._loop, self._request(text, ids, params, streamed=True), session)

    def _run(self, texts: Sequence[str | None], prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        order: list[str] = []

        def requests() -> Iterator[Request]:
            for text, ids, each in zip(texts, prompts, params):
                request = self._request(text, ids, each)
                order.append(request.id)
                yield request

        for request in self._loop.run(requests()):
            output = request.output()
            outputs[output.request_id] = output
        return [outputs[id] for id in order]

    def _request(self, text: str | None, ids: list[int], params: SamplingParams, *, streamed: bool = False) -> Request:
        request = Request(text, ids, params, self.tokenizer, load_s=self.load_s, streamed=streamed)
        logger.debug("request %s: prompt token ids: %s", request.id, ids)
        if not params.greedy:
            logger.info("request %s: seed %d", request.id, request.seed)
        return request

    def _encode_rendered(self, text: str) -> list[int]:
        """A rendered template has its own beginning-of-text token, if any."""
        return self.tokenizer.encode(text, add_bos=False)

    def _checked(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """The ids of a prompt that can run with these params; text that is far too long is refused before the cost of encoding it."""
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params is {repr(params)[:40]}. Give SamplingParams(...), or a list of one for each prompt.")
        self._loop.check_process()
        if self.engine.closed:
            raise EngineClosed("The model was closed. Load it again to generate.")
        self._loop.settle()
        if isinstance(prompt, str):
            fewest = self.tokenizer.fewest_tokens(prompt)
            self._check_length(fewest, f"The prompt has at least {fewest}", params)
            ids = self.tokenizer.encode(prompt)
        else:
            ids = _checked_ids(prompt)
        if not ids:
            raise ValueError("The prompt is empty. Give at least one token to continue.")
        self._check_ids(ids, "the prompt")
        self._check_length(len(ids), f"The prompt has {len(ids)}", params)
        self._check_params(params)
        return ids

    def _check_ids(self, ids: Sequence[int], what: str, kind: type[ValueError] = ValueError) -> None:
        for id in (min(ids), max(ids)):
            if not 0 <= id < self._vocab_size:
                raise kind(f"token id {id} of {what} is not in the vocabulary (0..{self._vocab_size - 1}). Pass ids of this model.")

    def _check_params(self, params: SamplingParams) -> None:
        """Refuse ids outside the vocabulary, and params that leave no token to draw."""
        for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
            if ids := tuple(getattr(params, name) or ()):
                self._check_ids(ids, name, OptionError)
        if not params.allowed_token_ids and not params.banned_token_ids:
            return
        taken = {*params.banned_token_ids, *self._unused_ids}
        if params.min_tokens:
            taken.update(params.stop_token_ids, () if params.ignore_eos else self.tokenizer.stop_ids)
        if not set(params.allowed_token_ids or range(self._vocab_size)) - taken:
            raise OptionError("allowed_token_ids, banned_token_ids and min_tokens leave no token that could be drawn. Allow more.")

    def _check_length(self, tokens: int, shown: str, params: SamplingParams) -> None:
        context, capacity = self._context, self.engine.kv_capacity
        if tokens > context:
            raise ContextFull(f"{shown} tokens, the model's context holds {context}. Shorten the prompt.")
        if tokens > capacity:
            wanted = min(tokens + params.max_tokens, context)
            raise KVPoolExhausted(f"{shown} tokens, the KV cache holds {capacity}. "
                                  f"Shorten the prompt or raise kv_tokens (--kv-tokens {wanted}).")


def _several(prompts: Any) -> list[Any]:
    """A list of prompts; a single one is a text or whole numbers."""
    if isinstance(prompts, (str, bytes, bytearray, memoryview)) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and _is_whole_number(prompts[0]) else prompts


def _params_for(prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """Params for each prompt."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, (SamplingParams, str, Mapping)) or not isinstance(params, Iterable):
        return [params] * len(prompts)
    params = list(params)
    if len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts were given {len(params)} sampling_params. Give one for all, or one each.")
    return params


def _conversations(messages: Any) -> list[Any]:
    """A list of conversations; a single one has messages, which are mappings."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f"messages is {type(messages).__name__}: give a list of messages, which have role and content, or a list of such lists.")
    messages = list(messages)
    return [messages] if not messages or isinstance(messages[0], Mapping) else messages


def _is_whole_number(value: Any) -> bool:
    """Whether it may be a token id; arrays of more than one number have `__index__` too."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _checked_ids(prompt: Any, what: str = "The prompt") -> list[int]:
    """Token ids as ints; bytes and truth values, which Python takes for whole numbers, are refused."""
    advice = "Give a str, or token ids as whole numbers."
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise TypeError(f"{what} is {type(prompt).__name__}, not text: decode it first. {advice}")
    try:
        given = list(prompt)
    except TypeError:
        raise TypeError(f"{what} is {type(prompt).__name__}. {advice}") from None
    for id in given:
        if isinstance(id, (bool, np.bool_)) or not _is_whole_number(id):
            raise TypeError(f"{what} has the token id {repr(id)[:40]}. {advice}")
    return [operator.index(id) for id in given]


def _log_plan(planned: dict[str, Any]) -> None:
    config = planned["config"]
    logger.info("%s, %s layers, hidden size %s, context %s tokens", config["architecture"], config["num_layers"],
                config["hidden_size"], config["context_length"])
    for part in ("weights_bytes", "weights_extra_bytes", "kv_bytes", "scratch_bytes", "total_bytes"):
        logger.info("plan %s = %d (%.1f MiB)", part, planned[part], planned[part] / 2**20)
