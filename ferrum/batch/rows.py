"""A row of a job: what it is called, and what it asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from ferrum.batch import openai_format
from ferrum.batch.encoding import from_json, to_json
from ferrum.batch.sources import TOO_LONG, Line
from ferrum.errors import EngineClosed, FerrumError, KVPoolExhausted, OptionError, OutOfMemory
from ferrum.options import settings_of
from ferrum.outputs import Score
from ferrum.request import Request, Scoring
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from jinja2 import Template

    from ferrum.llm import LLM

logger = logging.getLogger("ferrum")

# What a row says to the chat template, by the names of `LLM.chat`.
TEMPLATE_OPTIONS = ("tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
_PARAMS_KEPT = 256
_PARAMS = frozenset(settings_of(SamplingParams))
_ASKED = ("custom_id", "params", "continuations")
_RESULT = ("custom_id", "text", "token_ids", "finish_reason", "notice", "seed", "logprobs", "prompt_logprobs", "outputs", "scores", "usage", "error")


class RowError(FerrumError, ValueError):
    """A row that cannot be run: its own fault."""


@dataclass(frozen=True)
class Asked:
    """What a job does with its rows; all of it changes the results, so all of it is in the manifest.

    `params` are those of rows that give none of their own, `seed` the job's; `prompt_field` names what holds the prompt,
    `template` is the Jinja source that makes it of a row's fields; with `chat` it is a message to answer, after `system`.
    """

    params: SamplingParams
    seed: int
    format: str = "ferrum"
    chat: bool = False
    system: str | None = None
    template_options: Mapping[str, Any] | None = None
    prompt_field: str | None = None
    template: str | None = None


@dataclass(eq=False)
class Row:
    """A row on its way: `key` tells it from all others, `request` is what runs (of a `chat`, an answer), `error` why it did not."""

    index: int
    line: int
    key: bytes
    name: str | int  # custom_id, or what stands for it
    fields: dict[str, Any]
    request: Request | Scoring | None = None
    chat: bool = False
    error: BaseException | None = None


def custom_id_of(fields: Any) -> str | int | None:
    """The id that a row has been given, if it can be one."""
    id = fields.get("custom_id") if isinstance(fields, dict) else None
    return id if (isinstance(id, str) and id) or (isinstance(id, int) and not isinstance(id, bool)) else None


def parsed(line: Line) -> tuple[Any, RowError | None]:
    """The value of a line, and why it is no row."""
    if line.text is TOO_LONG:
        return None, RowError("The line is longer than 64 MiB.")
    try:
        fields = from_json(line.text)
    except UnicodeDecodeError as error:
        return None, RowError(f"The line is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}).")
    except json.JSONDecodeError as error:
        return None, RowError(f"The line is not JSON: {error.msg} (column {error.colno}).")
    except (ValueError, RecursionError) as error:
        return None, RowError(f"The line is not JSON: {str(error)[:200]}.")
    return fields, None if isinstance(fields, dict) else RowError(f"The line is not a JSON object, but {_kind(fields)}.")


def digest_of(line: Line, custom_id: str | int | None) -> bytes:
    """16 bytes of a row's custom_id, else of its line."""
    if custom_id is not None:
        return blake2b(json.dumps(custom_id).encode(), digest_size=16, person=b"custom_id").digest()
    return blake2b(line.text, digest_size=16, person=b"line").digest()


class Keys:
    """What rows are called: by their custom_id, else by a hash of their line, its occurrence in the input, and the job with its model."""

    def __init__(self, job: Mapping[str, Any]):
        self._job = blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=32).digest()

    def key(self, digest: bytes, occurrence: int, custom_id: str | int | None) -> bytes:
        if custom_id is not None:
            return digest
        return blake2b(digest, digest_size=16, key=self._job, person=b"row", salt=occurrence.to_bytes(8, "little")).digest()

    def row(self, index: int, line: Line, digest: bytes, occurrence: int, fields: Any, error: RowError | None) -> Row:
        id = custom_id_of(fields)
        key = self.key(digest, occurrence, id)
        return Row(index, line.number, key, f"row-{key.hex()[:24]}" if id is None else id, {} if error else fields, error=error)


def row_seed(key: bytes, job_seed: int) -> int:
    """A row's own seed, of 53 bits, which every reader of JSON keeps: whatever runs beside it or before it, its draws are the same."""
    return int.from_bytes(blake2b(key, digest_size=8, person=b"seed", salt=job_seed.to_bytes(8, "little")).digest(), "little") >> 11


class Preparer:
    """Makes requests of rows and results of requests."""

    def __init__(self, llm: LLM, asked: Asked, model_name: str):
        self._llm = llm
        self._context = llm.config["context_length"]
        self._asked = asked
        self._model_name = model_name
        self._template = None if asked.template is None else _compiled(asked.template)
        self._options = dict(asked.template_options or {})
        self._warned: set[str] = set()
        self._overridden: dict[bytes, SamplingParams] = {}  # by the params that rows give: most give the same, and checking them takes its time

    def prepare(self, row: Row) -> None:
        """Set the row's request, or its error: whatever is wrong with one row is no other's concern."""
        if row.error is not None:
            return
        try:
            row.request = self._request(row)
        except MemoryError:
            raise
        except FerrumError as error:
            if is_fatal(error):
                raise
            row.error = error
        except Exception as error:  # of a template, a tokenizer, whatever this row alone has met
            row.error = error

    def _request(self, row: Row) -> Request | Scoring:
        fields = row.fields
        if fields.get("custom_id") is not None and custom_id_of(fields) is None:
            raise RowError(f"custom_id is {_shown(fields['custom_id'])}: expected text that is not empty, or a whole number.")
        if self._is_openai(fields):
            fields = openai_format.row_of(fields)
            prompt, options = self._own_prompt(fields, chat=False)
        else:
            prompt, options = self._prompt(fields)
            self._warn_of_params(row)
        row.chat = options is not None
        params = self._params(fields.get("params"), row.key)
        continuations = fields.get("continuations")
        if continuations is not None:
            return self._scoring(fields, prompt, options, continuations)
        if options is not None:
            return self._llm.request_chat(prompt, params, options)
        return self._llm.request(prompt, params)

    def _warn_of_params(self, row: Row) -> None:
        """Tell once of each field that would be a parameter inside "params", and is passed on as it stands."""
        if self._asked.template is not None or self._asked.prompt_field is not None:
            return  # rows of somebody else's making
        for name in row.fields.keys() & _PARAMS - self._warned:
            self._warned.add(name)
            logger.warning("line %d has the field %s, which is passed on and changes no text. As a parameter it belongs inside: "
                           '"params": {"%s": ...}.', row.line, name, name)

    def _is_openai(self, fields: dict[str, Any]) -> bool:
        """Where the job says what of a row is the prompt, no row says otherwise."""
        return self._asked.template is None and self._asked.prompt_field is None and openai_format.is_request(fields)

    def _scoring(self, fields: dict[str, Any], prompt: Any, options: dict[str, Any] | None, continuations: Any) -> Scoring:
        if fields.get("params"):
            raise RowError("params and continuations do not go together: the probability of a text has no params.")
        if not isinstance(continuations, list) or not continuations:
            raise RowError(f"continuations is {_shown(continuations)}: expected a list of texts, or of token ids, that is not empty.")
        if self._asked.format == "openai":
            raise RowError("continuations have no place in the OpenAI format. Use the format ferrum.")
        return self._llm.scoring(prompt if options is None else self._llm.chat_prompt(prompt, **options), continuations)

    def _prompt(self, fields: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
        """(prompt, None), or (messages, options of the template)."""
        asked = self._asked
        if self._template is not None:
            prompt = _rendered(self._template, fields)
        elif asked.prompt_field is not None:
            if asked.prompt_field not in fields:
                raise RowError(f"There is no field {asked.prompt_field!r}{_meant(asked.prompt_field, fields)}.")
            prompt = fields[asked.prompt_field]
        else:
            return self._own_prompt(fields, asked.chat)
        return self._taken_as(prompt, fields, asked.chat)

    def _own_prompt(self, fields: dict[str, Any], chat: bool) -> tuple[Any, dict[str, Any] | None]:
        given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
        if len(given) != 1:
            raise RowError("There is a prompt, and there are messages: give one of them." if given else
                           f"There is no prompt and there are no messages{_meant('prompt', (name for name in fields if name != 'prompt'))}.")
        prompt = fields[given[0]]
        if given[0] == "messages" and not (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)):
            raise RowError(f"messages is {_shown(prompt)}: expected a list of objects with role and content.")
        return self._taken_as(prompt, fields, chat)

    def _taken_as(self, prompt: Any, fields: dict[str, Any], chat: bool) -> tuple[Any, dict[str, Any] | None]:
        """A list of objects is a conversation; a text is, where it is a message to answer."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            return self._conversation(prompt, fields)
        if not isinstance(prompt, (str, list)):
            raise RowError(f"The prompt is {_kind(prompt)}: expected text, token ids, or a list of messages.")
        if chat:
            if not isinstance(prompt, str):
                raise RowError("The prompt is a list of token ids, which is no message to answer: give text, or leave chat out.")
            return self._conversation([{"role": "user", "content": prompt}], fields)
        return prompt, None

    def _conversation(self, messages: list[Any], fields: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        asked = self._asked
        if asked.system is not None and not (isinstance(messages[0], dict) and messages[0].get("role") == "system"):
            messages = [{"role": "system", "content": asked.system}, *messages]
        own = {name: fields[name] for name in TEMPLATE_OPTIONS if fields.get(name) is not None}
        return messages, {**self._options, **own}

    def _params(self, own: Any, key: bytes) -> SamplingParams:
        params = self._asked.params
        if own:
            text = to_json(own)
            known = self._overridden.get(text)
            params = _overridden(self._asked.params, own) if known is None else known
            if known is None and len(self._overridden) < _PARAMS_KEPT:
                self._overridden[text] = params
        return params if params.greedy or params.seed is not None else _seeded(params, row_seed(key, self._asked.seed))

    def result(self, row: Row) -> tuple[dict[str, Any], int, int]:
        """The row of the output, its tokens read and generated."""
        if row.error is None:
            row.error = _out_of_room(row.request, self._context)
        if row.error is not None:
            return self._error(row), 0, 0
        if isinstance(row.request, Scoring):
            return self._scores(row, row.request)
        assert row.request is not None
        output = row.request.output()
        usage = asdict(output.usage)
        if self._asked.format == "openai":
            line = openai_format.result(row, output, usage, self._model_name)
        else:
            texts = [_text_fields(completion) for completion in output.outputs]
            asked = {} if output.prompt_logprobs is None else {"prompt_logprobs": [place and _logprobs(place) for place in output.prompt_logprobs]}
            line = {**self._head(row), **(texts[0] if len(texts) == 1 else {"outputs": texts}), **asked, "usage": usage}
        return line, usage["prompt_tokens"], usage["completion_tokens"]

    def _scores(self, row: Row, scoring: Scoring) -> tuple[dict[str, Any], int, int]:
        scores = scoring.output()
        read = len(scoring.parts[0].tokens) - len(scores[0].token_ids) + sum(len(score.token_ids) for score in scores)
        usage = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
        return {**self._head(row), "scores": [_score_fields(score) for score in scores], "usage": usage}, read, 0

    def _error(self, row: Row) -> dict[str, Any]:
        assert row.error is not None
        error = {"type": error_type(row.error), "message": str(row.error) or type(row.error).__name__}
        if self._asked.format == "openai":
            return openai_format.failure(row, error)
        return {**self._head(row), "error": error}

    def _head(self, row: Row) -> dict[str, Any]:
        """What a row of the output begins with: its id, and the fields of the input that ask for nothing."""
        head: dict[str, Any] = {"custom_id": row.name}
        taken = self._taken(row.fields)
        for name, value in row.fields.items():
            if name not in taken:
                while name in _RESULT or (name in head and name != "custom_id"):
                    name = "input_" + name
                head[name] = value
        return head

    def _taken(self, fields: dict[str, Any]) -> tuple[str, ...]:
        """The fields of a row that are not passed on."""
        if self._is_openai(fields):
            return "custom_id", "method", "url", "body"
        if self._template is not None:
            return _ASKED
        if self._asked.prompt_field is not None:
            return (*_ASKED, self._asked.prompt_field, *TEMPLATE_OPTIONS)
        return (*_ASKED, "prompt", "messages", *TEMPLATE_OPTIONS)


def is_fatal(error: BaseException) -> bool:
    """Whether no row could go on after this error."""
    return isinstance(error, (EngineClosed, OutOfMemory))


def _out_of_room(request: Request | Scoring | None, context: int) -> FerrumError | None:
    """The error of a text that ended where the KV cache did, and not the model's context: with a larger one it would be another."""
    if isinstance(request, Request):
        for text in request.texts:
            if text.notice is not None and len(request.prompt_token_ids) + text.length <= context:
                return KVPoolExhausted(f"{text.notice.split('.')[0]}, and the text was not at its end. "
                                       "Raise kv_tokens (--kv-tokens) and run the row again.")
    return None


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    """`replace(params, seed=seed)`, without checking every other field once more."""
    seeded = copy(params)
    object.__setattr__(seeded, "seed", seed)
    return seeded


def _overridden(params: SamplingParams, own: Any) -> SamplingParams:
    known = settings_of(SamplingParams)
    if not isinstance(own, dict):
        raise RowError(f"params is {_kind(own)}: expected an object such as {{\"temperature\": 0}}.")
    for name in own:
        if name not in known:
            raise RowError(f"params has no field {name!r}{_meant(name, known)}.")
    if isinstance(bias := own.get("logit_bias"), dict):
        own = {**own, "logit_bias": {int(id) if id.isdecimal() else id: value for id, value in bias.items()}}
    return replace(params, **own)


def _compiled(source: str) -> Template:
    from jinja2 import StrictUndefined, TemplateSyntaxError

    from ferrum.template_sandbox import compile_template

    try:
        return compile_template(source, undefined=StrictUndefined)
    except TemplateSyntaxError as error:
        raise OptionError(f"The template cannot be read at its line {error.lineno}: {error.message}.") from None


def _rendered(template: Template, fields: dict[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return template.render(fields)
    except TemplateError as error:
        raise RowError(f"The template fails on this row: {str(error).rstrip('.')[:300]}.") from None
    except Exception as error:  # an operator or filter was given what it cannot take
        raise RowError(f"The template fails on this row: {type(error).__name__}: {str(error).rstrip('.')[:300]}.") from None


def _text_fields(completion: Any) -> dict[str, Any]:
    fields = {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
    if completion.notice is not None:
        fields["notice"] = completion.notice
    if completion.seed is not None:
        fields["seed"] = completion.seed
    if completion.logprobs is not None:
        fields["logprobs"] = [_logprobs(place) for place in completion.logprobs]
    return fields


def _logprobs(place: Mapping[int, Any]) -> dict[str, Any]:
    return {str(id): {"logprob": each.logprob, "rank": each.rank, "decoded_token": each.decoded_token} for id, each in place.items()}


def _score_fields(score: Score) -> dict[str, Any]:
    fields = {} if score.continuation is None else {"continuation": score.continuation}
    return {**fields, "token_ids": score.token_ids, "token_logprobs": score.token_logprobs, "logprob": score.logprob, "is_greedy": score.is_greedy}


def error_type(error: BaseException) -> str:
    """What an error row calls its error."""
    return "InvalidRow" if isinstance(error, (RowError, openai_format.RequestRefused, TypeError)) or type(error) is ValueError else type(error).__name__


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
