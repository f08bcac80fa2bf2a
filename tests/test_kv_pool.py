"""The KV pool against a model that keeps every block's contents: no leak, no crosstalk, all or none."""
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ferrum.errors import ContextFull, KVPoolExhausted, UnknownSequence
from ferrum_native._native import KvPool

BLOCK = 16
SEQUENCES = st.integers(0, 5)


def blocks_for(tokens):
    return -(-tokens // BLOCK)


class Memory:
    """A pool, what a device would have written into its blocks, and the tokens that each sequence must find there."""

    def __init__(self, blocks, max_sequences, context):
        self.pool = KvPool(blocks, max_sequences, context)
        self.max_sequences, self.context = max_sequences, context
        self.contents = [[None] * BLOCK for _ in range(blocks)]
        self.tokens = {}
        self.written = 0

    def tables(self):
        return {sequence: self.pool.sequence(sequence) for sequence in self.tokens}

    def state(self):
        return self.tables(), self.pool.references(), self.pool.free_blocks, self.pool.live_sequences

    def apply(self, copies):
        for source, target in copies:
            self.contents[target] = list(self.contents[source])

    def write(self, sequence, count):
        """What a step writes: `count` new tokens behind the committed ones, each into a block that only this sequence holds."""
        length, table = self.pool.sequence(sequence)
        references, new = self.pool.references(), []
        for position in range(length, length + count):
            block = table[position // BLOCK]
            assert references[block] == 1, f"block {block} is written by sequence {sequence} and shared"
            self.written += 1
            new.append(self.written)
            self.contents[block][position % BLOCK] = self.written
        return new

    def check_refusal(self, error, step):
        """An error names a real reason."""
        starting = sum(sequence not in self.tokens for sequence, _ in step)
        references, need = self.pool.references(), 0
        for sequence, count in step:
            length, table = self.pool.sequence(sequence) if sequence in self.tokens else (0, [])
            shared = length // BLOCK < len(table) and references[table[length // BLOCK]] > 1
            need += max(0, blocks_for(length + count) - len(table)) + shared
        if isinstance(error, ContextFull):
            assert any(len(self.tokens.get(sequence, ())) + count > self.context for sequence, count in step)
        else:
            assert need > self.pool.free_blocks or len(self.tokens) + starting > self.max_sequences

    def step(self, step, fail=False):
        """True if the step was committed; a refused or failed one leaves the state as it was."""
        before = self.state()
        try:
            self.apply(self.pool.grow(step))
        except (KVPoolExhausted, ContextFull) as error:
            assert self.state() == before
            self.check_refusal(error, step)
            return False
        new = {sequence: self.write(sequence, count) for sequence, count in step}
        if fail:
            self.pool.rollback()
            assert self.state() == before
            return False
        self.pool.commit()
        for sequence, tokens in new.items():
            self.tokens.setdefault(sequence, []).extend(tokens)
        return True

    def hold(self, sequence, count):
        before = self.state()
        try:
            self.apply(self.pool.hold(sequence, count))
        except (KVPoolExhausted, ContextFull) as error:
            assert self.state() == before
            self.check_refusal(error, [(sequence, count)])
            return False
        self.tokens.setdefault(sequence, [])
        return True

    def fork(self, source, target):
        before = self.state()
        try:
            self.pool.fork(source, target)
        except (KVPoolExhausted, UnknownSequence, ValueError) as error:
            assert self.state() == before
            expected = UnknownSequence if source not in self.tokens else ValueError if target in self.tokens else KVPoolExhausted
            assert isinstance(error, expected)
            return
        self.tokens[target] = list(self.tokens[source])

    def release(self, sequence):
        before = self.state()
        try:
            self.pool.release(sequence)
        except UnknownSequence:
            assert sequence not in self.tokens and self.state() == before
            return
        del self.tokens[sequence]

    def truncate(self, sequence, length):
        before = self.state()
        try:
            self.pool.truncate(sequence, length)
        except (UnknownSequence, ValueError) as error:
            assert self.state() == before
            assert isinstance(error, UnknownSequence) if sequence not in self.tokens else not 0 < length <= len(self.tokens[sequence])
            return
        del self.tokens[sequence][length:]
        assert len(self.pool.sequence(sequence)[1]) == blocks_for(length)

    def prefill(self, sequence, chunks, fail_at):
        """As the engine does it: room for the whole prompt, then steps; one that fails takes the sequence back to where it was."""
        before, tokens = self.state(), None if sequence not in self.tokens else list(self.tokens[sequence])
        savepoint = self.pool.save(sequence)
        if not self.hold(sequence, sum(chunks)):
            self.pool.restore(savepoint)
            assert self.state() == before
            return
        for i, count in enumerate(chunks):
            if self.step([(sequence, count)], fail=i == fail_at):
                continue
            assert i == fail_at, "a prompt that was given room found none"
            self.pool.restore(savepoint)
            del self.tokens[sequence]
            if tokens is not None:
                self.tokens[sequence] = tokens
            assert self.state() == before
            return
        self.pool.forget(savepoint)

    def check(self):
        tables = self.tables()
        holders = Counter(block for _, table in tables.values() for block in table)
        assert self.pool.references() == [holders[block] for block in range(len(self.contents))]
        assert self.pool.free_blocks + len(holders) == self.pool.total_blocks == len(self.contents)
        assert self.pool.live_sequences == len(self.tokens) <= self.max_sequences
        for sequence, (length, table) in tables.items():
            assert length == len(self.tokens[sequence]) <= self.context
            assert len(table) >= blocks_for(length) and len(set(table)) == len(table)
            assert [self.contents[table[p // BLOCK]][p % BLOCK] for p in range(length)] == self.tokens[sequence]


class PoolMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(1, 14), max_sequences=st.integers(1, 5), context=st.integers(1, 100))
    def start(self, blocks, max_sequences, context):
        self.memory = Memory(blocks, max_sequences, context)

    @rule(step=st.lists(st.tuples(SEQUENCES, st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=4, unique_by=lambda part: part[0]), fail=st.booleans())
    def step(self, step, fail):
        self.memory.step(step, fail)

    @rule(sequence=SEQUENCES, chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3), fail_at=st.integers(0, 4))
    def prefill(self, sequence, chunks, fail_at):
        self.memory.prefill(sequence, chunks, fail_at)

    @rule(sequence=SEQUENCES, count=st.integers(0, 40))
    def hold(self, sequence, count):
        self.memory.hold(sequence, count)

    @rule(source=SEQUENCES, fork=SEQUENCES)  # `target` is hypothesis' own word
    def fork(self, source, fork):
        self.memory.fork(source, fork)

    @rule(sequence=SEQUENCES)
    def release(self, sequence):
        self.memory.release(sequence)

    @rule(sequence=SEQUENCES, length=st.integers(-1, 100))
    def truncate(self, sequence, length):
        self.memory.truncate(sequence, length)

    @rule(sequence=SEQUENCES, part=st.floats(0, 1))
    def truncate_to_a_part(self, sequence, part):
        self.memory.truncate(sequence, max(1, int(part * len(self.memory.tokens.get(sequence, ())))))

    @rule()
    def freed_blocks_are_reported_once(self):
        self.memory.pool.take_freed()
        free = [block for block, count in enumerate(self.memory.pool.references()) if count == 0]
        if self.memory.tokens:
            sequence = min(self.memory.tokens)
            self.memory.release(sequence)
        now_free = [block for block, count in enumerate(self.memory.pool.references()) if count == 0]
        assert sorted(self.memory.pool.take_freed()) == sorted(set(now_free) - set(free))
        assert self.memory.pool.take_freed() == []

    @rule()
    def reset(self):
        self.memory.pool.reset()
        self.memory.tokens.clear()
        assert self.memory.pool.free_blocks == self.memory.pool.total_blocks

    @invariant()
    def holds(self):
        if hasattr(self, "memory"):
            self.memory.check()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_ten_thousand_requests_give_every_block_back():
    """Requests of random length, with forks, failures and cancelled prompts, in a pool that is often too small."""
    rng = random.Random(1)
    memory = Memory(blocks=64, max_sequences=12, context=400)
    requests, refused = 0, 0
    while requests < 10_000:
        action = rng.random()
        if action < 0.45 or not memory.tokens:
            requests += 1
            chunks = [rng.randint(1, 32) for _ in range(rng.randint(1, 4))]
            free = [sequence for sequence in range(14) if sequence not in memory.tokens]
            memory.prefill(rng.choice(free), chunks, rng.choice([0, 1, 9, 9, 9, 9]))
        elif action < 0.8:
            batch = rng.sample(sorted(memory.tokens), rng.randint(1, len(memory.tokens)))
            if not memory.step([(sequence, 1) for sequence in batch], fail=rng.random() < 0.1):
                refused += 1
                memory.release(rng.choice(sorted(memory.tokens)))
        elif action < 0.85:
            memory.fork(rng.choice(sorted(memory.tokens)), rng.randrange(14))
        else:
            memory.release(rng.choice(sorted(memory.tokens)))
        if requests % 500 == 0:
            memory.check()
    assert refused > 100  # the pool was tight
    for sequence in list(memory.tokens):
        memory.release(sequence)
    memory.check()
    assert memory.pool.free_blocks == 64


def test_a_fork_is_copied_by_whoever_writes_first():
    memory = Memory(8, 4, 100)
    memory.step([(0, 20)])
    memory.fork(0, 1)
    assert memory.pool.references().count(2) == 2
    assert memory.pool.grow([(1, 1)]) == [(memory.pool.sequence(0)[1][1], memory.pool.sequence(1)[1][1])]
    memory.pool.rollback()
    memory.step([(1, 1)])
    memory.step([(0, 1)])
    memory.check()
    assert memory.pool.references().count(2) == 1  # the full first block stays shared


def test_both_sides_of_a_fork_write_in_one_step():
    memory = Memory(8, 4, 100)
    memory.step([(0, 5)])
    memory.fork(0, 1)
    memory.fork(0, 2)
    assert memory.step([(0, 1), (1, 1), (2, 1)])
    memory.check()
    assert memory.pool.free_blocks == 5


def test_a_full_block_is_not_copied():
    memory = Memory(4, 4, 100)
    memory.step([(0, 16)])
    memory.fork(0, 1)
    assert memory.pool.grow([(0, 1), (1, 1)]) == []
    memory.pool.commit()
    assert memory.pool.free_blocks == 1


def test_a_truncated_fork_is_copied_before_it_is_written():
    memory = Memory(8, 4, 100)
    memory.step([(0, 40)])
    memory.hold(0, 24)
    memory.fork(0, 1)
    memory.truncate(0, 10)
    assert memory.pool.free_blocks == 5  # the held block; the other three are the fork's as well
    assert memory.pool.grow([(0, 30)]) == [(memory.pool.sequence(1)[1][0], memory.pool.sequence(0)[1][0])]
    memory.pool.rollback()
    assert memory.step([(0, 30), (1, 8)])
    memory.check()


def test_held_room_needs_no_free_blocks_later():
    memory = Memory(4, 4, 100)
    memory.hold(0, 60)
    assert memory.pool.free_blocks == 0
    assert not memory.step([(1, 1)])
    assert memory.step([(0, 60)])
    memory.check()


def test_a_fork_does_not_share_held_room():
    memory = Memory(8, 4, 100)
    memory.step([(0, 16)])
    memory.hold(0, 32)
    memory.fork(0, 1)
    assert [len(memory.pool.sequence(sequence)[1]) for sequence in (0, 1)] == [3, 1]
    assert memory.step([(0, 8), (1, 8)])
    memory.check()


def test_errors_carry_the_figures():
    pool = KvPool(4, 2, 50)
    pool.grow([(7, 40)])
    pool.commit()
    with pytest.raises(KVPoolExhausted, match=r"need 2 blocks for sequence 8, 1 are free \(4 blocks of 16 tokens\)"):
        pool.grow([(8, 17)])
    with pytest.raises(ContextFull, match="sequence 7 has 40 tokens and would grow by 11.* 50"):
        pool.grow([(7, 11)])
    pool.grow([(8, 1)])
    pool.commit()
    with pytest.raises(KVPoolExhausted, match="sequence 9 .*max_sequences=2"):
        pool.grow([(9, 1)])
    with pytest.raises(UnknownSequence, match="sequence 9"):
        pool.release(9)
    with pytest.raises(ValueError, match="sequence 7 has 40 tokens and cannot be cut to 41"):
        pool.truncate(7, 41)
    with pytest.raises(ValueError, match="sequence 8 is live already"):
        pool.fork(7, 8)


def test_large_counts_do_not_overflow():
    pool = KvPool(4, 2, (1 << 31) - 1)
    for count in ((1 << 31) - 1, (1 << 31) - 16, 1 << 30):
        with pytest.raises((KVPoolExhausted, ContextFull)):
            pool.grow([(0, count)])
    assert pool.free_blocks == 4 and pool.live_sequences == 0
