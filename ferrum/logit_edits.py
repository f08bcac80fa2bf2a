"""The edits of one text's logits: penalties, biases and bans, kept up to date token by token."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ferrum_native._native import EDIT_DTYPE

if TYPE_CHECKING:
    import numpy.typing as npt

    from ferrum.sampling import SamplingParams


class LogitEdits:
    """Step 1 of the rule in `ferrum.sampling` for one text, but for the allowed tokens.

    `ending_ids` are the tokens that would end the text: they are banned until min_tokens. `array` [edits] of EDIT_DTYPE
    is what `Engine.candidates` takes; `apply` does the same to a full row.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int], ending_ids: Collection[int]):
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        self._place: dict[int, int] = {}  # of a token in the arrays
        self._bias: list[float] = []
        self._generated: set[int] = set()
        self._edits = np.zeros(16, EDIT_DTYPE)
        self._bans = np.zeros(0, EDIT_DTYPE)
        if params.min_tokens:
            self._bans = np.zeros(len(ending_ids), EDIT_DTYPE)
            self._bans["token"], self._bans["penalty"], self._bans["bias"] = sorted(ending_ids), 1.0, -np.inf
        self._min_tokens = params.min_tokens
        self._tokens = 0
        for id, bias in params.logit_bias.items():
            self._set(id, bias=bias)
        for id in params.banned_token_ids:
            self._set(id, bias=-np.inf)
        if self._repetition != 1:
            for id in set(prompt_ids):
                self._set(id, penalty=self._repetition)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether these params edit logits at all."""
        return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
                    or params.logit_bias or params.banned_token_ids or params.min_tokens)

    def add(self, token: int) -> None:
        """Count a generated token."""
        self._tokens += 1
        if self._repetition == 1 and not self._presence and not self._frequency:
            return
        taken = self._frequency if token in self._generated else self._presence + self._frequency
        self._generated.add(token)
        at = self._place.get(token)
        self._set(token, penalty=self._repetition, bias=(0.0 if at is None else self._bias[at]) - taken)

    def array(self, row: int) -> npt.NDArray[np.void]:
        """The edits for row number `row` of a step."""
        edits = self._edits[: len(self._bias)]
        if self._tokens < self._min_tokens:
            edits = np.concatenate((edits, self._bans))
        edits["row"] = row
        return edits

    def apply(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """A row of logits [vocab_size] after the edits: bit by bit what the engine makes of it."""
        edits, logits = self._edits[: len(self._bias)], logits.copy()
        of = logits[edits["token"]]
        with np.errstate(over="ignore"):
            logits[edits["token"]] = np.where(of > 0, of / edits["penalty"], of * edits["penalty"]) + edits["bias"]
        if self._tokens < self._min_tokens:
            logits[self._bans["token"]] = -np.inf
        return logits

    def _set(self, token: int, penalty: float | None = None, bias: float | None = None) -> None:
        at = self._place.setdefault(token, len(self._bias))
        if at == len(self._bias):
            self._bias.append(0.0)
            if at == len(self._edits):
                self._edits = np.concatenate((self._edits, np.zeros(at, EDIT_DTYPE)))
            self._edits[at] = (0, token, 1.0, 0.0)
        if penalty is not None:
            self._edits["penalty"][at] = penalty
        if bias is not None:
            self._bias[at] = bias
            self._edits["bias"][at] = bias
