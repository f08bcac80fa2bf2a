"""The KV pool against a model that keeps every block's contents: no leak, no crosstalk, all or none."""
import random
import zlib
from collections import Counter, deque
from itertools import accumulate

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ferrum.errors import ContextFull, KVPoolExhausted, UnknownSequence
from ferrum_native._native import KvPool

BLOCK = 16
SEQUENCES = st.integers(0, 5)
STREAMS = st.sampled_from((0, 0, 0, 1, None))  # the token that a step appends again and again; None: others that the pool is not told


def blocks_for(tokens):
    return -(-tokens // BLOCK)


def contents_of(tokens):
    """What is written for each token of a text."""
    return list(accumulate(tokens, lambda before, token: zlib.crc32(b"%d,%d" % (before, token)), initial=0))[1:]


class Memory:
    """A pool, what a device would have written into its blocks, and the tokens that each sequence must find there.

    As keys and values do, what is written for a token depends on all tokens before it. Content that the pool says was dropped is overwritten.
    """

    def __init__(self, blocks, max_sequences, context):
        self.pool = KvPool(blocks, max_sequences, context)
        self.max_sequences, self.context = max_sequences, context
        self.contents = [[None] * BLOCK for _ in range(blocks)]
        self.tokens = {}
        self.probes = deque(maxlen=12)  # texts that were there, or seem to be where a block is half overwritten
        self.unknown = 100

    def tables(self):
        return {sequence: self.pool.sequence(sequence) for sequence in self.tokens}

    def state(self):
        return self.tables(), self.pool.references(), self.pool.free_blocks, self.pool.live_sequences

    def poison(self):
        freed = self.pool.take_freed()
        for block in freed:
            self.contents[block] = [None] * BLOCK
        return freed

    def apply(self, copies):
        self.poison()
        for source, target in copies:
            self.contents[target] = list(self.contents[source])

    def write(self, sequence, new):
        """What a step writes: for new tokens behind the committed ones, each into a block that only this sequence holds."""
        length, table = self.pool.sequence(sequence)
        references, text = self.pool.references(), [*self.tokens.get(sequence, ()), *new]
        self.probes.extend((text, *(text + old[len(text):] for old in tuple(self.probes)[-2:])))
        for position, content in list(enumerate(contents_of(text)))[length:]:
            block = table[position // BLOCK]
            assert references[block] == 1, f"block {block} is written by sequence {sequence} and shared"
            self.contents[block][position % BLOCK] = content

    def new_tokens(self, count, stream):
        """`count` tokens of a stream, and how the pool is told of them."""
        if stream is not None:
            return [stream] * count, [stream] * count
        self.unknown += count
        return list(range(self.unknown, self.unknown + count)), count

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

    def step(self, step, fail=False, stream=0):
        """True if the step was committed; a refused or failed one leaves the state as it was."""
        before = self.state()
        new = {sequence: self.new_tokens(count, stream) for sequence, count in step}
        try:
            self.apply(self.pool.grow([(sequence, told) for sequence, (_, told) in new.items()]))
        except (KVPoolExhausted, ContextFull) as error:
            assert self.state() == before
            self.check_refusal(error, step)
            return False
        for sequence, (tokens, _) in new.items():
            self.write(sequence, tokens)
        if fail:
            self.pool.rollback()
            assert self.state() == before
            return False
        self.pool.commit()
        for sequence, (tokens, _) in new.items():
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

    def adopt(self, sequence, tokens):
        before, found = self.state(), self.pool.cached_prefix(tokens)
        assert self.state() == before and self.pool.cached_prefix(tokens) == found
        try:
            length = self.pool.adopt(sequence, tokens)
        except (KVPoolExhausted, ValueError) as error:
            assert self.state() == before
            assert len(self.tokens) >= self.max_sequences if isinstance(error, KVPoolExhausted) else sequence in self.tokens
            return None
        assert length % BLOCK == 0 and length <= len(tokens)
        if length:
            table = self.pool.sequence(sequence)[1]
            assert found == (length, sum(before[1][block] > 0 for block in table))
            self.tokens[sequence] = tokens[:length]
        else:
            assert found == (0, 0) and self.state() == before
        return length

    def release(self, sequence, discard=False):
        before = self.state()
        try:
            (self.pool.discard if discard else self.pool.release)(sequence)
        except UnknownSequence:
            assert sequence not in self.tokens and self.state() == before
            return
        del self.tokens[sequence]

    def truncate(self, sequence, length):
        before = self.state()
        try:
            shared = self.pool.truncate(sequence, length)
        except (UnknownSequence, ValueError) as error:
            assert self.state() == before
            assert isinstance(error, UnknownSequence) if sequence not in self.tokens else not 0 < length <= len(self.tokens[sequence])
            return
        del self.tokens[sequence][length:]
        table = self.pool.sequence(sequence)[1]
        assert len(table) == blocks_for(length)
        assert shared == (length % BLOCK != 0 and self.pool.references()[table[-1]] > 1)

    def prefill(self, sequence, chunks, fail_at, stream=0):
        """As the engine does it: room for the whole prompt, then steps; one that fails takes the sequence back to where it was."""
        before, tokens = self.state(), None if sequence not in self.tokens else list(self.tokens[sequence])
        savepoint = self.pool.save(sequence)
        if not self.hold(sequence, sum(chunks)):
            self.pool.restore(savepoint)
            assert self.state() == before
            return
        for i, count in enumerate(chunks):
            if self.step([(sequence, count)], fail=i == fail_at, stream=stream):
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
        self.poison()
        tables = self.tables()
        assert 0 <= self.pool.cached_blocks <= self.pool.free_blocks
        for text in self.probes:
            found, there = self.pool.cached_prefix(text)[0], contents_of(text)
            assert all(there[start : start + BLOCK] in self.contents for start in range(0, found, BLOCK)), "what is found is nowhere"
        holders = Counter(block for _, table in tables.values() for block in table)
        assert self.pool.references() == [holders[block] for block in range(len(self.contents))]
        assert self.pool.free_blocks + len(holders) == self.pool.total_blocks == len(self.contents)
        assert self.pool.live_sequences == len(self.tokens) <= self.max_sequences
        for sequence, (length, table) in tables.items():
            assert length == len(self.tokens[sequence]) <= self.context
            assert len(table) >= blocks_for(length) and len(set(table)) == len(table)
            assert [self.contents[table[p // BLOCK]][p % BLOCK] for p in range(length)] == contents_of(self.tokens[sequence])


class PoolMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(1, 14), max_sequences=st.integers(1, 5), context=st.integers(1, 100))
    def start(self, blocks, max_sequences, context):
        self.memory = Memory(blocks, max_sequences, context)

    @rule(step=st.lists(st.tuples(SEQUENCES, st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=4, unique_by=lambda part: part[0]), fail=st.booleans(), stream=STREAMS)
    def step(self, step, fail, stream):
        self.memory.step(step, fail, stream)

    @rule(sequence=SEQUENCES, chunks=st.lists(st.integers(1, 20), min_size=1, max_size=3), fail_at=st.integers(0, 4), stream=STREAMS)
    def prefill(self, sequence, chunks, fail_at, stream):
        self.memory.prefill(sequence, chunks, fail_at, stream)

    @rule(sequence=SEQUENCES, parts=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 60)), max_size=3))
    def adopt(self, sequence, parts):
        self.memory.adopt(sequence, [token for token, count in parts for _ in range(count)])

    @rule(sequence=SEQUENCES, like=SEQUENCES, more=st.integers(0, 20))
    def adopt_what_another_has(self, sequence, like, more):
        self.memory.adopt(sequence, self.memory.tokens.get(like, [0] * 40) + [0] * more)

    @rule(sequence=SEQUENCES, count=st.integers(0, 40))
    def hold(self, sequence, count):
        self.memory.hold(sequence, count)

    @rule(source=SEQUENCES, fork=SEQUENCES)  # `target` is hypothesis' own word
    def fork(self, source, fork):
        self.memory.fork(source, fork)

    @rule(sequence=SEQUENCES, discard=st.sampled_from((False, False, True)))
    def release(self, sequence, discard):
        self.memory.release(sequence, discard)

    @rule(sequence=SEQUENCES, length=st.integers(-1, 100))
    def truncate(self, sequence, length):
        self.memory.truncate(sequence, length)

    @rule(sequence=SEQUENCES, part=st.floats(0, 1))
    def truncate_to_a_part(self, sequence, part):
        self.memory.truncate(sequence, max(1, int(part * len(self.memory.tokens.get(sequence, ())))))

    @rule()
    def freed_blocks_are_reported_once(self):
        self.memory.poison()
        cached = self.memory.pool.cached_blocks
        free = [block for block, count in enumerate(self.memory.pool.references()) if count == 0]
        if self.memory.tokens:
            sequence = min(self.memory.tokens)
            self.memory.release(sequence)
        now_free = [block for block, count in enumerate(self.memory.pool.references()) if count == 0]
        freed = self.memory.poison()
        assert len(set(freed)) == len(freed) and set(freed) <= set(now_free) - set(free)
        assert len(freed) + self.memory.pool.cached_blocks - cached == len(set(now_free) - set(free))
        assert self.memory.pool.take_freed() == []

    @rule()
    def reset(self):
        self.memory.pool.reset()
        self.memory.tokens.clear()
        assert self.memory.pool.free_blocks == self.memory.pool.total_blocks and self.memory.pool.cached_blocks == 0
        assert self.memory.pool.cached_prefix([0] * 16) == (0, 0)

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
    requests, refused, hits = 0, 0, 0
    while requests < 10_000:
        action = rng.random()
        if action < 0.45 or not memory.tokens:
            requests += 1
            chunks = [rng.randint(1, 32) for _ in range(rng.randint(1, 4))]
            free = [sequence for sequence in range(14) if sequence not in memory.tokens]
            sequence, fail_at = rng.choice(free), rng.choice([0, 1, 9, 9, 9, 9])
            hits += bool(memory.adopt(sequence, [0] * rng.randint(0, 64)) if rng.random() < 0.5 else 0)
            memory.prefill(sequence, chunks, fail_at, rng.choice((0, 0, 1)))
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
    assert refused > 100 and hits > 100  # the pool was tight, and gave what it kept
    assert memory.pool.prefix_stats[3] > 100
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


# What is found again

TEXT = [token % 7 for token in range(100)]


def hold_text(memory, sequence, tokens):
    """A sequence that adopts what it can and computes the rest."""
    found = memory.adopt(sequence, tokens)
    assert memory.pool.grow([(sequence, tokens[found:])]) == []
    memory.poison()
    memory.write(sequence, tokens[found:])
    memory.pool.commit()
    memory.tokens[sequence] = list(tokens)
    memory.check()
    return found


def test_whole_blocks_are_found_while_held_and_after():
    memory = Memory(16, 8, 200)
    assert hold_text(memory, 0, TEXT[:40]) == 0
    assert memory.pool.cached_prefix(TEXT) == (32, 2)
    memory.release(0)
    assert memory.pool.cached_prefix(TEXT) == (32, 0)
    assert memory.pool.free_blocks == 16 and memory.pool.cached_blocks == 2
    assert hold_text(memory, 1, TEXT[:50]) == 32
    assert hold_text(memory, 2, TEXT[:20]) == 16
    assert memory.pool.cached_prefix(TEXT[:47]) == (32, 2) and memory.pool.cached_prefix(TEXT[:48]) == (48, 3)
    assert memory.pool.cached_prefix(TEXT[:15]) == memory.pool.cached_prefix([]) == (0, 0)
    assert memory.pool.prefix_stats == (2, 48, 110, 0)


def test_the_same_tokens_behind_another_beginning_are_another_text():
    memory = Memory(16, 8, 200)
    hold_text(memory, 0, [1] * 16 + [2] * 16)
    assert memory.pool.cached_prefix([2] * 16) == (0, 0)
    assert memory.pool.cached_prefix([1] * 32) == (16, 1)


def test_a_step_that_failed_registers_nothing():
    memory = Memory(16, 8, 200)
    memory.step([(0, 40)], fail=True)
    memory.prefill(0, [16, 16, 16], fail_at=2)
    assert memory.pool.cached_prefix([0] * 40) == (0, 0) and memory.pool.cached_blocks == 0


def test_unknown_tokens_are_never_found():
    memory = Memory(16, 8, 200)
    memory.step([(0, 24)])
    memory.step([(0, 4)], stream=None)
    memory.step([(0, 24)])
    memory.release(0)
    assert memory.pool.cached_blocks == 1


def test_a_sequence_goes_on_from_what_another_computed_at_the_same_time():
    memory = Memory(16, 8, 200)
    memory.pool.grow([(0, TEXT[:20]), (1, TEXT[:20])])
    for sequence in (0, 1):
        memory.write(sequence, TEXT[:20])
        memory.tokens[sequence] = TEXT[:20]
    memory.pool.commit()
    memory.pool.grow([(1, TEXT[20:40])])
    memory.write(1, TEXT[20:40])
    memory.pool.commit()
    memory.tokens[1] = TEXT[:40]
    memory.check()
    assert memory.pool.cached_prefix(TEXT) == (32, 2)
    memory.release(1)
    assert memory.pool.cached_prefix(TEXT) == (32, 1) and memory.pool.cached_blocks == 1
    assert memory.pool.adopt(2, TEXT) == 32
    assert memory.pool.sequence(2)[1][0] == memory.pool.sequence(0)[1][0]


def test_a_block_written_again_is_not_found_as_it_was():
    memory = Memory(16, 8, 200)
    hold_text(memory, 0, TEXT[:32])
    memory.truncate(0, 20)
    assert memory.pool.cached_prefix(TEXT) == (16, 1)
    memory.step([(0, 1)])
    assert memory.pool.cached_prefix(TEXT) == (16, 1)
    memory.check()


@pytest.mark.parametrize("adopter_ends", [False, True])
def test_a_block_adopted_before_it_is_cut_is_kept_for_others(adopter_ends):
    memory = Memory(16, 8, 200)
    hold_text(memory, 0, TEXT[:32])
    assert memory.adopt(1, TEXT) == 32
    memory.truncate(0, 20)
    if adopter_ends:
        memory.release(1)
        memory.step([(0, 20)])
        assert memory.pool.cached_prefix(TEXT) == (16, 1)
        return
    memory.step([(0, 20)])
    memory.check()
    assert memory.pool.cached_prefix(TEXT) == (32, 2)


def test_a_block_half_overwritten_is_not_found_as_if_it_were_whole():
    memory = Memory(1, 8, 200)
    memory.step([(0, 16)])
    memory.truncate(0, 4)
    memory.step([(0, 1)], stream=1)
    for text in ([0] * 16, [0] * 4 + [1] + [0] * 11):
        assert memory.pool.cached_prefix(text) == (0, 0)


def test_room_held_before_a_prefill_failed_is_not_adopted():
    memory = Memory(8, 8, 200)
    memory.hold(0, 64)
    memory.prefill(0, [16, 16, 16, 16], fail_at=3)
    assert not memory.adopt(1, [0] * 64)
    memory.step([(0, 64)], stream=1)
    memory.check()


def test_both_sides_of_a_fork_are_found():
    memory = Memory(8, 8, 200)
    memory.step([(0, 20)], stream=3)
    memory.fork(0, 1)
    memory.step([(0, 12)], stream=1)
    memory.step([(1, 12)], stream=2)
    for other in (1, 2):
        assert memory.pool.cached_prefix([3] * 20 + [other] * 12) == (32, 2)
        assert memory.adopt(5 + other, [3] * 20 + [other] * 12) == 32
    memory.check()


def test_a_twin_that_ended_does_not_name_what_its_block_holds_next():
    memory = Memory(2, 8, 200)
    memory.pool.grow([(0, [7] * 16), (1, [7] * 16)])
    memory.pool.commit()
    for sequence in (0, 1):
        memory.pool.release(sequence)
    assert memory.pool.cached_prefix([7] * 16) == (16, 0)
    memory.step([(2, 16)], stream=None)
    memory.step([(2, 16)])
    assert memory.pool.cached_prefix([7] * 16 + [0] * 16) == (0, 0)
    memory.release(2)
    assert memory.pool.cached_blocks == 0


def test_empty_blocks_are_taken_before_cached_ones_and_those_from_the_oldest_tail():
    memory = Memory(8, 8, 200)
    old, new = TEXT[:48], [9] * 32
    hold_text(memory, 0, old)
    memory.release(0)
    hold_text(memory, 0, new)
    memory.release(0)
    assert memory.pool.cached_blocks == 5
    memory.step([(1, 40)], stream=None)
    assert memory.pool.cached_prefix(old) == (48, 0)
    found = []
    for count in (16, 16, 16, 16, 16):
        memory.step([(1, count)], stream=None)
        found.append((memory.pool.cached_prefix(old)[0], memory.pool.cached_prefix(new)[0]))
    assert found == [(32, 32), (16, 32), (0, 32), (0, 16), (0, 0)]
    assert memory.pool.prefix_stats[3] == 5
    memory.check()


def test_what_is_used_again_is_given_up_last():
    memory = Memory(4, 8, 200)
    for text in ([1] * 32, [2] * 32):
        hold_text(memory, 0, text)
        memory.release(0)
    memory.pool.cached_prefix([2] * 32)
    assert memory.adopt(0, [1] * 32) == 32
    memory.release(0)
    memory.step([(1, 32)], stream=None)
    assert memory.pool.cached_prefix([1] * 32) == (32, 0) and memory.pool.cached_prefix([2] * 32) == (0, 0)


def test_a_beginning_that_is_held_is_not_given_up():
    memory = Memory(4, 8, 200)
    hold_text(memory, 0, TEXT[:32])
    memory.step([(1, 32)], stream=None)
    assert not memory.step([(2, 1)])
    assert memory.pool.cached_prefix(TEXT) == (32, 2)


def test_a_pool_without_the_cache_finds_nothing():
    pool = KvPool(8, 4, 100, False)
    pool.grow([(0, TEXT[:40])])
    pool.commit()
    assert pool.cached_prefix(TEXT) == (0, 0) and pool.adopt(1, TEXT) == 0 and not pool.live(1)
    pool.release(0)
    assert pool.cached_blocks == 0 and pool.free_blocks == 8
