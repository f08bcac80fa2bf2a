"""What a request gives back, in the shape that users of vLLM know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


class Piece(NamedTuple):
    """A token as it comes, and the text that it settles: "" while a character or a possible stop string is open.

    `token_id` is None for text that was held back until the end.
    """

    text: str
    token_id: int | None


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability in its place, by the model alone: before edits and temperature.

    `rank` is 1 for the likeliest token; of equal ones the lowest id comes first.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One text.

    `text` ends before a stop string; `token_ids` are all tokens generated, those of a stop string or the end of text
    included. `finish_reason`: "stop" (end of text, stop token or stop string), "length" (max_tokens, or no room: `notice` says
    so), "timeout" (the time given for the request was over), "cancelled" (a stream was closed early), "error" (an exception ended it, and was raised). `stop_reason`: the
    stop string, the id of a stop token other than the model's end of text, else None. `seed` repeats the text (None
    where nothing was drawn: temperature 0). `logprobs` [tokens]: for each token the Logprob of it and of the N
    likeliest, by id, the token itself first; `cumulative_logprob` is their sum. Both are None unless asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    notice: str | None
    seed: int | None
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request; `completion_tokens` of all its texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds and tokens per second of a request.

    `load_s`: opening the model; `first_token_s`: from the call to the first token; `prefill_s`: the steps that read the
    prompt and gave the first token; `decode_s`: the steps of all further tokens. A step counts whole for every request
    in it. Tokens that were in the KV cache before count in no speed.
    """

    load_s: float
    first_token_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its texts.

    `prompt` is None where token ids were given. `prompt_logprobs` [prompt tokens]: as `CompletionOutput.logprobs`, None for
    the first token, which nothing comes before; None unless asked for. `finished` is False for a stream that still runs.
    `num_cached_tokens` of the prompt were in the KV cache before, from a session's turn before or another text that begins alike.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    usage: Usage
    timings: Timings
    num_cached_tokens: int


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after a prompt.

    `token_logprobs` [tokens]: natural logarithm of each token's probability given the prompt and the tokens before it;
    `logprob` is their sum. `is_greedy`: each token is the likeliest in its place.
    """

    continuation: str | None
    token_ids: list[int]
    token_logprobs: list[float]
    logprob: float
    is_greedy: bool
