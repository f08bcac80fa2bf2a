"""The batch format of OpenAI: its requests as rows, its results from outputs.

{"custom_id", "method": "POST", "url": "/v1/chat/completions" or "/v1/completions", "body"} becomes a row of ours, with every field of
the body honoured or refused by name. Ids derive from the row's key and `created` is 0, so that the same job gives the same bytes.
https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ferrum.errors import FerrumError
from ferrum.outputs import CompletionOutput, Logprob, RequestOutput
from ferrum.sampling import SamplingParams

if TYPE_CHECKING:
    from ferrum.batch.rows import Row

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# Fields that ask for nothing of what is generated.
_NO_EFFECT = frozenset({"model", "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"})
# Fields that may be there with the value that changes nothing.
_ONLY = {
    "stream": (False,), "stream_options": (), "echo": (False,), "suffix": ("",), "best_of": (1,), "response_format": ({"type": "text"},),
    "tool_choice": ("none",), "tools": ([],), "functions": ([],), "function_call": ("none",), "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
_PARAMS = frozenset(field.name for field in fields(SamplingParams)) - {"logprobs", "prompt_logprobs"}
_TEMPLATE = frozenset({"chat_template_kwargs", "add_generation_prompt", "continue_final_message"})


class RequestRefused(FerrumError, ValueError):
    """A request asks for what ferrum does not do; `field` names it."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


def is_request(row: dict[str, Any]) -> bool:
    """Whether a row is in this format; one with a prompt of its own has a url and a body for other reasons."""
    return "body" in row and "url" in row and "prompt" not in row and "messages" not in row


def row_of(request: dict[str, Any]) -> dict[str, Any]:
    """The row that a request is; RequestRefused names the field that cannot be honoured."""
    url, body = request["url"], request["body"]
    if url not in (CHAT, COMPLETIONS):
        raise RequestRefused(f"url is {str(url)[:60]!r}: expected {CHAT} or {COMPLETIONS}.", "url")
    if str(request.get("method") or "POST").upper() != "POST":
        raise RequestRefused(f"method is {str(request['method'])[:20]!r}: expected POST.", "method")
    if not isinstance(body, dict):
        raise RequestRefused("body is no JSON object.", "body")
    prompt = "messages" if url == CHAT else "prompt"
    if body.get(prompt) is None:
        raise RequestRefused(f"body has no {prompt}.", prompt)
    row: dict[str, Any] = {prompt: body[prompt]}
    params: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name == prompt or name in _NO_EFFECT:
            continue
        if name in ("max_completion_tokens", "max_tokens"):
            params["max_tokens"] = value
        elif name == "logprobs":
            params["logprobs"] = _logprobs(url, body)
        elif name == "top_logprobs" and url == CHAT:
            if value != 0 and not body.get("logprobs"):
                raise RequestRefused("top_logprobs is set, but logprobs is not true.", name)
        elif name in _PARAMS:
            params[name] = value
        elif name in _TEMPLATE and url == CHAT:
            row[name] = value
        elif name == "best_of" and value == body.get("n", 1):
            continue
        elif name not in _ONLY:
            raise RequestRefused(f"body has the field {name!r}, which ferrum does not know. Leave it out.", name)
        elif value not in _ONLY[name]:
            raise RequestRefused(f"body has {name!r}, which ferrum does not support. Leave it out.", name)
    row["params"] = {name: value for name, value in params.items() if value is not None}
    return row


def _logprobs(url: str, body: dict[str, Any]) -> int | None:
    """How many log-probabilities are asked for beside each token's own."""
    asked = body["logprobs"]
    if url == COMPLETIONS:
        return asked
    if not isinstance(asked, bool):
        raise RequestRefused("logprobs of a chat completion is true or false; how many is top_logprobs.", "logprobs")
    return (body.get("top_logprobs") or 0) if asked else None


def result(row: Row, output: RequestOutput, usage: dict[str, int], model: str) -> dict[str, Any]:
    """The line of a row that was run."""
    chat = row.chat
    choices = [_choice(completion, chat) for completion in output.outputs]
    name = row.key.hex()
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}", "object": "chat.completion" if chat else "text_completion", "created": 0, "model": model,
        "choices": choices, "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": row.name, "response": response, "error": None}


def failure(row: Row, error: dict[str, str]) -> dict[str, Any]:
    """The line of a row that could not be run."""
    name = row.key.hex()
    about = {"message": error["message"], "type": "invalid_request_error", "param": getattr(row.error, "field", None), "code": error["type"]}
    response = {"status_code": 400, "request_id": f"req_{name}", "body": {"error": about}}
    return {"id": f"batch_req_{name}", "custom_id": row.name, "response": response, "error": {"code": error["type"], "message": error["message"]}}


def _choice(completion: CompletionOutput, chat: bool) -> dict[str, Any]:
    ending = {"finish_reason": completion.finish_reason}
    if chat:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        places = None if completion.logprobs is None else {"content": _chat_logprobs(completion), "refusal": None}
        return {"index": completion.index, "message": message, "logprobs": places, **ending}
    places = None if completion.logprobs is None else _completion_logprobs(completion)
    return {"index": completion.index, "text": completion.text, "logprobs": places, **ending}


def _token(logprob: Logprob) -> dict[str, Any]:
    return {"token": logprob.decoded_token, "logprob": logprob.logprob, "bytes": list(logprob.decoded_token.encode("utf-8", "replace"))}


def _chat_logprobs(completion: CompletionOutput) -> list[dict[str, Any]]:
    places = []
    for token, place in zip(completion.token_ids, completion.logprobs or ()):
        others = sorted((each for id, each in place.items() if id != token or len(place) > 1), key=lambda each: each.rank)
        places.append({**_token(place[token]), "top_logprobs": [_token(each) for each in others]})
    return places


def _completion_logprobs(completion: CompletionOutput) -> dict[str, Any]:
    places = completion.logprobs or []
    tokens = [place[token] for token, place in zip(completion.token_ids, places)]
    offsets, offset = [], 0
    for each in tokens:
        offsets.append(offset)
        offset += len(each.decoded_token)
    return {
        "tokens": [each.decoded_token for each in tokens], "token_logprobs": [each.logprob for each in tokens],
        "top_logprobs": [{each.decoded_token: each.logprob for each in place.values()} for place in places], "text_offset": offsets,
    }
