"""Which sequences take part in the next step, and with how many tokens: a state machine without a model.

Sequences stand in order of priority (lower first), then of turn, then of arrival. A step holds one new token of every running text and up to
`prefill_chunk` prompt tokens. New sequences are admitted in order, once their prompts fit the free KV blocks: nobody
overtakes, so nobody starves. Where a running sequence finds no free block, the last one in order that runs is put back
whole: its blocks are released, and its tokens, prompt and text so far, are computed anew when its turn comes. The
first in order can always go on, so every sequence ends.

A sequence starts with what the KV cache has of its tokens. Where a running one is about to compute the next of them, it waits for that.
"""

from __future__ import annotations

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple, Protocol


class Pool(Protocol):
    """What the scheduler uses of an engine; all of it does what it says or raises and changes nothing."""

    @property
    def kv_blocks_free(self) -> int: ...
    def new_id(self) -> int: ...
    def adopt(self, id: int, tokens: list[int]) -> int:
        """Start `id` with the longest cached beginning of `tokens`, whole blocks; its tokens, where 0 is none and nothing started."""
    def cached_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """Tokens that `adopt` would find, and how many of their blocks others hold, so that they cost no free one."""
    def fork(self, source: int, target: int) -> None: ...
    def release(self, sequence: int) -> None: ...
    def truncate(self, sequence: int, length: int) -> bool:
        """Drop the tokens behind the first `length`; True if others hold the last block, so that the next write takes one block more."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine: sequences, tokens, rows of logits, and tokens of a KV block."""

    max_sequences: int
    prefill_chunk: int
    max_logit_rows: int
    block_tokens: int = 16

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Limits:
        """Those of an engine with these options."""
        return cls(options["max_sequences"], options["prefill_chunk"], options["max_logit_rows"])


class Sequence:
    """Tokens that are computed in order.

    The first `computed` of `tokens` are in the KV cache, and all but the last `excess` shall be. Logits are wanted of
    positions from `wanted_from` on. A sequence that is not `active` keeps its place and its blocks until others need
    them. `source`: a sequence whose tokens this one begins with, to be forked from. `cached`: how many tokens were in the KV
    cache when it first got its place, or was given other tokens; None before.
    """

    __slots__ = ("tokens", "excess", "computed", "wanted_from", "active", "priority", "turn", "arrival", "engine_id", "queues", "source", "forks",
                 "shared_tail", "cached", "owner")

    def __init__(self, tokens: list[int], wanted_from: int, *, owner: Any = None, priority: int = 0, excess: int = 0,
                 source: Sequence | None = None):
        self.tokens = tokens
        self.excess = excess
        self.computed = 0
        self.wanted_from = wanted_from
        self.active = True
        self.priority = priority
        self.turn = 0
        self.arrival = -1
        self.engine_id: int | None = None  # while it holds KV blocks
        self.queues = False  # it holds KV blocks of a text before, and goes on once nobody waits who came before it
        self.source = source
        self.forks = 0  # waiting sequences whose source this is
        self.shared_tail = False  # its last block may be shared with another: the next write may need one block more
        self.cached: int | None = None
        self.owner = owner

    @property
    def goal(self) -> int:
        """Tokens that shall be computed."""
        return len(self.tokens) - self.excess

    @property
    def pending(self) -> int:
        """Tokens still to compute."""
        return len(self.tokens) - self.excess - self.computed

    @property
    def runs(self) -> bool:
        """Whether it takes part in steps while it holds KV blocks; others may have them otherwise."""
        return self.active and not self.queues and self.pending > 0

    def append(self, token: int) -> None:
        """Add the token that the last logits gave; its own are wanted next."""
        self.tokens.append(token)
        self.wanted_from = len(self.tokens) - 1

    def order(self) -> tuple[int, int, int]:
        return self.priority, self.turn, self.arrival


class Chunk(NamedTuple):
    """A sequence's part of a step: `tokens` of it from `sequence.computed` on; logits of the last `rows` of them."""

    sequence: Sequence
    tokens: int
    rows: int

    @property
    def logits(self) -> str:
        """As `Engine.step` calls it; a chunk never wants some of several rows but the last."""
        return "none" if self.rows == 0 else "last" if self.rows == 1 else "all"


class Scheduler:
    """The sequences of one engine. Only one thread at a time may call."""

    def __init__(self, pool: Pool, limits: Limits):
        self._pool = pool
        self._limits = limits
        self._running: list[Sequence] = []  # with KV blocks, in order
        self._waiting: list[Sequence] = []  # without, in order
        self._arrivals = count()
        self.turns: defaultdict[int, int] = defaultdict(int)  # by priority: the highest turn of those that have started
        self.preemptions = 0

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.arrival = next(self._arrivals)
        if sequence.source is not None:
            sequence.source.forks += 1
        insort(self._waiting, sequence, key=Sequence.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it stands; its blocks go back."""
        self._leave_source(sequence)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._running:
            self._release(sequence)
        for fork in self._waiting:
            if fork.source is sequence:
                self._leave_source(fork)

    def rewind(self, sequence: Sequence, tokens: list[int], length: int) -> None:
        """Give an idle sequence other tokens, of which the first `length` may still be in the KV cache, and a new place in order."""
        if sequence.engine_id is not None:
            if length == 0:
                self._release(sequence)
            elif length < sequence.computed:
                sequence.shared_tail = self._pool.truncate(sequence.engine_id, length)
        sequence.tokens = tokens
        sequence.cached = None
        if sequence.engine_id is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self.add(sequence)
            return
        sequence.computed = sequence.cached = min(length, sequence.computed)
        self._running.remove(sequence)
        sequence.arrival = next(self._arrivals)
        sequence.queues = True
        insort(self._running, sequence, key=Sequence.order)

    def place(self, sequence: Sequence, length: int, start: Callable[[int], None]) -> None:
        """Add a new idle sequence whose first `length` tokens `start` puts into the KV cache, under the id that it is given."""
        blocks = -(-length // self._limits.block_tokens)
        while len(self._running) >= self._limits.max_sequences or blocks > self._pool.kv_blocks_free:
            idle = self._idle(but=None)
            if idle is None:
                break  # the engine has the last word
            self._put_back(idle)
        id = self._pool.new_id()
        start(id)
        sequence.engine_id, sequence.computed, sequence.active = id, length, False
        sequence.arrival = next(self._arrivals)
        insort(self._running, sequence, key=Sequence.order)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; preemptions and forks are done at once. Empty: no active sequence has anything to compute."""
        chunks: list[Chunk] = []
        room = _Room(self._pool.kv_blocks_free, self._limits.prefill_chunk, self._limits.max_logit_rows)
        settled = True
        first = self._next_waiting()
        for sequence in tuple(self._running):
            if sequence.queues:
                sequence.queues = first is not None and first.order() < sequence.order()
            if sequence.engine_id is None or not sequence.runs:
                continue  # put back a moment ago, or idle
            settled &= self._continue(sequence, chunks, room)
        while settled and room.prompt_tokens and room.rows and (following := self._next_waiting()):
            if any(other.queues and other.active and other.order() < following.order() for other in self._running):
                break  # that one goes on in the next step
            settled = self._admit(following, chunks, room)
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The step of these chunks was run."""
        for sequence, tokens, _ in chunks:
            sequence.computed += tokens
            sequence.shared_tail = False

    def _continue(self, sequence: Sequence, chunks: list[Chunk], room: _Room) -> bool:
        """Plan a running sequence's next chunk, putting others back where it needs their blocks; False: it must wait."""
        tokens, rows = self._chunk(sequence, room)
        if not tokens:
            return True
        while self._blocks(sequence, tokens) > room.blocks:
            victim = self._victim(sequence)
            if victim is None:
                if len(self._running) > 1:
                    return False
                break  # alone: the engine has the last word
            free = self._pool.kv_blocks_free
            self._put_back(victim)
            room.blocks += self._pool.kv_blocks_free - free
        self._plan(sequence, tokens, rows, chunks, room)
        return True

    def _admit(self, sequence: Sequence, chunks: list[Chunk], room: _Room) -> bool:
        """Start a waiting sequence and plan its first chunk; False: it must wait."""
        source = sequence.source
        take_over = source is not None and source.forks == 1
        if self._any_runs() and not self._fits(sequence, beside_idle=False):
            return False  # whoever is idle keeps what would not be enough
        if source is None and self._comes_soon(sequence):
            return False
        while len(self._running) >= self._limits.max_sequences and (idle := self._idle(but=source)):
            self._put_back(idle)
        if len(self._running) >= self._limits.max_sequences and not take_over:
            if source is None or self._any_runs():
                return False
            take_over = True
        while not self._fits(sequence):
            idle = self._idle(but=source)
            if idle is None:
                if self._any_runs():
                    return False
                take_over = source is not None  # alone: the other forks compute their own beginning, and the engine has the last word
                break
            self._put_back(idle)
        self._waiting.remove(sequence)
        self._start(sequence, take_over=take_over)
        tokens, rows = self._chunk(sequence, room)
        self._plan(sequence, tokens, rows, chunks, room)
        return True

    def _start(self, sequence: Sequence, *, take_over: bool) -> None:
        """Give a sequence its place in the engine: one with what is cached of it, a fork of its source's, or the source's own."""
        self.turns[sequence.priority] = max(self.turns[sequence.priority], sequence.turn)
        source = sequence.source
        if source is None:
            sequence.engine_id = self._pool.new_id()
            if beginning := self._adoptable(sequence):
                sequence.computed = self._pool.adopt(sequence.engine_id, beginning)
            if sequence.cached is None:
                sequence.cached = sequence.computed
        elif take_over:
            sequence.engine_id, sequence.computed, sequence.shared_tail = source.engine_id, source.computed, source.shared_tail
            self._running.remove(source)
            source.engine_id, source.computed = None, 0
            self._leave_source(sequence)
            self._orphan(source)
        else:
            assert source.engine_id is not None
            engine_id = self._pool.new_id()
            self._pool.fork(source.engine_id, engine_id)
            sequence.engine_id, sequence.computed = engine_id, source.computed
            sequence.shared_tail = source.shared_tail = source.computed % self._limits.block_tokens != 0
            self._leave_source(sequence)
        insort(self._running, sequence, key=Sequence.order)

    def _chunk(self, sequence: Sequence, room: _Room) -> tuple[int, int]:
        """How many tokens a sequence can take in this step, and of how many of them it wants logits."""
        pending = sequence.pending
        if pending == 1:
            rows = int(sequence.wanted_from < sequence.goal)
            return (1, rows) if room.rows >= rows else (0, 0)
        plain = min(sequence.wanted_from, sequence.goal) - sequence.computed  # tokens before the first row wanted
        if plain == pending - 1 and pending <= room.prompt_tokens and room.rows:
            return pending, 1
        if plain > 0:
            return min(plain, room.prompt_tokens), 0
        others = sum(other.runs for other in self._running) - 1
        tokens = min(pending, room.prompt_tokens, max(room.rows - others, min(room.rows, 1)))
        return tokens, tokens

    def _plan(self, sequence: Sequence, tokens: int, rows: int, chunks: list[Chunk], room: _Room) -> None:
        chunks.append(Chunk(sequence, tokens, rows))
        room.blocks -= self._blocks(sequence, tokens)
        room.rows -= rows
        if tokens > 1:
            room.prompt_tokens -= tokens

    def _blocks(self, sequence: Sequence, tokens: int) -> int:
        """KV blocks that the next `tokens` of a sequence may need."""
        size = self._limits.block_tokens
        return -(-(sequence.computed + tokens) // size) - -(-sequence.computed // size) + sequence.shared_tail

    def _fits(self, sequence: Sequence, *, beside_idle: bool = True) -> bool:
        """Whether a new sequence's tokens fit beside what the running ones still need: their prompts, and a block each to grow.

        Without those who are idle it is whether they might: the blocks that they share are counted as if they were their own. What others
        hold of its beginning costs nothing, unless it may be theirs.
        """
        size = self._limits.block_tokens
        start = sequence.source.computed if sequence.source is not None else 0
        need = -(-sequence.goal // size) - -(-start // size) + (start % size != 0)
        planned = sum(self._blocks(other, other.pending) + 1 for other in self._running if other.runs)
        idle = 0 if beside_idle else sum(-(-other.computed // size) for other in self._running if not other.runs and other is not sequence.source)
        free = self._pool.kv_blocks_free + idle - planned
        if need <= free or free < 1 or sequence.source is not None:  # the last block is never shared: its tokens are computed
            return need <= free
        shared = self._pool.cached_prefix(self._adoptable(sequence))[1]
        return need - max(0, shared - idle) <= free

    def _adoptable(self, sequence: Sequence) -> list[int]:
        """The tokens that need not be computed if they are cached: those before the first row wanted, and not the last."""
        end = min(sequence.wanted_from, sequence.goal - 1)
        return sequence.tokens[: end - end % self._limits.block_tokens]

    def _comes_soon(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute the block that a waiting one would adopt next."""
        size = self._limits.block_tokens
        beginning = self._adoptable(sequence)
        alike = [other for other in self._running
                 if other.runs and other.computed < min(len(beginning), other.goal) and other.tokens[:size] == beginning[:size]]
        if not alike:
            return False
        end = self._pool.cached_prefix(beginning)[0] + size
        return end <= len(beginning) and any(other.computed < end <= other.goal and other.tokens[:end] == beginning[:end] for other in alike)

    def _any_runs(self) -> bool:
        return any(sequence.runs for sequence in self._running)

    def _next_waiting(self) -> Sequence | None:
        return next((sequence for sequence in self._waiting if sequence.active), None)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The sequence to put back so that `sequence` can go on: an idle one, else the last in order behind it."""
        idle = self._idle(but=sequence)
        if idle is not None:
            return idle
        last = self._running[-1]
        return last if last.order() > sequence.order() else None

    def _idle(self, but: Sequence | None) -> Sequence | None:
        """The last in order that only keeps blocks; one that forks wait for only where there is no other."""
        idle = [other for other in self._running if other is not but and not other.runs]
        return max(idle, key=lambda other: (not other.forks, other.order()), default=None)

    def _put_back(self, sequence: Sequence) -> None:
        """Release a running sequence's blocks. If it has anything to compute, it waits in its old place in order."""
        unfinished = sequence.pending > 0
        self._release(sequence)
        self.preemptions += 1
        self._orphan(sequence)
        if unfinished:
            insort(self._waiting, sequence, key=Sequence.order)

    def _orphan(self, source: Sequence) -> None:
        """A source is gone: those that waited to fork from it compute their own beginning."""
        for fork in self._waiting:
            if fork.source is source:
                fork.source = None
        source.forks = 0

    def _leave_source(self, sequence: Sequence) -> None:
        """A sequence no longer waits for its source, which goes once nobody does."""
        source, sequence.source = sequence.source, None
        if source is None:
            return
        source.forks -= 1
        if source.forks == 0 and source.engine_id is not None:
            self._release(source)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.engine_id is not None
        self._pool.release(sequence.engine_id)
        self._running.remove(sequence)
        sequence.engine_id = None
        sequence.computed = 0
        sequence.shared_tail = sequence.queues = False


@dataclass
class _Room:
    """What a step that is being planned has left of KV blocks, prompt tokens and rows of logits."""

    blocks: int
    prompt_tokens: int
    rows: int
