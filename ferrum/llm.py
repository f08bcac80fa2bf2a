"""The public API: a loaded model that continues texts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from time import perf_counter
from typing import Any, NamedTuple

from ferrum.chat_template import ChatTemplate
from ferrum.engine_loop import EngineLoop, Retained
from ferrum.errors import ContextFull, EngineClosed, KVPoolExhausted, ModelFileError, OptionError
from ferrum.gguf_file import GGUFFile
from ferrum.options import available_memory, resolve, slow_device_note
from ferrum.outputs import RequestOutput, Score
from ferrum.prompts import Message, Prompt, checked_params, checked_terms, conversations, joined_parts, params_for, several, template_variables, text_or_ids
from ferrum.request import PromptRead, Request, Scoring, Terms
from ferrum.sampler import Sampler
from ferrum.sampling import SamplingParams
from ferrum.session_file import load
from ferrum.stream import Session, Stream
from ferrum.tokenizer import Tokenizer
from ferrum_native._native import Engine, plan

logger = logging.getLogger("ferrum")
logger.addHandler(logging.NullHandler())

Progress = Callable[[int, int], None]

# Smaller files are read as they are used: nobody would see them come.
_WORTH_READING_AHEAD = 256 << 20  # bytes


class LLM:
    """A model in memory: its file, tokenizer and engine.

    `model`: path of a GGUF file (any shard of a split one); None: FERRUM_MODEL, else the demo model of this package.
    Options of None come from FERRUM_<OPTION>, else their default: help(ferrum.EngineOptions) describes each. `progress` is
    called with bytes done and bytes in all while the weights of a large file are read from disk. Any thread may call;
    prompts of all threads run together. A process made by fork() cannot use its parent's LLM: RuntimeError.

    Attributes: `options` in force and their `sources`, the model's `config` (context_length, vocab_size, ...), its
    `tokenizer` (stop_ids, ...) and `chat_template`, the path `model`, the `engine`, and `load_s`.

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
        prefix_cache: bool | None = None,
        progress: Progress | None = None,
    ):
        started = perf_counter()
        given = dict(device=device, threads=threads, kv_tokens=kv_tokens, memory_budget=memory_budget, kv_type=kv_type, activations=activations,
                     max_sequences=max_sequences, prefill_chunk=prefill_chunk, max_logit_rows=max_logit_rows, profile=profile,
                     prefix_cache=prefix_cache)
        self.model, options, self.sources = resolve(model, given)
        self.file = GGUFFile.open(self.model)
        planned = plan(self.file, **options.arguments())  # refuses what cannot run before anything is taken
        _log_plan(planned)
        if note := slow_device_note(options.device):
            logger.warning(note)
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

    @property
    def config(self) -> dict[str, Any]:
        """What the model is: context_length, vocab_size, num_layers and everything else that `inspect` shows."""
        return self.engine.config

    def __repr__(self) -> str:
        state = "closed" if self.engine.closed else f"{self.engine.device}, kv_tokens={self.options['kv_tokens']}"
        return f"<LLM {self.model!r}, {state}>"

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The file's chat template; UnsupportedModelError if it has none."""
        return ChatTemplate.from_tokenizer(self.tokenizer)

    def generate(
        self, prompts: Prompt | Iterable[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
        progress: Progress | None = None, prefill_progress: Progress | None = None, priority: int = 0, timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, all together; the outputs are in the order of the prompts.

        A prompt is a text (control tokens in it are recognised), token ids, or {"prompt": text} or {"prompt_token_ids": ids};
        one may be given without a list. `sampling_params`: for all prompts, or one each. Each text is the one that it would
        be alone. `progress` is called with prompts done and prompts in all, `prefill_progress` with prompt tokens read and prompt
        tokens in all, both in this thread. Beside others, prompts of a lower `priority` come first; those of one priority take turns.
        Texts that have not ended after `timeout` seconds end then, with finish_reason "timeout".

        Raises before anything runs: ValueError for an empty prompt or params that do not fit, TypeError for what is no
        prompt, ContextFull or KVPoolExhausted for one that is too long, EngineClosed.
        DeviceError and other errors while running end the call; nothing of it is left behind.
        """
        terms = checked_terms(priority, timeout)
        return self._run(self._prepared_prompts(several(prompts), sampling_params), terms, progress, prefill_progress)

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, progress: Progress | None = None,
        prefill_progress: Progress | None = None, priority: int = 0, timeout: float | None = None, **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several together: as `generate` for the prompts that `chat_prompt` makes of them."""
        terms = checked_terms(priority, timeout)
        return self._run(self._prepared_conversations(conversations(messages), sampling_params, template_options), terms, progress, prefill_progress)

    def render_chat(self, messages: Sequence[Message], *, chat_template: str | None = None, **template_options: Any) -> str:
        """The text of a conversation by the file's chat template, or by the Jinja source `chat_template`.

        A message has `role` and `content`; parts of content that are all text are joined by newlines. Options are those of
        `ChatTemplate.render`: `tools`, `add_generation_prompt`, `continue_final_message`, and variables of the template such as
        `enable_thinking` (or all in `chat_template_kwargs`). Errors as there, and TypeError for fields of SamplingParams.
        """
        template = self.chat_template if chat_template is None else ChatTemplate(chat_template, **self.chat_template.special_tokens)
        return template.render([joined_parts(message) for message in messages], **template_variables(template_options))

    def chat_prompt(self, messages: Sequence[Message], **template_options: Any) -> list[int]:
        """The token ids of `render_chat`: a prompt for `generate`, `stream` and `Session.stream`."""
        return self._encode_rendered(self.render_chat(messages, **template_options))

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None,
    ) -> Stream:
        """Continue a prompt piece by piece, with n = 1; further arguments as of `generate`.

        Raises at once what `generate` does before anything runs. A text that runs out of room later ends with
        finish_reason "length" and a notice.
        """
        return self._prompt_stream(prompt, sampling_params, checked_terms(priority, timeout), prefill_progress)

    def stream_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
        prefill_progress: Progress | None = None, **template_options: Any,
    ) -> Stream:
        """Answer a conversation piece by piece: as `stream` for the prompt that `chat_prompt` makes of it."""
        return self._chat_stream(messages, sampling_params, template_options, checked_terms(priority, timeout), prefill_progress)

    def session(self) -> Session:
        """A text that goes on turn by turn and keeps its KV cache: each turn is given the whole text so far."""
        return Session(self)

    def load_session(self, path: str | os.PathLike) -> Session:
        """The session that `Session.save` wrote: its next turn computes only what is new, with the bits that it would have had.

        SessionFileError where the file is damaged, or is of another model, device, kv_type or activations; KVPoolExhausted where there is no
        room for its tokens beside what runs.
        """
        if self.engine.closed:
            raise EngineClosed("The model was closed. Load it again to go on.")
        session = Session(self)
        self._loop.import_session(session._retained, *load(path, self.engine, self.file))
        return session

    def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, priority: int = 0, timeout: float | None = None) -> list[Score]:
        """How likely each continuation is after the prompt, which is read once.

        Texts of continuations are encoded on their own: give token ids where a token shall span the seam. The logits
        of max_logit_rows tokens are held at a time. Errors as of `generate`; TimeoutError after `timeout` seconds.
        """
        scoring = self.scoring(prompt, continuations, priority=priority, timeout=timeout)
        self.run([scoring])
        return scoring.output()

    def scoring(self, prompt: Prompt, continuations: Sequence[Prompt], *, priority: int = 0, timeout: float | None = None) -> Scoring:
        """What `score` runs, checked, to be given to `run` or `as_completed`."""
        terms = checked_terms(priority, timeout)
        if isinstance(continuations, (str, bytes, bytearray, memoryview)) or not isinstance(continuations, Iterable):
            raise TypeError(f"continuations is {type(continuations).__name__}: give a list of them, each a str or token ids.")
        params = SamplingParams(max_tokens=1)
        ids = self._prepared(prompt, params).ids
        parts: list[tuple[str | None, list[int]]] = []
        for index, continuation in enumerate(continuations):
            what = f"continuations[{index}]"
            given = text_or_ids(continuation, what)
            part = self.tokenizer.encode(given, add_bos=False) if isinstance(given, str) else given
            if not part:
                raise ValueError(f"{what} is empty: there is nothing to score.")
            self._check_ids(part, what)
            self._check_length(len(ids) + len(part) - 1, f"The prompt with {what} has {len(ids) + len(part)}", params)
            parts.append((given if isinstance(given, str) else None, part))
        return Scoring(ids, parts, terms)

    def tokenize(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The token ids of a text; see `Tokenizer.encode`."""
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}: give one str.")
        return self.tokenizer.encode(text, parse_special=parse_special, add_bos=add_bos)

    def detokenize(self, token_ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; see `Tokenizer.decode`."""
        ids = text_or_ids(token_ids, "token_ids")
        if isinstance(ids, str):
            raise TypeError("token_ids is a str: give whole numbers.")
        return self.tokenizer.decode(ids, skip_special=skip_special)

    def profile(self) -> dict[str, Any] | None:
        """What the engine's ops took so far, if the option `profile` is on: see `Engine.profile`."""
        return self.engine.profile()

    def close(self) -> None:
        """Give the model's memory back, once the step that runs has ended. Texts that have not ended raise EngineClosed where they are waited for."""
        self._loop.close()
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

    def request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0, timeout: float | None = None,
    ) -> Request:
        """A prompt that was checked, to be given to `run` or `as_completed`; its `output()` can be read at any time, also after Ctrl-C."""
        return self._request(self._prepared(prompt, checked_params(sampling_params)), checked_terms(priority, timeout))

    def request_chat(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None, template_options: Mapping[str, Any] = {}, *,
        priority: int = 0, timeout: float | None = None,
    ) -> Request:
        """The same for a conversation."""
        return self._request(self._prepared_chat(messages, checked_params(sampling_params), template_options), checked_terms(priority, timeout))

    def as_completed(self, requests: Iterable[Request | Scoring]) -> Generator[Request | Scoring, None, None]:
        """Run requests, any number of them together, and give each as it ends; one that failed has its exception in `error`.

        The iterable is asked for the next one whenever the queue has room, so it may be endless; while it
        makes one, results wait. However the iterator is left, no request goes on.
        """
        return self._loop.run(requests)

    def run(self, requests: Iterable[Request | Scoring]) -> None:
        """Run requests to their ends. Raises the error of the first that failed; however it is left, none of them goes on."""
        with self._loop.running(requests) as ended:
            for request in ended:
                if request.error is not None:
                    raise request.error

    def _prompt_stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None, terms: Terms, prefill_progress: Progress | None,
        session: Retained | None = None,
    ) -> Stream:
        return self._stream(self._prepared(prompt, checked_params(sampling_params)), terms, prefill_progress, session)

    def _chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None, template_options: Mapping[str, Any], terms: Terms,
        prefill_progress: Progress | None, session: Retained | None = None,
    ) -> Stream:
        return self._stream(self._prepared_chat(messages, checked_params(sampling_params), template_options), terms, prefill_progress, session)

    def _stream(self, prepared: _Prepared, terms: Terms, prefill_progress: Progress | None, session: Retained | None) -> Stream:
        return Stream(self._loop, self._streamed(prepared, terms, prefill_progress), session, prefill_progress)

    def _streamed(self, prepared: _Prepared, terms: Terms, prefill_progress: Progress | None) -> Request:
        if prepared.params.n != 1:
            raise ValueError(f"n is {prepared.params.n}, but a stream gives one text. Use generate, or open several streams.")
        return self._request(prepared, terms, streamed=True, reports_prompt=prefill_progress is not None)

    def _run(
        self, prepared: Sequence[_Prepared], terms: Terms, progress: Progress | None, prefill_progress: Progress | None,
    ) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        order: list[str] = []
        total = sum(len(each.ids) for each in prepared)
        read: dict[str, int] = {}

        def requests() -> Iterator[Request]:
            for each in prepared:
                request = self._request(each, terms, reports_prompt=prefill_progress is not None)
                order.append(request.id)
                yield request

        def prompt_read(news: PromptRead) -> None:
            assert prefill_progress is not None  # else no request reports
            read[news.request.id] = news.tokens
            prefill_progress(sum(read.values()), total)

        with self._loop.running(requests(), prompt_read) as ended:
            for request in ended:
                if request.error is not None:
                    raise request.error
                outputs[request.id] = request.output()
                if progress is not None:
                    progress(len(outputs), len(prepared))
        return [outputs[id] for id in order]

    def _request(self, prepared: _Prepared, terms: Terms, *, streamed: bool = False, reports_prompt: bool = False) -> Request:
        request = Request(prepared.text, prepared.ids, prepared.params, self.tokenizer, load_s=self.load_s, terms=terms, streamed=streamed,
                          reports_prompt=reports_prompt)
        logger.debug("request %s: prompt token ids: %s", request.id, prepared.ids)
        if not prepared.params.greedy:
            logger.debug("request %s: seed %d", request.id, request.seed)
        return request

    def _encode_rendered(self, text: str) -> list[int]:
        """A rendered template has its own beginning-of-text token, if any."""
        return self.tokenizer.encode(text, add_bos=False)

    def _prepared_prompts(self, given: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None) -> list[_Prepared]:
        params = params_for(given, sampling_params)
        return [self._prepared(prompt, each, _place("prompts", i, given)) for i, (prompt, each) in enumerate(zip(given, params))]

    def _prepared_conversations(
        self, given: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None, template_options: Mapping[str, Any],
    ) -> list[_Prepared]:
        params = params_for(given, sampling_params)
        return [self._prepared_chat(conversation, each, template_options, _place("conversations", i, given))
                for i, (conversation, each) in enumerate(zip(given, params))]

    def _prepared_chat(
        self, messages: Sequence[Message], params: SamplingParams, template_options: Mapping[str, Any], what: str = "The prompt",
    ) -> _Prepared:
        text = self.render_chat(messages, **template_options)
        return self._prepared(self._encode_rendered(text), params, what)._replace(text=text)

    def _prepared(self, prompt: Prompt, params: SamplingParams, what: str = "The prompt") -> _Prepared:
        """A prompt that can run with these params; text that is far too long is refused before the cost of encoding it."""
        self._loop.check_caller()
        if self.engine.closed:
            raise EngineClosed("The model was closed. Load it again to generate.")
        given = text_or_ids(prompt, what)
        if isinstance(given, str):
            fewest = self.tokenizer.fewest_tokens(given)
            self._check_length(fewest, f"{what} has at least {fewest}", params)
            ids = self.tokenizer.encode(given)
        else:
            ids = given
        if not ids:
            raise ValueError(f"{what} is empty. Give at least one token to continue.")
        self._check_ids(ids, what)
        self._check_length(len(ids), f"{what} has {len(ids)}", params)
        self._check_params(params)
        return _Prepared(given if isinstance(given, str) else None, ids, params)

    def _check_ids(self, ids: Sequence[int], what: str, kind: type[ValueError] = ValueError) -> None:
        for id in (min(ids), max(ids)):
            if not 0 <= id < self._vocab_size:
                raise kind(f"token id {id} of {what[0].lower()}{what[1:]} is not in the vocabulary (0..{self._vocab_size - 1}). Pass ids of this model.")

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
            wanted = context if params.max_tokens is None else min(tokens + params.max_tokens, context)
            raise KVPoolExhausted(f"{shown} tokens, the KV cache holds {capacity}. "
                                  f"Shorten the prompt or raise kv_tokens (--kv-tokens {wanted}).")


class _Prepared(NamedTuple):
    """A prompt that was checked; `text` where it was one."""

    text: str | None
    ids: list[int]
    params: SamplingParams


def _place(name: str, index: int, given: Sequence[Any]) -> str:
    """How errors call a prompt: by its place where there are several."""
    return f"{name}[{index}]" if len(given) > 1 else "The prompt"


def _log_plan(planned: dict[str, Any]) -> None:
    config = planned["config"]
    logger.info("%s, %s layers, hidden size %s, context %s tokens", config["architecture"], config["num_layers"],
                config["hidden_size"], config["context_length"])
    for part in ("weights_bytes", "weights_extra_bytes", "kv_bytes", "scratch_bytes", "total_bytes"):
        logger.info("plan %s = %d (%.1f MiB)", part, planned[part], planned[part] / 2**20)
