"""How close ferrum's logits come to the float64 reference on a model's own kind of text, and how close llama.cpp's come.

    python tools/accuracy.py MODEL.gguf [--tokens 4096] [--activations int8] [--kv-type f16] [--text FILE] [--llama]

Every engine reads the same sequences (teacher forced), each from position 0. Without --text they are sampled by ferrum at temperature 1 with a
fixed seed. The reference expands all weights to float64, 8 bytes each: it is for small models. --llama needs the extra `oracle`.

With int8 activations the mean KL is made by few positions, where rounding flips an expert between two near-equal ones: ten of 32,768 hold a third of it
(`top10_share`). Mean KLs of engines whose rounding differs anywhere scatter accordingly, and the interval, from resampled sequences, is a lower bound of
that scatter: for a ratio to rely on, ask for 32,768 tokens or more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "oracle")]

from reference import ReferenceModel, kl_divergence, relative_l2  # noqa: E402

UNUSED = 5  # gguf.TokenType.UNUSED
RESAMPLES = 10_000
BATCH = 16  # sequences sampled at once


class Ferrum:
    """ferrum's engine on the CPU."""

    def __init__(self, path, arguments):
        from ferrum.gguf_file import GGUFFile
        from ferrum_native._native import Engine

        self.file = GGUFFile.open(path)
        self._engine = Engine(
            self.file, device="cpu", kv_tokens=BATCH * (arguments.length + 16), kv_type=arguments.kv_type, activations=arguments.activations,
            max_sequences=BATCH, prefill_chunk=512, max_logit_rows=max(arguments.length, BATCH), threads=arguments.threads)

    def logits(self, token_ids):
        """Logits [T, V] of one sequence from position 0."""
        rows = self._engine.prefill(0, token_ids, logits="all").copy()
        self._engine.release(0)
        return rows

    def sample(self, sequences, length, seed):
        """Token ids [sequences, length]: the document separator, then draws at temperature 1, padding entries excluded."""
        rng, drawn = np.random.default_rng(seed), []
        while len(drawn) < sequences:
            drawn += self._sample_batch(min(BATCH, sequences - len(drawn)), length, rng)
        return drawn

    def _sample_batch(self, sequences, length, rng):
        metadata, keys = self.file.metadata, list(range(sequences))
        padding = np.asarray(metadata["tokenizer.ggml.token_type"]) == UNUSED
        start = metadata.get("tokenizer.ggml.bos_token_id", metadata["tokenizer.ggml.eos_token_id"])
        drawn = [[start] * sequences]
        logits = np.stack([self._engine.prefill(key, [start]).copy() for key in keys])
        while len(drawn) < length:
            drawn.append(np.argmax(np.where(padding, -np.inf, logits) + rng.gumbel(size=logits.shape), axis=-1).tolist())
            logits = np.asarray(self._engine.decode_batch(keys, drawn[-1]))
        for key in keys:
            self._engine.release(key)
        return np.array(drawn).T.tolist()


class Tally:
    """Divergences of one engine from the reference, by position, kept apart by sequence."""

    def __init__(self):
        self._kl, self._distances, self._equal = [], [], []

    def add(self, ref, got):
        """Count one sequence's logits, both [T, V]."""
        self._kl.append(kl_divergence(ref, got))
        self._distances.append(relative_l2(ref, got))
        self._equal.append(np.argmax(ref, axis=-1) == np.argmax(got, axis=-1))

    @property
    def mean_kl(self):
        """Nats, over all positions."""
        return float(np.concatenate(self._kl).mean())

    def resampled_mean_kl(self):
        """Mean KL of RESAMPLES draws of as many sequences with replacement: the same draws for every tally of the same sequences."""
        sums, counts = np.array([(kl.sum(), kl.size) for kl in self._kl]).T
        picks = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        return sums[picks].sum(axis=1) / counts[picks].sum(axis=1)

    def statistics(self):
        """KL in nats; mean_kl_error is the standard error of mean_kl over sequences, top10_share the ten largest positions' part of it."""
        kl = np.concatenate(self._kl)
        return {"mean_kl": self.mean_kl, "mean_kl_error": float(self.resampled_mean_kl().std()), "top10_share": float(np.sort(kl)[-10:].sum() / max(kl.sum(), 1e-300)),
                "median_kl": float(np.median(kl)), "max_kl": float(kl.max()), "median_relative_l2": float(np.median(np.concatenate(self._distances))),
                "argmax_equal": float(np.concatenate(self._equal).mean())}


def kl_ratio(tally, other):
    """Ratio of the mean KLs and its 95% interval over resampled sequences."""
    low, high = np.quantile(tally.resampled_mean_kl() / other.resampled_mean_kl(), (0.025, 0.975))
    return {"ratio": tally.mean_kl / other.mean_kl, "low": float(low), "high": float(high)}


def sequences_of(text, file, arguments):
    """The first sequences * length tokens of a text, cut into sequences."""
    from ferrum.tokenizer import Tokenizer

    ids = Tokenizer.from_gguf(file).encode(text)[:arguments.tokens]
    if len(ids) < arguments.tokens:
        raise SystemExit(f"accuracy: the text has {len(ids)} tokens, --tokens asks for {arguments.tokens}")
    return [ids[start:start + arguments.length] for start in range(0, len(ids), arguments.length)]


def engines_of(ferrum, arguments):
    """Name -> function from token ids to logits [T, V]."""
    engines = {"ferrum": ferrum.logits}
    if arguments.activations == "int8":
        engines["rounding alone"] = ReferenceModel(arguments.model, activations="int8", kv_type=arguments.kv_type).logits
    if arguments.llama:
        from oracle import LlamaCpp

        # llama.cpp's own default for an F16 cache, where it else also rounds queries and probabilities to F16; of Q8_0 values it wants it.
        engines["llama.cpp"] = LlamaCpp(arguments.model, context=arguments.length, kv_type=arguments.kv_type, threads=arguments.threads,
                                        flash_attention=arguments.kv_type != "f32").logits
    return engines


def compare(sequences, engines, reference):
    """A Tally for every engine."""
    tallies = {name: Tally() for name in engines}
    for ids in sequences:
        expected = reference.logits(ids)
        for name, logits in engines.items():
            tallies[name].add(expected, logits(ids))
    return tallies


def print_report(report):
    print(f"{report['model']}: {report['tokens']} tokens in {report['sequences']} sequences, activations {report['activations']}, KV {report['kv_type']}")
    for name, statistics in report["engines"].items():
        figures = (f"{key} {value:.4f}" if key in ("argmax_equal", "top10_share") else f"{key} {value:.3e}" for key, value in statistics.items())
        print(f"  {name:15}", "  ".join(figures))
    if "mean_kl_ratio" in report:
        print("  mean KL of ferrum / llama.cpp: {ratio:.3f} (95% interval {low:.3f} to {high:.3f})".format(**report["mean_kl_ratio"]))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path of a GGUF file of arch qwen3moe")
    parser.add_argument("--tokens", type=int, default=4096, help="positions compared, a multiple of --length (default 4096)")
    parser.add_argument("--length", type=int, default=256, help="tokens of one sequence (default 256)")
    parser.add_argument("--activations", choices=("int8", "float32"), default="int8", help="ferrum's activations (default int8)")
    parser.add_argument("--kv-type", choices=("f16", "f32", "q8_0"), default="f16", help="KV type of ferrum and of llama.cpp (default f16)")
    parser.add_argument("--text", metavar="FILE", help="text to read instead of sampling one")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled text (default 0)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine (default: the CPUs this process may use)")
    parser.add_argument("--llama", action="store_true", help="measure llama.cpp too")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = parser.parse_args()
    if arguments.tokens < arguments.length or arguments.tokens % arguments.length:
        parser.error(f"--tokens {arguments.tokens} is not a multiple of --length {arguments.length}")
    arguments.sequences = arguments.tokens // arguments.length
    return arguments


def main():
    arguments = parse_arguments()
    ferrum = Ferrum(arguments.model, arguments)
    if arguments.text:
        sequences = sequences_of(Path(arguments.text).read_text(encoding="utf-8"), ferrum.file, arguments)
    else:
        sequences = ferrum.sample(arguments.sequences, arguments.length, arguments.seed)
    tallies = compare(sequences, engines_of(ferrum, arguments), ReferenceModel(arguments.model))
    report = {"model": Path(arguments.model).name, "tokens": arguments.tokens, "sequences": arguments.sequences, "activations": arguments.activations,
              "kv_type": arguments.kv_type, "engines": {name: tally.statistics() for name, tally in tallies.items()}}
    if arguments.llama:
        report["mean_kl_ratio"] = kl_ratio(tallies["ferrum"], tallies["llama.cpp"])
    print_report(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
