"""How the next token is chosen from logits: the parameters of a request, and the rule as pure functions.

The rule, over the full distribution. Edits are made in float32, everything after them is float64:

1. Edits. The logits of tokens in the prompt or the text are divided by the repetition penalty where positive, else
   multiplied; tokens of the text lose the presence penalty and the frequency penalty for each time; the logit bias is
   added. Banned tokens, and where some are allowed all others, are taken out, as are the tokens that would end the
   text before min_tokens. Then logits processors edit the row in order.
2. Tokens stand in order of falling logit, ties by rising id. Unused entries of the vocabulary take no part.
3. temperature: a token weighs exp((logit - largest logit) / temperature). Temperature 0 takes the first token,
   and between 0 and 2**-126 it counts as that.
4. top-k: the first k tokens stay.
5. top-p: of those, the shortest beginning stays whose weight is at least p times the weight of all of them.
6. min-p: of those, tokens stay that weigh at least p times the first one.
7. typical-p (Meister et al., "Locally Typical Sampling"): of those, the fewest tokens stay whose surprise is nearest to the
   entropy of them all and whose weight is at least p times the weight of them all.
8. With u uniform in [0, 1): the first token whose running sum of weights exceeds u times their whole weight.

That is the order of transformers (penalties, temperature, top-k, top-p, min-p, typical-p). vLLM applies min-p before
top-k and top-p; llama.cpp's usual chain applies the temperature last. Penalties count the tokens that vLLM's do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ferrum.errors import DeviceError, OptionError
from ferrum.options import check_settings, described, setting

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.float64]  # [R] or [R, n]

LogitsProcessor = Callable[[list[int], Any], None]

# The engine's log-sum-exp may be off by this share of the sum (it adds float32 exponentials on some devices).
SUM_TOLERANCE = 1e-5
SMALLEST_TEMPERATURE = 2.0**-126  # engines take it as float32
SUM_ROUNDING = 1e-10  # of a running float64 sum over any vocabulary


@described
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued. Raises OptionError that names the field, its value and what is allowed.

    max_tokens None: until the model's context or the KV cache is full. Values are kept as tuples and dicts. The same seed gives the same text, whatever runs beside it; None draws a fresh seed, reported in the output. Sample
    i of `n` draws with seed + i. Log-probabilities are those of the model, before edits and temperature.

    logits_processors: functions `f(token_ids, logits) -> None` that edit the row `logits` [vocab_size] float32 in place before a token
    is drawn; `token_ids` are prompt and text so far. They run between steps, while every other text waits; beside their own time a token
    of 151,936 costs some 0.1 ms at temperature 0, 0.7 ms otherwise. What they raise ends their own request.
    """

    n: int = setting(
        1, int, "texts to sample for a prompt, which is read once", unit="samples", minimum=1, maximum=4096,
        flag="--num-samples",
    )
    max_tokens: int | None = setting(
        256, int, "most tokens to generate", unit="tokens", minimum=1, maximum=1 << 31, short_flag="-n", default_text="256",
    )
    min_tokens: int = setting(
        0, int, "tokens before the text may end: until then no token that ends it is drawn and stop strings do not count",
        unit="tokens", minimum=0, maximum=1 << 31,
    )
    temperature: float = setting(
        0.7, float, "0 takes the likeliest token each time; higher is more varied", minimum=0.0, maximum=1000.0,
        metavar="T",
    )
    top_k: int = setting(0, int, "draw from the K likeliest tokens only; 0 or -1: off", minimum=-1, maximum=1 << 31, metavar="K")
    top_p: float = setting(
        1.0, float, "draw from the likeliest tokens that together have probability P; 1: off",
        above=0.0, maximum=1.0, metavar="P",
    )
    min_p: float = setting(
        0.0, float, "drop tokens below P times the likeliest one's probability; 0: off",
        minimum=0.0, maximum=1.0, metavar="P",
    )
    typical_p: float = setting(
        1.0, float, "draw from the tokens of the most expected surprise that together have probability P; 1: off",
        above=0.0, maximum=1.0, metavar="P",
    )
    repetition_penalty: float = setting(
        1.0, float, "above 1: make tokens of the prompt and the text less likely; 1: off", minimum=0.01, maximum=100.0,
        metavar="X",
    )
    presence_penalty: float = setting(
        0.0, float, "take X from the logits of tokens that are in the text; 0: off", minimum=-100.0, maximum=100.0, metavar="X"
    )
    frequency_penalty: float = setting(
        0.0, float, "take X from the logit of a token for each time it is in the text; 0: off",
        minimum=-100.0, maximum=100.0, metavar="X",
    )
    logit_bias: Mapping[int, float] = setting(
        None, float, "add X to the logit of token ID; may be repeated", mapping=True, minimum=-1e9, maximum=1e9,
        default_text="none", metavar="ID=X",
    )
    allowed_token_ids: Sequence[int] | None = setting(
        None, int, "draw from these tokens only; may be repeated", sequence=True, may_be_empty=False, minimum=0, maximum=(1 << 31) - 1,
        default_text="all", metavar="ID", flag="--allowed-token-id",
    )
    banned_token_ids: Sequence[int] = setting(
        (), int, "never draw this token; may be repeated", sequence=True, minimum=0, maximum=(1 << 31) - 1,
        default_text="none", metavar="ID", flag="--banned-token-id",
    )
    seed: int | None = setting(
        None, int, "repeat a text: the same seed draws the same tokens", minimum=0, maximum=(1 << 64) - 1,
        default_text="a fresh one", metavar="S",
    )
    stop: Sequence[str] = setting(
        (), str, "end before this text appears; may be repeated", sequence=True, default_text="none", metavar="TEXT"
    )
    stop_token_ids: Sequence[int] = setting(
        (), int, "end at this token too; may be repeated", sequence=True, minimum=0, maximum=(1 << 31) - 1,
        default_text="none", metavar="ID", flag="--stop-token-id",
    )
    ignore_eos: bool = setting(False, bool, "go on where the model ends its text")
    logprobs: int | None = setting(
        None, int, "give the log-probability of each token, and of the N likeliest in its place", unit="tokens",
        minimum=0, maximum=1024, default_text="none",
    )
    prompt_logprobs: int | None = setting(
        None, int, "the same for the tokens of the prompt", unit="tokens", minimum=0, maximum=1024, default_text="none"
    )

    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        processors = (self.logits_processors,) if callable(self.logits_processors) else tuple(self.logits_processors or ())
        for processor in processors:
            if not callable(processor):
                raise OptionError(f"logits_processors has {processor!r}: expected functions of (token_ids, logits) that edit the logits in place.")
        object.__setattr__(self, "logits_processors", processors)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}. Lower it, or raise max_tokens.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def fresh_seed() -> int:
    return random.SystemRandom().getrandbits(32)


_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """The u of a text's token number `position`, in [0, 1): a pure function, so that a draw can be made again.

    SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014) at that place of the
    sequence that the scrambled seed starts.
    """
    return (_mix((_mix((seed + _GAMMA) & _MASK) + (position + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53


class CandidateRows(NamedTuple):
    """The largest logits of R rows, in the rule's order, and what is known of the others.

    ids int [R, n]; logits float [R, n]; `others`: tokens of the vocabulary that are not in a row; `log_sum_exp` [R] of
    all logits / temperature, which engines take as float32 (not read where `others` is 0 or the temperature is 0).
    """

    ids: npt.NDArray[np.integer]
    logits: npt.NDArray[np.floating]
    others: int
    log_sum_exp: npt.NDArray[np.float64]


class DrawRules(NamedTuple):
    """What the rule needs of the params of R rows, float64 [R] each. Temperature 0 is top-k 1 at temperature 1."""

    temperature: Rows
    top_k: Rows  # inf: off
    top_p: Rows
    min_p: Rows
    typical_p: Rows


def draw_rule(params: SamplingParams) -> tuple[float, float, float, float, float]:
    """A row of `draw_rules`."""
    if params.greedy:
        return 1.0, 1.0, 1.0, 0.0, 1.0
    return max(params.temperature, SMALLEST_TEMPERATURE), params.top_k if params.top_k > 0 else float("inf"), params.top_p, params.min_p, params.typical_p


def draw_rules(rows: list[tuple[float, float, float, float, float]]) -> DrawRules:
    import numpy as np

    return DrawRules(*np.array(rows, dtype=np.float64).T)


def candidate_count(params: SamplingParams) -> int:
    """How many candidates to ask the engine for: enough for nearly every draw."""
    if params.greedy:
        return 1
    return params.top_k if 0 < params.top_k <= 256 else 64


def full_row(logits: npt.NDArray[np.float32], unused_ids: Collection[int] = ()) -> CandidateRows:
    """Every token of a row of logits [vocab_size] as candidates; `unused_ids` are left out."""
    import numpy as np

    # One key holds both orders, so that numpy's fastest sort keeps ties by id: the bits of a float, in an order that
    # falls as it rises (as those of sign and magnitude do), then the id. Adding 0 makes -0 equal to 0. Unused ids come last.
    bits = (logits + np.float32(0)).view(np.uint32)
    falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF)).astype(np.uint64)
    keys = falling << np.uint64(32) | np.arange(len(logits), dtype=np.uint64)
    last = np.uint64(_MASK)
    if len(unused_ids):
        unused = np.fromiter(unused_ids, np.int64, len(unused_ids))
        keys[unused[unused < len(keys)]] = last
    keys.sort()
    ids = (keys[: keys.searchsorted(last)] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return CandidateRows(ids[None], logits[ids][None], 0, np.zeros(1))


def largest(logits: npt.NDArray[np.float32], count: int, temperature: float) -> CandidateRows:
    """The first `count` tokens of a row of logits [vocab_size], in order."""
    import numpy as np

    count = min(count, len(logits))
    ids = np.flatnonzero(logits >= np.partition(logits, len(logits) - count)[len(logits) - count])
    ids = ids[np.argsort(-logits[ids], kind="stable")[:count]]
    top = np.float64(logits[ids[0]])
    with np.errstate(under="ignore"):
        total = np.exp((logits - np.float32(top)) / np.float32(temperature)).sum(dtype=np.float64)
    return CandidateRows(ids[None], logits[ids][None], len(logits) - count, np.array([top / np.float32(temperature) + np.log(total)]))


def sample(rows: CandidateRows, params: SamplingParams, u: float) -> int | None:
    """The token that the rule draws from a single row with `u`, or None where its candidates do not decide it."""
    import numpy as np

    index = int(draw(rows, draw_rules([draw_rule(params)]), np.array([u]))[0])
    return None if index < 0 else int(rows.ids[0, index])


def draw(rows: CandidateRows, rules: DrawRules, u: Rows) -> npt.NDArray[np.intp]:
    """The index of the candidate that the rule draws in each row with u [R], or -1 where the candidates do not decide
    it: then ask for the full row.

    Every filter before typical-p keeps a beginning of the order, so what is unknown is only how long it is and what it
    weighs: both are kept as intervals, and a token is returned only if every value inside them gives the same one.
    Raises DeviceError where logits are not finite.
    """
    import numpy as np

    logits = rows.logits.astype(np.float64)
    largest = logits[:, :1]
    if not np.isfinite(largest).all() or np.isnan(logits[:, -1]).any():  # NaN sorts last
        raise DeviceError("The model's logits are not finite: its weights or its device are faulty.")
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((logits - largest) / rules.temperature[:, None])
    sums = weights.cumsum(axis=1)
    kept = _Kept(weights, sums, rows.others, *_total(rows, rules.temperature, weights, sums))
    if np.isfinite(rules.top_k).any():
        kept.first(rules.top_k)
    if (rules.top_p < 1).any():
        kept.nucleus(rules.top_p)
    if rules.min_p.any():
        kept.at_least(rules.min_p)
    index = kept.draw(u)
    for row in (rules.typical_p < 1).nonzero()[0].tolist():
        index[row] = kept.draw_typical(row, rules.typical_p[row], u[row])
    return index


def _total(rows: CandidateRows, temperature: Rows, weights: Rows, sums: Rows) -> tuple[Rows, Rows]:
    """The least and the most that all tokens of each row weigh together."""
    import numpy as np

    known = sums[:, -1]
    if not rows.others:
        return known.copy(), known.copy()
    most = _most(weights, sums, rows.others)
    with np.errstate(all="ignore"):
        log_sum_exp = rows.log_sum_exp.astype(np.float64)
        claimed = np.exp(log_sum_exp - rows.logits[:, 0] / temperature.astype(np.float32).astype(np.float64))
        slack = SUM_TOLERANCE + 4 * np.spacing(np.abs(log_sum_exp))
        low, high = claimed * (1 - slack), claimed * (1 + slack)
    believed = np.isfinite(high) & np.isfinite(slack)
    low = np.where(believed, np.minimum(np.maximum(known, low), most), known)
    return low, np.where(believed, np.minimum(np.maximum(low, high), most), most)


def _most(weights: Rows, sums: Rows, others: int | Rows) -> Rows:
    """The most that the candidates and `others` tokens after them weigh together, rounding of a running sum included."""
    last = weights[:, -1]
    return sums[:, -1] + (last > 0) * (others * last + (sums[:, -1] + others * last) * SUM_ROUNDING)


class _Kept:
    """The beginning of each row's order that is kept: between `shortest` and `longest` tokens, which weigh `low` to `high`."""

    def __init__(self, weights: Rows, sums: Rows, others: int, low: Rows, high: Rows):
        import numpy as np

        rows, self.count = sums.shape
        self.weights = weights
        self.sums = sums
        self.others = others
        self.shortest = np.full(rows, self.count + others)
        self.longest = self.shortest.copy()
        self.low = low
        self.high = high

    def first(self, count: Rows) -> None:
        """Keep at most `count` tokens."""
        import numpy as np

        most = np.minimum(count, self.count + self.others).astype(np.intp)
        self._cut(most, most)

    def nucleus(self, p: Rows) -> None:
        """Keep the shortest beginning that weighs at least p of what is kept; p = 1 keeps all."""
        import numpy as np

        least, most = p * self.low, p * self.high
        shortest = (self.sums < least[:, None]).sum(axis=1) + 1
        longest = (self.sums < most[:, None]).sum(axis=1) + 1
        longest = np.where(longest <= self.count, longest, self.longest)
        off = p >= 1
        self._cut(np.where(off, self.shortest, shortest), np.where(off, self.longest, longest))
        # The last token of the nucleus reaches past p by less than its own weight.
        uncertain = ~off & (self.low < self.high)
        if uncertain.any():
            high = np.minimum(self.high, most + self._at(self.weights, shortest))
            self.high = np.where(uncertain, high, self.high)
            self.low = np.where(uncertain, np.minimum(np.maximum(self.low, least), high), self.low)

    def at_least(self, p: Rows) -> None:
        """Keep tokens that weigh at least p times the first one, whose weight is 1; p = 0 keeps all."""
        import numpy as np

        count = (self.weights >= p[:, None]).sum(axis=1)
        off = p <= 0
        self._cut(np.where(off, self.shortest, count), np.where(off | (count == self.count), self.longest, count))

    def draw(self, u: Rows) -> npt.NDArray[np.intp]:
        """The index of the token at u in each row, or -1 if it is not certain."""
        import numpy as np

        index = (self.sums <= (u * self.low)[:, None]).sum(axis=1)
        index[index != (self.sums <= (u * self.high)[:, None]).sum(axis=1)] = -1
        for row in (index >= np.minimum(self.shortest, self.count)).nonzero()[0]:
            # u times the sum may round up to the sum itself: the last kept token that weighs anything.
            index[row] = self.weights[row, : self.shortest[row]].nonzero()[0][-1] if self._known(row) else -1
        return index

    def draw_typical(self, row: int, p: float, u: float) -> int:
        """The index of the token at u among the typical ones of what is kept in a row, or -1 if it is not certain."""
        import numpy as np

        if not self._known(row):
            return -1
        weights = self.weights[row, : self.shortest[row]]
        weights = weights[weights > 0]
        probabilities = weights / weights.sum()
        surprise = -np.log(probabilities)
        order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()), kind="stable")
        count = int(probabilities[order].cumsum().searchsorted(p)) + 1
        typical = np.sort(order[:count])
        sums = weights[typical].cumsum()
        return int(typical[min(int(sums.searchsorted(u * sums[-1], side="right")), len(typical) - 1)])

    def _known(self, row: int) -> bool:
        """Whether exactly the kept tokens are known, all of them candidates."""
        return bool(self.shortest[row] == self.longest[row] <= self.count)

    def _at(self, values: Rows, count: npt.NDArray[np.intp]) -> Rows:
        """The value of each row's candidate number `count` from 1, or of the last candidate."""
        import numpy as np

        return values[np.arange(len(values)), np.minimum(count, self.count) - 1]

    def _cut(self, shortest: npt.NDArray[np.intp], longest: npt.NDArray[np.intp]) -> None:
        """Keep no more than a number of tokens that lies between two bounds."""
        import numpy as np

        cut = (longest < self.longest) | (shortest < self.shortest)
        if not cut.any():
            return
        self.shortest = np.minimum(self.shortest, shortest)
        self.longest = np.minimum(self.longest, longest)
        inside = self.longest <= self.count
        beyond = np.minimum(self.high, _most(self.weights, self.sums, np.maximum(self.longest - self.count, 0)))
        high = np.where(inside, self._at(self.sums, self.longest), beyond)
        exact = inside & (self.shortest == self.longest)
        low = np.where(exact, high, np.minimum(self.low, self._at(self.sums, self.shortest)))
        self.high = np.where(cut, high, self.high)
        self.low = np.where(cut, low, self.low)
