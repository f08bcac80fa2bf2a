"""How the next token is chosen from logits, and how stop strings end a text: pure functions and small values.

The rule, over the full distribution, in float64:

1. Tokens stand in order of falling logit, ties by rising id. Unused entries of the vocabulary take no part.
2. temperature: a token weighs exp((logit - largest logit) / temperature). Temperature 0 takes the first token.
3. top-k: the first k tokens stay.
4. top-p: of those, the shortest beginning stays whose weight is at least p times the weight of all of them.
5. min-p: of those, tokens stay that weigh at least p times the first one.
6. With u uniform in [0, 1): the first token whose running sum of weights exceeds u times their whole weight.

That is the order of transformers (temperature, top-k, top-p, min-p). vLLM applies min-p before top-k and top-p;
llama.cpp's usual chain applies the temperature last.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ferrum.errors import DeviceError
from ferrum.options import check_settings, setting

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The engine's log-sum-exp may be off by this share of the sum (it adds float32 exponentials on some devices).
SUM_TOLERANCE = 1e-5
SUM_ROUNDING = 1e-10  # of a running float64 sum over any vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Raises OptionError that names the field, its value and what is allowed.

    The same seed gives the same text, whatever runs beside it; None draws a fresh seed, reported in `Usage.seed`.
    """

    max_tokens: int = setting(
        256, int, "most tokens to generate", unit="tokens", minimum=1, maximum=1 << 31, short_flag="-n"
    )
    temperature: float = setting(
        0.7, float, "0 takes the likeliest token each time; higher is more varied", minimum=0.0, maximum=1000.0,
        metavar="T",
    )
    top_k: int = setting(0, int, "draw from the K likeliest tokens only; 0: off", minimum=0, maximum=1 << 31, metavar="K")
    top_p: float = setting(
        1.0, float, "draw from the likeliest tokens that together have probability P; 1: off",
        above=0.0, maximum=1.0, metavar="P",
    )
    min_p: float = setting(
        0.0, float, "drop tokens below P times the likeliest one's probability; 0: off",
        minimum=0.0, maximum=1.0, metavar="P",
    )
    seed: int | None = setting(
        None, int, "repeat a text: the same seed draws the same tokens", minimum=0, maximum=(1 << 64) - 1,
        default_text="a fresh one", metavar="S",
    )
    stop: tuple[str, ...] = setting(
        (), str, "end before this text appears; may be repeated", sequence=True, default_text="none", metavar="TEXT"
    )

    def __post_init__(self) -> None:
        check_settings(self)


def fresh_seed() -> int:
    return random.SystemRandom().getrandbits(32)


class CandidateRow(NamedTuple):
    """The largest logits of one row, in the rule's order, and what is known of the others.

    ids int [n]; logits float [n]; `others`: tokens of the vocabulary that are not in the row; `log_sum_exp` of all
    logits / temperature, which engines take as float32 (not read where `others` is 0 or the temperature is 0).
    """

    ids: npt.NDArray[np.integer]
    logits: npt.NDArray[np.floating]
    others: int
    log_sum_exp: float


def candidate_count(params: SamplingParams) -> int:
    """How many candidates to ask the engine for: enough for nearly every draw."""
    if params.temperature == 0:
        return 1
    return params.top_k if 0 < params.top_k <= 256 else 64


def full_row(logits: npt.NDArray[np.float32], unused_ids: Collection[int] = ()) -> CandidateRow:
    """Every token of a row of logits [vocab_size] as candidates; `unused_ids` are left out."""
    import numpy as np

    order = np.argsort(-logits, kind="stable")
    if unused_ids:
        order = order[~np.isin(order, np.fromiter(unused_ids, dtype=np.int64))]
    return CandidateRow(order, logits[order], 0, 0.0)


def sample(row: CandidateRow, params: SamplingParams, u: float) -> int | None:
    """The token that the rule draws with `u`, or None where these candidates do not decide it: then ask for the full row.

    Filters keep a beginning of the order, so what is unknown is only how long it is and what it weighs: both are
    kept as intervals, and a token is returned only if every value inside them gives the same one.
    """
    import numpy as np

    largest = float(row.logits[0])
    if not np.isfinite(largest) or np.isnan(row.logits[-1]):  # NaN sorts last
        raise DeviceError("The model's logits are not finite: its weights or its device are faulty.")
    if params.temperature == 0:
        return int(row.ids[0])
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((row.logits.astype(np.float64) - largest) / params.temperature)
    sums = np.cumsum(weights)
    kept = _Kept(weights, sums, *_total(row, params.temperature, weights, sums))
    if params.top_k:
        kept.first(params.top_k)
    if params.top_p < 1:
        kept.nucleus(params.top_p)
    if params.min_p:
        kept.at_least(params.min_p)
    index = kept.draw(u)
    return None if index is None else int(row.ids[index])


def _total(row: CandidateRow, temperature: float, weights, sums) -> tuple[int, float, float]:
    """Tokens in all, and the least and most that they weigh together."""
    import numpy as np

    known = float(sums[-1])
    if not row.others:
        return len(weights), known, known
    most = _most(weights, sums, row.others)
    with np.errstate(all="ignore"):
        log_sum_exp = np.float64(row.log_sum_exp)
        claimed = float(np.exp(log_sum_exp - np.float64(row.logits[0]) / np.float64(np.float32(temperature))))
        slack = SUM_TOLERANCE + 4 * float(np.spacing(abs(log_sum_exp)))
    low, high = known, most
    if np.isfinite(claimed) and np.isfinite(slack):
        low = min(max(known, claimed * (1 - slack)), most)
        high = min(max(low, claimed * (1 + slack)), most)
    return len(weights) + row.others, low, high


def _most(weights, sums, others: int) -> float:
    """The most that the candidates and `others` tokens after them weigh together, rounding of a running sum included."""
    if not weights[-1]:
        return float(sums[-1])
    return float(sums[-1] + others * weights[-1]) * (1 + SUM_ROUNDING)


class _Kept:
    """The beginning of the order that is kept: between `shortest` and `longest` tokens, which weigh `low` to `high`."""

    def __init__(self, weights, sums, count: int, low: float, high: float):
        self.weights = weights
        self.sums = sums
        self.shortest = self.longest = count
        self.low = low
        self.high = high

    def first(self, count: int) -> None:
        """Keep at most `count` tokens."""
        self._cut(count, count)

    def nucleus(self, p: float) -> None:
        """Keep the shortest beginning that weighs at least p of what is kept."""
        least, most = p * self.low, p * self.high
        shortest = int(self.sums.searchsorted(least)) + 1
        longest = int(self.sums.searchsorted(most)) + 1
        self._cut(shortest, longest if longest <= len(self.sums) else self.longest)
        if self.low < self.high:  # the last token of the nucleus reaches past p by less than its own weight
            last = float(self.weights[min(shortest, len(self.weights)) - 1])
            self.high = min(self.high, most + last)
            self.low = min(max(self.low, least), self.high)

    def at_least(self, p: float) -> None:
        """Keep tokens that weigh at least p times the first one, whose weight is 1."""
        count = int((self.weights >= p).sum())
        self._cut(count, count if count < len(self.weights) else self.longest)

    def draw(self, u: float) -> int | None:
        """The index of the token at u, or None if it is not certain."""
        index = int(self.sums.searchsorted(u * self.low, side="right"))
        if index != int(self.sums.searchsorted(u * self.high, side="right")):
            return None
        if index < min(self.shortest, len(self.sums)):
            return index
        if not self.shortest == self.longest <= len(self.sums):
            return None
        # u times the sum may round up to the sum itself: the last kept token that weighs anything.
        return int(self.weights[: self.shortest].nonzero()[0][-1])

    def _cut(self, shortest: int, longest: int) -> None:
        """Keep no more than a number of tokens that lies between two bounds."""
        if longest >= self.longest and shortest >= self.shortest:
            return
        self.shortest = min(self.shortest, shortest)
        self.longest = min(self.longest, longest)
        count = len(self.sums)
        if self.longest <= count:
            self.high = float(self.sums[self.longest - 1])
        else:
            self.high = min(self.high, _most(self.weights, self.sums, self.longest - count))
        if self.shortest == self.longest <= count:
            self.low = self.high
        else:
            self.low = min(self.low, float(self.sums[min(self.shortest, count) - 1]))


class StopChecker:
    """Cuts streamed text before the first stop string that is complete; where pieces are split makes no difference.

    Text that may be the start of a stop string is held back until it is decided. Of stop strings that are complete
    at the same character, the longest counts.
    """

    def __init__(self, stop: Collection[str]):
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take a piece; returns what may be shown. After a match, `matched` is the stop string and nothing more comes."""
        if self.matched is not None:
            return ""
        if not self._stop:
            return text
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stop)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back, once no more follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest start of `stop`, short of the whole, that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
