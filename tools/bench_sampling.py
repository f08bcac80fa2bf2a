"""What sampling costs a step beside the engine's search for candidates: microseconds a step, and for each sequence in it.

    python tools/bench_sampling.py [--batch 16] [--vocab 151936] [--steps 2000]

`Sampler.sample` runs on candidates that are ready, of random logits that are peaked as those of a model are, so that candidates decide
nearly every draw. A step of one sequence and one of a batch give the share of the step and that of a sequence; bars: 100 us and 5 us.
"""

import argparse
import statistics
import time

import numpy as np

from ferrum.gguf_file import GGUFFile
from ferrum.options import DEFAULT_MODEL
from ferrum.request import Request
from ferrum.sampler import Sampler
from ferrum.sampling import SamplingParams
from ferrum.tokenizer import Tokenizer
from ferrum_native._native import Candidates

STEP_BAR, SEQUENCE_BAR = 100.0, 5.0  # microseconds

FILTERED = SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=1)
PLAIN = SamplingParams(temperature=0.8, seed=1)
GREEDY = SamplingParams(temperature=0)
CASES = {
    "greedy": [GREEDY],
    "temperature 0.8": [PLAIN],
    "temperature 0.8, top-k 50, top-p 0.95": [FILTERED],
    "the three mixed": [FILTERED, PLAIN, GREEDY],
}


class ReadyCandidates:
    """An engine whose candidates are known beforehand."""

    def __init__(self, logits):
        self._logits = logits
        self._order = [np.argsort(-row, kind="stable")[:256].astype(np.int32) for row in logits]
        self._ready = {}

    def candidates(self, n, edits=None, targets=None, temperatures=None):
        key = n, None if temperatures is None else temperatures.tobytes()
        if key not in self._ready:
            ids = np.array([order[:n] for order in self._order])
            at_temperature = self._logits.astype(np.float64) / (np.ones(len(ids)) if temperatures is None else temperatures)[:, None]
            self._ready[key] = Candidates(
                ids, np.take_along_axis(self._logits, ids.astype(np.int64), 1), log_sum_exp(self._logits.astype(np.float64)),
                log_sum_exp(at_temperature), np.zeros((len(ids), 0), np.float32))
        return self._ready[key]


def log_sum_exp(rows):
    largest = rows.max(axis=1)
    return largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))


def microseconds(tokenizer, params, batch, vocab, steps):
    """Of each step: `Sampler.sample` for `batch` texts."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((batch, vocab), dtype=np.float32)
    likely = rng.integers(0, vocab, (batch, 40))
    np.put_along_axis(logits, likely, 18 + 3 * rng.standard_normal((batch, 40), dtype=np.float32), 1)
    sampler = Sampler(ReadyCandidates(logits), tokenizer, (), vocab)
    draws = [(row, Request(None, [0], params[row % len(params)], tokenizer).texts[0]) for row in range(batch)]
    seconds = []
    for step in range(steps + 100):
        for _, text in draws:
            text.seed = step * batch + text.index  # another u for each step
        started = time.perf_counter()
        sampler.sample(logits, draws, [])
        seconds.append(time.perf_counter() - started)
    return [second * 1e6 for second in seconds[100:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_gguf(GGUFFile.open(DEFAULT_MODEL))
    bar = STEP_BAR + SEQUENCE_BAR * arguments.batch
    print(f"us, medians of {arguments.steps} steps; bar of a step of {arguments.batch}: {bar:.0f}")
    print(f"{'':<40}{'1 sequence':>12}{arguments.batch:>4} sequences{'a step':>10}{'+ a sequence':>14}")
    for name, params in CASES.items():
        one, many = (statistics.median(microseconds(tokenizer, params, batch, arguments.vocab, arguments.steps)) for batch in (1, arguments.batch))
        each = (many - one) / (arguments.batch - 1)
        print(f"{name:<40}{one:>12.1f}{many:>14.1f}{one - each:>10.1f}{each:>14.2f}{'' if many <= bar else '   above the bar'}")


if __name__ == "__main__":
    main()
