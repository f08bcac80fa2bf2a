"""The scheduler against a pool that keeps every block's contents, and callers who add, pause, fork and take back at random.

The "model" is a hash of all tokens so far, read from the pool's blocks: a text that comes out right was computed right.
"""
import random
import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ferrum.errors import KVPoolExhausted, UnknownSequence
from ferrum.scheduler import Limits, Scheduler, Sequence

BLOCK = 16


def blocks_for(tokens):
    return -(-tokens // BLOCK)


def next_token(tokens):
    return zlib.crc32(repr(tokens).encode())


class BlockPool:
    """The KV pool of an engine, with reference counts, copy on write and whole blocks that are found again by their text; a step writes tokens,
    all of its chunks or none."""

    def __init__(self, blocks, max_sequences):
        self.contents = [[None] * BLOCK for _ in range(blocks)]
        self.references = [0] * blocks
        self.tables, self.lengths = {}, {}  # of live sequences
        self.ids, self.promised = 0, set()  # ids that were given, and those of them that no step has used yet
        self.max_sequences = max_sequences
        self.found, self.texts = {}, [None] * blocks  # text up to the end of a block -> that block, and back
        self.releases, self.released = 0, [0] * blocks  # when a block was last released

    @property
    def kv_blocks_free(self):
        return self.references.count(0)

    def new_id(self):
        self.ids += 1
        self.promised.add(self.ids)
        return self.ids

    def fork(self, source, target):
        self._check_live(source)
        if len(self.tables) >= self.max_sequences:
            raise KVPoolExhausted("no place for another sequence")
        self.promised.remove(target)
        self.tables[target], self.lengths[target] = list(self.tables[source]), self.lengths[source]
        for block in self.tables[target]:
            self.references[block] += 1

    def release(self, sequence):
        if sequence in self.promised:  # admitted to a step that never ran
            self.promised.remove(sequence)
            return
        self._check_live(sequence)
        table = self.tables.pop(sequence)
        while table:
            self._drop(table.pop())
        del self.lengths[sequence]

    def truncate(self, sequence, length):
        self._check_live(sequence)
        assert 0 < length <= self.lengths[sequence]
        table = self.tables[sequence]
        while len(table) > blocks_for(length):
            self._drop(table.pop())
        self.lengths[sequence] = length
        shared = length % BLOCK != 0 and self.references[table[-1]] > 1
        if length % BLOCK and not shared:
            self._forget(table[-1])
        return shared

    def _cached(self, tokens):
        blocks = []
        while len(tokens) >= (len(blocks) + 1) * BLOCK and (block := self.found.get(tuple(tokens[: (len(blocks) + 1) * BLOCK]))) is not None:
            blocks.append(block)
        return blocks

    def cached_prefix(self, tokens):
        blocks = self._cached(tokens)
        return len(blocks) * BLOCK, sum(self.references[block] > 0 for block in blocks)

    def adopt(self, sequence, tokens):
        blocks = self._cached(tokens)
        if not blocks:
            return 0
        assert len(self.tables) < self.max_sequences
        self.promised.remove(sequence)
        self.tables[sequence], self.lengths[sequence] = blocks, len(blocks) * BLOCK
        for block in blocks:
            self.references[block] += 1
        return self.lengths[sequence]

    def step(self, parts):
        """Append to sequences, given as (sequence, tokens, start)."""
        need, starting = 0, 0
        for sequence, tokens, start in parts:
            assert tokens
            if sequence in self.promised:
                assert start == 0
                starting += 1
                need += blocks_for(len(tokens))
                continue
            self._check_live(sequence)
            assert start == self.lengths[sequence]
            shared = start % BLOCK and self.references[self.tables[sequence][-1]] > 1
            need += blocks_for(start + len(tokens)) - blocks_for(start) + bool(shared)
        if need > self.kv_blocks_free:
            raise KVPoolExhausted(f"need {need} blocks, {self.kv_blocks_free} are free")
        assert len(self.tables) + starting <= self.max_sequences
        for sequence, tokens, start in parts:
            self._write(sequence, tokens)

    def read(self, sequence):
        table = self.tables[sequence]
        return [self.contents[table[p // BLOCK]][p % BLOCK] for p in range(self.lengths[sequence])]

    def _write(self, sequence, tokens):
        if sequence in self.promised:
            self.promised.remove(sequence)
            self.tables[sequence], self.lengths[sequence] = [], 0
        table = self.tables[sequence]
        for token in tokens:
            at = self.lengths[sequence]
            if at % BLOCK == 0:
                table.append(self._take())
            elif self.references[table[-1]] > 1:
                old, table[-1] = table[-1], self._take()
                self.contents[table[-1]] = list(self.contents[old])
                self._drop(old)
            else:
                self._forget(table[-1])
            self.contents[table[-1]][at % BLOCK] = token
            self.lengths[sequence] += 1
            if self.lengths[sequence] % BLOCK == 0 and (text := tuple(self.read(sequence))) not in self.found:
                self.found[text], self.texts[table[-1]] = table[-1], text

    def _take(self):
        free = [block for block, count in enumerate(self.references) if count == 0]
        block = min(free, key=lambda block: (self.texts[block] is not None, self.released[block]))
        self._forget(block)
        self.references[block] = 1
        return block

    def _drop(self, block):
        self.references[block] -= 1
        self.releases += 1
        self.released[block] = self.releases

    def _forget(self, block):
        if self.texts[block] is not None:
            del self.found[self.texts[block]]
            self.texts[block] = None

    def _check_live(self, sequence):
        if sequence not in self.tables:
            raise UnknownSequence(f"sequence {sequence} is not live")


@dataclass(eq=False)
class Job:
    """What a caller wants of one sequence: `limit` new tokens, or all rows of a given one; and what it got."""

    sequence: Sequence
    first: int  # tokens that were given
    limit: int
    keep: bool = False  # a session's: it stays in the pool when it ends
    forks: int = 0  # sequences that begin with it once it is read
    scored: bool = False  # they are continuations to score, else texts
    wanted: set = field(default_factory=set)  # positions whose rows are owed
    deadline: int = 0  # the step by which it has ended if it is not paused

    @property
    def total(self):
        """The most tokens that it computes, or its forks do."""
        return (len(self.sequence.tokens) + self.limit) * (1 + self.forks)


class Callers:
    """Everybody who uses a scheduler, and the rules that it must keep."""

    def __init__(self, rng, *, blocks, max_sequences, prefill_chunk, max_logit_rows):
        self.rng = rng
        self.limits = Limits(max_sequences, prefill_chunk, max_logit_rows)
        self.pool = BlockPool(blocks, max_sequences)
        self.scheduler = Scheduler(self.pool, self.limits)
        self.capacity = blocks * BLOCK
        self.beginnings = [[rng.randrange(3) for _ in range(self.capacity)] for _ in range(3)]  # that prompts have in common
        self.jobs = []  # unfinished
        self.idle = []  # sessions between two turns
        self.steps = 0
        self.finished = 0

    # What callers do

    def _size(self):
        """Lengths of a prompt and a text that fit the pool when alone."""
        total = self.rng.choice((self.rng.randint(2, self.capacity), self.rng.randint(2, min(40, self.capacity)), self.capacity))
        given = self.rng.randint(1, total - 1)
        return given, min(total - given, 30)

    def _prompt(self, given):
        """Tokens that begin as others do, for longer or shorter."""
        same = self.rng.choice((0, self.rng.randint(0, given), given))
        return self.rng.choice(self.beginnings)[:same] + [self.rng.randrange(1000) for _ in range(given - same)]

    def _start(self, job, *, queue=True):
        sequence = job.sequence
        job.wanted = set(range(sequence.wanted_from, sequence.goal))
        if queue:
            self.scheduler.add(sequence)
        self.jobs.append(job)
        self._expect_end(job)

    def _expect_end(self, job):
        """A job ends within as many steps as there are tokens to compute now, and delays nobody before it in order."""
        job.deadline = self.steps + sum(other.total for other in self.jobs)
        for other in self.jobs:
            if other.sequence.order() > job.sequence.order():
                other.deadline += job.total

    def add_text(self, priority=0, all_rows=False, keep=False):
        given, limit = self._size()
        tokens = self._prompt(given)
        wanted_from = self.rng.randrange(given) if all_rows else given - 1
        if all_rows and self.rng.random() < 0.5:
            wanted_from = 0
        self._start(Job(Sequence(tokens, wanted_from, priority=priority), given, limit, keep))

    def add_group(self, forks):
        """A prompt whose texts are forked from it once it is read."""
        given, limit = self._size()
        tokens = self._prompt(given)
        self._start(Job(Sequence(tokens, self.rng.choice((0, given - 1))), given, limit, forks=forks))

    def add_scores(self, parts):
        """Continuations of a prompt whose rows are all wanted but the last."""
        prompt = self._prompt(self.rng.randint(2, self.capacity // 2))
        source = Sequence(prompt[:-1], len(prompt))
        self._start(Job(source, len(source.tokens), self.capacity // 2, forks=parts, scored=True))

    def pause(self):
        if self.jobs:
            self.rng.choice(self.jobs).sequence.active = False

    def resume(self):
        paused = [job for job in self.jobs if not job.sequence.active and job.sequence.pending]
        if paused:
            job = self.rng.choice(paused)
            job.sequence.active = True
            self._expect_end(job)

    def remove(self):
        if self.jobs:
            job = self.rng.choice(self.jobs)
            self.jobs.remove(job)
            self._leave(job)

    def _leave(self, job):
        """A job ends, early or not: a session's tokens stay as far as they are computed."""
        if job.keep:
            job.sequence.active = False
            job.sequence.tokens = job.sequence.tokens[: job.sequence.computed]
            self.idle.append(job)
        else:
            self.scheduler.remove(job.sequence)

    def next_turn(self):
        """A session goes on with a text that begins like what it has, or not."""
        if not self.idle:
            return
        job = self.idle.pop(self.rng.randrange(len(self.idle)))
        kept = job.sequence
        same = self.rng.randint(0, len(kept.tokens))
        given, limit = self._size()
        tokens = (kept.tokens[:same] + [self.rng.randrange(1000, 2000) for _ in range(self.capacity)])[:given]
        kept.active, kept.wanted_from = True, given - 1
        self.scheduler.rewind(kept, tokens, min(same, given - 1))
        self._start(Job(kept, given, limit, keep=True), queue=False)

    def close_session(self):
        if self.idle:
            self.scheduler.remove(self.idle.pop().sequence)

    # Steps

    def step(self):
        waited = set(self.scheduler.waiting)
        ran = {sequence for sequence in self.scheduler.running if not sequence.queues}
        chunks = self.scheduler.schedule()
        self.steps += 1
        self._check_plan(chunks, waited, ran)
        self.pool.step([(chunk.sequence.engine_id, chunk.sequence.tokens[chunk.sequence.computed :][: chunk.tokens], chunk.sequence.computed)
                        for chunk in chunks])
        read = {chunk.sequence: self.pool.read(chunk.sequence.engine_id) for chunk in chunks}
        for chunk in chunks:
            self._take_rows(chunk, read[chunk.sequence])
        self.scheduler.commit(chunks)
        self._end_jobs()
        self.check()

    def _check_plan(self, chunks, waited, ran):
        able = [job.sequence for job in self.jobs if job.sequence.active and job.sequence.pending]
        assert bool(chunks) == bool(able)
        planned = [chunk.sequence for chunk in chunks]
        assert len(set(planned)) == len(planned) and set(planned) <= set(able)
        assert all(0 < chunk.tokens <= chunk.sequence.pending and 0 <= chunk.rows <= chunk.tokens for chunk in chunks)
        assert sum(chunk.tokens for chunk in chunks if chunk.tokens > 1) <= self.limits.prefill_chunk
        assert sum(chunk.tokens for chunk in chunks) <= self.limits.prefill_chunk + self.limits.max_sequences
        assert sum(chunk.rows for chunk in chunks) <= self.limits.max_logit_rows
        assert len(self.scheduler.running) <= self.limits.max_sequences
        still = {sequence for sequence in self.scheduler.waiting if sequence.active}
        for sequence in set(planned) & waited:
            assert all(sequence.order() < other.order() for other in still), "a sequence was overtaken"
        for sequence in still & ran:
            assert all(other.order() < sequence.order() for other in planned), "a sequence was put back for one behind it"

    def _take_rows(self, chunk, cached):
        sequence = chunk.sequence
        end = sequence.computed + chunk.tokens
        assert cached == sequence.tokens[:end]
        (job,) = (job for job in self.jobs if job.sequence is sequence)
        for position in range(end - chunk.rows, end):
            if position in job.wanted or chunk.logits != "all":
                job.wanted.remove(position)  # fails for a row that was given before
            sequence.wanted_from = max(sequence.wanted_from, position + 1)
        grown = len(sequence.tokens) - job.first
        if end == len(sequence.tokens) and not job.forks and not sequence.excess and chunk.rows:
            assert sequence.tokens[job.first :] == self._expected(sequence.tokens[: job.first], grown)
            if grown + 1 < job.limit:
                sequence.append(next_token(cached))
                job.wanted.add(len(sequence.tokens) - 1)

    @staticmethod
    def _expected(tokens, count):
        tokens = list(tokens)
        for _ in range(count):
            tokens.append(next_token(tokens))
        return tokens[len(tokens) - count :]

    def _end_jobs(self):
        for job in list(self.jobs):
            if job.sequence.pending:
                continue
            assert not job.wanted, "a row was not given"
            self.jobs.remove(job)
            self.finished += 1
            if job.forks:
                self._fork(job)
            else:
                self._leave(job)

    def _fork(self, job):
        source = job.sequence
        source.active = False
        for index in range(job.forks):
            if job.scored:
                tail = [index, *(self.rng.randrange(1000) for _ in range(self.rng.randint(1, max(1, job.limit - 2))))]
                part = Sequence(source.tokens + tail, len(source.tokens), excess=1, source=source)
                self._start(Job(part, len(part.tokens), 0))
            elif job.limit > 1:
                part = Sequence([*source.tokens, next_token(source.tokens)], len(source.tokens), source=source)
                self._start(Job(part, job.first, job.limit))
        if not job.scored and job.limit == 1:
            self.scheduler.remove(source)

    def check(self):
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len({*running, *waiting}) == len(running) + len(waiting)
        assert list(running) == sorted(running, key=Sequence.order) and list(waiting) == sorted(waiting, key=Sequence.order)
        assert {sequence.engine_id for sequence in running} == {*self.pool.tables, *self.pool.promised}
        assert all(sequence.engine_id is None for sequence in waiting)
        assert all(sequence.computed == self.pool.lengths.get(sequence.engine_id, 0) for sequence in running)
        for job in self.jobs:
            assert not job.sequence.active or self.steps <= job.deadline, "a sequence starves"

    def finish(self):
        """Everybody resumes, and ends within as many steps as there are tokens; then everything goes."""
        while any(not job.sequence.active and job.sequence.pending for job in self.jobs):
            self.resume()
        while self.jobs:
            self.step()
        while self.idle:
            self.close_session()
        assert self.scheduler.running == self.scheduler.waiting == ()
        assert self.pool.kv_blocks_free == len(self.pool.contents) and not self.pool.promised


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(2, 12), max_sequences=st.integers(1, 5), prefill_chunk=st.integers(1, 70), max_logit_rows=st.integers(1, 6),
                seed=st.integers(0, 1 << 30))
    def start(self, blocks, max_sequences, prefill_chunk, max_logit_rows, seed):
        self.callers = Callers(random.Random(seed), blocks=blocks, max_sequences=max_sequences, prefill_chunk=prefill_chunk,
                               max_logit_rows=max_logit_rows)

    @rule(priority=st.sampled_from((0, 0, 0, -1, 1)), all_rows=st.booleans(), keep=st.booleans())
    def add_text(self, priority, all_rows, keep):
        self.callers.add_text(priority, all_rows, keep)

    @rule(forks=st.integers(2, 6))
    def add_group(self, forks):
        self.callers.add_group(forks)

    @rule(parts=st.integers(1, 6))
    def add_scores(self, parts):
        self.callers.add_scores(parts)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.callers.step()

    @rule()
    def pause(self):
        self.callers.pause()

    @rule()
    def resume(self):
        self.callers.resume()

    @rule()
    def remove(self):
        self.callers.remove()

    @rule()
    def next_turn(self):
        self.callers.next_turn()

    @rule()
    def close_session(self):
        self.callers.close_session()

    @invariant()
    def holds(self):
        if hasattr(self, "callers"):
            self.callers.check()

    def teardown(self):
        if hasattr(self, "callers"):
            self.callers.finish()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("sizes", [
    dict(blocks=6, max_sequences=4, prefill_chunk=32, max_logit_rows=4),
    dict(blocks=24, max_sequences=8, prefill_chunk=64, max_logit_rows=3),
    dict(blocks=3, max_sequences=3, prefill_chunk=7, max_logit_rows=1),
    dict(blocks=10, max_sequences=1, prefill_chunk=16, max_logit_rows=2),
], ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_a_long_history_keeps_every_rule(sizes):
    rng = random.Random(11)
    callers = Callers(rng, **sizes)
    while callers.finished < 800:
        action = rng.random()
        if action < 0.10 and len(callers.jobs) < 12:
            callers.add_text(rng.choice((0, 0, 0, -1, 1)), rng.random() < 0.3, rng.random() < 0.3)
        elif action < 0.12 and len(callers.jobs) < 12:
            callers.add_group(rng.randint(2, 5))
        elif action < 0.14 and len(callers.jobs) < 12:
            callers.add_scores(rng.randint(1, 5))
        elif action < 0.18:
            callers.pause()
        elif action < 0.26:
            callers.resume()
        elif action < 0.28:
            callers.remove()
        elif action < 0.32:
            callers.next_turn()
        elif action < 0.325:
            callers.close_session()
        else:
            callers.step()
    assert callers.scheduler.preemptions > 20
    callers.finish()


def run_to_end(scheduler, pool, sequences):
    """Steps until nothing is pending; the number of steps."""
    steps = 0
    while any(sequence.pending for sequence in sequences):
        chunks = scheduler.schedule()
        assert chunks
        pool.step([(chunk.sequence.engine_id, chunk.sequence.tokens[chunk.sequence.computed :][: chunk.tokens], chunk.sequence.computed)
                   for chunk in chunks])
        scheduler.commit(chunks)
        steps += 1
    return steps


def test_forks_of_a_prompt_that_fills_the_pool_run_one_after_the_other():
    pool = BlockPool(4, 8)
    scheduler = Scheduler(pool, Limits(8, 64, 8))
    prompt = Sequence(list(range(60)), 59)
    scheduler.add(prompt)
    run_to_end(scheduler, pool, [prompt])
    prompt.active = False
    forks = [Sequence([*range(60), index], 60, source=prompt) for index in range(3)]
    for fork in forks:
        scheduler.add(fork)
    for fork in forks:
        run_to_end(scheduler, pool, [fork])
        assert pool.read(fork.engine_id) == fork.tokens
        scheduler.remove(fork)
    assert pool.kv_blocks_free == 4


def test_a_session_that_lost_its_blocks_while_paused_stands_in_the_queue_once():
    pool = BlockPool(4, 8)
    scheduler = Scheduler(pool, Limits(8, 64, 8))
    session, other = Sequence(list(range(30)), 29), Sequence(list(range(60)), 59)
    scheduler.add(session)
    run_to_end(scheduler, pool, [session])
    session.append(7)
    session.active = False
    scheduler.add(other)
    run_to_end(scheduler, pool, [other])
    assert scheduler.waiting == (session,)
    session.tokens, session.active = [], True  # the turn was ended here
    scheduler.rewind(session, list(range(20)), 0)
    assert scheduler.waiting == (session,)
    scheduler.remove(other)
    run_to_end(scheduler, pool, [session])
    assert (scheduler.running, scheduler.waiting) == ((session,), ())


def test_sessions_that_never_pause_starve_nobody():
    pool = BlockPool(10, 4)
    scheduler = Scheduler(pool, Limits(4, 64, 4))
    sessions = [Sequence([index] * 50, 49) for index in range(2)]
    for session in sessions:
        scheduler.add(session)
    run_to_end(scheduler, pool, sessions)
    large = Sequence([2] * 150, 149)
    scheduler.add(large)
    for session in sessions:
        session.append(7)
    steps = 0
    while large.pending:
        steps += 1
        assert steps < 200
        chunks = scheduler.schedule()
        pool.step([(part.engine_id, part.tokens[part.computed :][:count], part.computed) for part, count, _ in chunks])
        scheduler.commit(chunks)
        for session in sessions:
            if session.pending:
                continue
            if len(session.tokens) < 53 + sessions.index(session):  # so that the two never end at once
                session.append(7)
            else:
                session.wanted_from = 50
                scheduler.rewind(session, session.tokens[:50] + [8], 50)


def test_a_session_that_queues_keeps_its_blocks_from_those_who_came_later():
    pool = BlockPool(10, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    long, session, earlier, later = (Sequence([index] * length, length - 1) for index, length in enumerate((75, 50, 70, 10)))
    scheduler.add(long)
    scheduler.add(session)
    scheduler.add(earlier)
    run_to_end(scheduler, pool, [long, session])
    assert scheduler.waiting == (earlier,)
    session.wanted_from = 50
    scheduler.rewind(session, session.tokens + [7], 50)
    scheduler.add(later)
    scheduler.remove(long)
    assert [chunk.sequence for chunk in scheduler.schedule()] == [earlier]
    assert (session.computed, scheduler.waiting) == (50, (later,))


# What is computed once

def alike(count, same, own=5):
    """Prompts of which the first `same` tokens are the same."""
    return [Sequence([*range(same), *[1000 + index] * own], same + own - 1) for index in range(count)]


def step_once(scheduler, pool):
    """The sequences of a step that was run."""
    chunks = scheduler.schedule()
    pool.step([(part.engine_id, part.tokens[part.computed :][:count], part.computed) for part, count, _ in chunks])
    scheduler.commit(chunks)
    return [chunk.sequence for chunk in chunks], sum(chunk.tokens for chunk in chunks)


@pytest.mark.parametrize("prefill_chunk", [7, 32, 64, 500])
def test_prompts_that_begin_alike_compute_their_beginning_once(prefill_chunk):
    pool = BlockPool(40, 8)
    scheduler = Scheduler(pool, Limits(8, prefill_chunk, 8))
    prompts = alike(6, 100)
    for prompt in prompts:
        scheduler.add(prompt)
    computed = 0
    while any(prompt.pending for prompt in prompts):
        computed += step_once(scheduler, pool)[1]
    assert computed == 105 + 5 * (105 - 96)
    assert [prompt.cached for prompt in prompts] == [0] + [96] * 5
    assert all(pool.read(prompt.engine_id) == prompt.tokens for prompt in prompts)


def test_rows_that_are_wanted_are_computed():
    pool = BlockPool(40, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    first, all_rows, some_rows = (Sequence(list(range(100)), wanted_from) for wanted_from in (99, 0, 50))
    for sequence in (first, all_rows, some_rows):
        scheduler.add(sequence)
        run_to_end(scheduler, pool, [sequence])
    assert [sequence.cached for sequence in (first, all_rows, some_rows)] == [0, 0, 48]


def test_the_last_token_of_a_cached_prompt_is_computed():
    pool = BlockPool(40, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    for expected in (0, 48, 48):
        sequence = Sequence(list(range(64)), 63)
        scheduler.add(sequence)
        run_to_end(scheduler, pool, [sequence])
        assert sequence.cached == expected


@pytest.mark.parametrize("stop", ["pause", "remove", "put back"])
def test_nobody_waits_for_a_beginning_that_does_not_come(stop):
    pool = BlockPool(20, 8)
    scheduler = Scheduler(pool, Limits(8, 32, 8))
    first, second = alike(2, 100)
    for prompt in (first, second):
        scheduler.add(prompt)
    assert step_once(scheduler, pool) == ([first], 32)
    if stop == "pause":
        first.active = False
    elif stop == "remove":
        scheduler.remove(first)
    else:
        scheduler._put_back(first)
        first.active = False
    assert step_once(scheduler, pool) == ([second], 32)
    assert second.cached == 32
    run_to_end(scheduler, pool, [second])
    assert pool.read(second.engine_id) == second.tokens


def test_nobody_overtakes_one_that_waits_for_its_beginning():
    pool = BlockPool(40, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    first, second = alike(2, 100)
    other = Sequence([7] * 20, 19)
    for prompt in (first, second, other):
        scheduler.add(prompt)
    assert step_once(scheduler, pool)[0] == [first]
    assert step_once(scheduler, pool)[0] == [second, other]


def test_texts_that_share_a_beginning_fit_where_each_alone_nearly_fills_the_pool():
    pool = BlockPool(14, 8)
    scheduler = Scheduler(pool, Limits(8, 300, 8))
    prompts = alike(3, 160)
    for prompt in prompts:
        prompt.tokens.append(9)
        prompt.wanted_from = 165
        scheduler.add(prompt)
    for prompt in prompts:
        step_once(scheduler, pool)
        prompt.append(1)
    assert scheduler.running == (prompts[0], prompts[1], prompts[2]) and pool.kv_blocks_free == 1
    assert scheduler.preemptions == 0


def test_a_sequence_that_was_put_back_takes_up_what_is_still_there():
    pool = BlockPool(20, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    text = Sequence(list(range(100)), 99)
    scheduler.add(text)
    run_to_end(scheduler, pool, [text])
    text.append(7)
    scheduler._put_back(text)
    assert (text.computed, text.engine_id) == (0, None)
    assert step_once(scheduler, pool) == ([text], 101 - 96)
    assert text.cached == 0


def test_a_session_that_goes_back_into_a_block_that_others_adopted_has_it_copied():
    pool = BlockPool(8, 8)
    scheduler = Scheduler(pool, Limits(8, 200, 8))
    session, other = Sequence(list(range(64)), 63), Sequence([*range(64), 7], 64)
    for sequence in (session, other):
        scheduler.add(sequence)
        run_to_end(scheduler, pool, [sequence])
    session.wanted_from = 41
    scheduler.rewind(session, [*range(40), 5, 6], 40)
    assert session.shared_tail and session.cached == 40
    other.append(8)
    run_to_end(scheduler, pool, [session, other])
    assert pool.read(session.engine_id) == [*range(40), 5, 6] and pool.read(other.engine_id) == other.tokens
