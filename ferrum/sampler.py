"""The next tokens of a step: candidates from the engine, the rule on them, the full row where they do not decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ferrum.errors import DeviceError
from ferrum.outputs import Logprob
from ferrum.sampling import CandidateRows, draw, draw_rules, full_row, largest, sample, uniform
from ferrum_native._native import Candidates, Engine

if TYPE_CHECKING:
    from ferrum.request import Text
    from ferrum.tokenizer import Tokenizer


# Candidates that decide nearly every draw which those of the engine do not: ordering them costs a thirtieth of ordering a whole vocabulary.
_MANY = 4096


class Drawn(NamedTuple):
    """A text's next token, and its Logprobs if they are asked for; or the error of a logits processor of the text's own."""

    text: Text
    token: int
    logprobs: dict[int, Logprob] | None
    error: BaseException | None = None


class Read(NamedTuple):
    """A row in whose place the next token is known; `top`: how many of the likeliest are wanted beside it, None: none, nor its rank."""

    row: int
    token: int
    top: int | None


class ReadToken(NamedTuple):
    """The log-probability of a known token, whether it is the likeliest, and its Logprobs if they are asked for."""

    logprob: float
    likeliest: bool
    logprobs: dict[int, Logprob] | None


class Sampler:
    """Draws from the last step of an engine. `unused_ids` are the padding entries of its vocabulary."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, unused_ids: Sequence[int], usable_tokens: int):
        self._engine = engine
        self._tokenizer = tokenizer
        self._unused_ids = np.fromiter(unused_ids, np.int64, len(unused_ids))
        self._usable_tokens = usable_tokens

    def sample(self, logits: Any, draws: list[tuple[int, Text]], reads: list[Read]) -> tuple[list[Drawn], list[ReadToken]]:
        """Draw for (row, text) pairs, and read known tokens, of the step that gave `logits` [rows, vocab_size].

        Raises DeviceError where logits are not finite.
        """
        rows = len(logits)
        count = max([1, *(text.candidates for _, text in draws), *(read.top or 1 for read in reads)])
        count = min(count, self._usable_tokens)
        edited = {row: text.edits for row, text in draws if text.edits is not None}  # texts of one row have drawn nothing yet
        edits = [row_edits.array(row) for row, row_edits in edited.items()]
        temperatures = None
        if any(not text.params.greedy for _, text in draws):
            temperatures = np.ones(rows, np.float32)
            for row, text in draws:
                temperatures[row] = text.rule[0]
        found = self._engine.candidates(
            count, edits=np.concatenate(edits) if edits else None, targets=self._targets(rows, draws, reads), temperatures=temperatures)
        if not np.isfinite(found.log_sum_exp).all():
            raise DeviceError("The model's logits are not finite: its weights or its device are faulty.")
        tokens = self._draw(logits, found, draws)
        processed = {at: self._draw_processed(logits, *draw) for at, draw in enumerate(draws) if draw[1].params.logits_processors}
        raw = found
        if edits and any(text.logprobs is not None for _, text in draws):
            raw = self._engine.candidates(count)  # log-probabilities are the model's own
        drawn = []
        for at, ((row, text), token) in enumerate(zip(draws, tokens)):
            choice = processed.get(at, token)
            if isinstance(choice, BaseException):
                drawn.append(Drawn(text, token, None, choice))
            else:
                drawn.append(Drawn(text, choice, self._logprobs(logits, raw, row, choice, text.params.logprobs)))
        return drawn, [self._read(logits, found, read) for read in reads]

    @staticmethod
    def _targets(rows: int, draws: list[tuple[int, Text]], reads: list[Read]) -> list[Sequence[int]] | None:
        """Ids whose logits are wanted by name in each row: known tokens, and those that a text is limited to."""
        limited = [(row, text.params.allowed_token_ids) for row, text in draws if text.params.allowed_token_ids]
        if not limited and not reads:
            return None
        targets: list[Sequence[int]] = [()] * rows
        for read in reads:
            targets[read.row] = (read.token,)
        for row, ids in limited:
            targets[row] = sorted(set(ids))
        return targets

    def _draw(self, logits: Any, found: Candidates, draws: list[tuple[int, Text]]) -> list[int]:
        if not draws:
            return []
        rows = [row for row, _ in draws]
        whole = len(rows) == len(found.ids) and rows == list(range(len(rows)))
        ids, values, log_sum_exp = found.ids, found.logits, found.log_sum_exp_at_temperature
        if not whole:
            ids, values, log_sum_exp = ids[rows], values[rows], log_sum_exp[rows]
        if all(text.params.greedy for _, text in draws):
            tokens = ids[:, 0].tolist()
        else:
            u = np.array([uniform(text.seed, text.length) for _, text in draws])
            rules = draw_rules([text.rule for _, text in draws])
            index = draw(CandidateRows(ids, values, self._usable_tokens - ids.shape[1], log_sum_exp), rules, u)
            tokens = ids[np.arange(len(rows)), index].tolist()
            for at in (index < 0).nonzero()[0].tolist():
                tokens[at] = self._draw_from_full_row(logits, *draws[at])
        for at, (row, text) in enumerate(draws):
            if text.params.allowed_token_ids:
                tokens[at] = self._draw_from_allowed(found.target_logits[row], text)
        return tokens

    def _draw_from_full_row(self, logits: Any, row: int, text: Text) -> int:
        values = np.asarray(logits)[row]
        values = values.copy() if text.edits is None else text.edits.apply(values)
        values[self._unused_ids] = -np.inf
        return self._draw_from(values, text)

    def _draw_from(self, values: Any, text: Text) -> int:
        """The token of a full row in which what cannot be drawn is -inf."""
        if text.params.greedy:
            return int(values.argmax())
        token = sample(largest(values, _MANY, text.rule[0]), text.params, uniform(text.seed, text.length))
        return self._decided(full_row(values), text) if token is None else token

    def _draw_from_allowed(self, values: Any, text: Text) -> int:
        ids = np.array(sorted(set(text.params.allowed_token_ids or ())))
        usable = ~np.isin(ids, self._unused_ids)
        ids, values = ids[usable], values[usable]
        order = np.argsort(-values, kind="stable")
        return self._decided(CandidateRows(ids[order][None], values[order][None], 0, np.zeros(1)), text)

    def _draw_processed(self, logits: Any, row: int, text: Text) -> int | BaseException:
        """A text's token after its logits processors, or what went wrong in them."""
        values = np.asarray(logits)[row]
        values = values.copy() if text.edits is None else text.edits.apply(values)
        try:
            for processor in text.params.logits_processors:
                if processor(list(text.sequence.tokens), values) is not None:
                    raise TypeError(f"The logits processor {processor!r} returned something: edit the row in place and return None.")
        except BaseException as error:  # the caller's own, such as SystemExit: it is raised where the text is waited for
            return error
        values[self._unused_ids] = -np.inf
        if text.params.allowed_token_ids:
            others = np.ones(len(values), bool)
            others[list(text.params.allowed_token_ids)] = False
            values[others] = -np.inf
        if not np.isfinite(values.max()):
            return ValueError("The logits processors left no token to draw, or made logits that are NaN or infinite. Ban a token by -inf, and leave one.")
        return self._draw_from(values, text)

    @staticmethod
    def _decided(rows: CandidateRows, text: Text) -> int:
        token = sample(rows, text.params, uniform(text.seed, text.length))
        assert token is not None  # a full row decides every draw
        return token

    def _read(self, logits: Any, found: Candidates, read: Read) -> ReadToken:
        value = float(found.target_logits[read.row][0])
        likeliest = bool(found.ids[read.row, 0] == read.token)
        return ReadToken(value - float(found.log_sum_exp[read.row]), likeliest, self._logprobs(logits, found, read.row, read.token, read.top))

    def _logprobs(self, logits: Any, found: Candidates, row: int, token: int, top: int | None) -> dict[int, Logprob] | None:
        if top is None:
            return None
        values, log_sum_exp = np.asarray(logits)[row], float(found.log_sum_exp[row])
        ids = found.ids[row, :top].tolist()

        def logprob(id: int, rank: int) -> Logprob:
            return Logprob(float(values[id]) - log_sum_exp, rank, self._tokenizer.decode([id]))

        rank = ids.index(token) + 1 if token in ids else self._rank(values, token)
        return {token: logprob(token, rank)} | {id: logprob(id, rank) for rank, id in enumerate(ids, 1) if id != token}

    def _rank(self, values: Any, token: int) -> int:
        """The place of a token in the order of a row."""
        value = values[token]
        before = int((values > value).sum()) + int((values[:token] == value).sum())
        unused = values[self._unused_ids]
        return 1 + before - int((unused > value).sum()) - int((unused[self._unused_ids < token] == value).sum())
