"""ferrum beside llama.cpp (the PyPI package llama-cpp-python) on one model, in interleaved rounds.

    python tools/compare_peers.py MODEL.gguf [--prompt-tokens 512] [--gen-tokens 64] [--rounds 5] [--threads 2]

Each engine lives in a process of its own and works while the other waits. Both get the same random token ids. Printed are medians over
the rounds, and the median of the ratios ferrum / peer within a round: machines drift, ratios of neighbours hold. Memory is what the
process holds at its end: pages of the model file, and everything else.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time


def resident_mib():
    """Resident file pages and other pages of this process, MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    return {kind: int(status[key].split()[0]) / 1024 for kind, key in (("file", "RssFile"), ("anonymous", "RssAnon"))}


class Ferrum:
    """One sequence through `Engine`."""

    def __init__(self, path, threads, context):
        from ferrum.gguf_file import GGUFFile
        from ferrum_native._native import Engine

        self.engine = Engine(GGUFFile.open(path), threads=threads, kv_tokens=context)

    def prefill(self, tokens):
        self.engine.reset()
        self.engine.prefill(0, tokens)

    def decode(self, tokens):
        for token in tokens:
            self.engine.decode(0, token)


class LlamaCpp:
    """One sequence through `llama_cpp.Llama`, with its default options."""

    def __init__(self, path, threads, context):
        import llama_cpp

        self.model = llama_cpp.Llama(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def prefill(self, tokens):
        self.model.reset()
        self.model.eval(tokens)

    def decode(self, tokens):
        for token in tokens:
            self.model.eval([token])


ENGINES = {"ferrum": Ferrum, "llama.cpp": LlamaCpp}


def serve(name, path, threads, context):
    """The worker: one JSON command a line in, one JSON answer a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a peer that prints does not disturb the answers
    start = time.perf_counter()
    engine = ENGINES[name](path, threads, context)
    print(json.dumps({"load": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        command, tokens = json.loads(line)
        if command == "memory":
            result = resident_mib()
        else:
            start = time.perf_counter()
            getattr(engine, command)(tokens)
            result = len(tokens) / (time.perf_counter() - start)
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, name, arguments):
        command = [sys.executable, os.path.abspath(__file__), arguments.model, "--serve", name]
        command += ["--threads", str(arguments.threads), "--context", str(arguments.context)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load = self.answer()["load"]

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a worker ended early; its message is above.")
        return json.loads(line)

    def ask(self, command, tokens=()):
        self.process.stdin.write(json.dumps([command, list(tokens)]) + "\n")
        self.process.stdin.flush()
        return self.answer()


def vocabulary_size(path):
    from ferrum.gguf_file import GGUFFile

    return GGUFFile.open(path).tensors["token_embd.weight"].shape[0]


def compare(arguments):
    rng = random.Random(7)
    vocab = vocabulary_size(arguments.model)
    workers = {name: Worker(name, arguments) for name in ENGINES}
    speeds = {name: {"prefill": [], "decode": []} for name in ENGINES}
    for turn in range(arguments.rounds + 1):
        prompt = [rng.randrange(vocab) for _ in range(arguments.prompt_tokens)]
        continuation = [rng.randrange(vocab) for _ in range(arguments.gen_tokens)]
        for command, tokens in (("prefill", prompt), ("decode", continuation)):
            for name in list(ENGINES) if turn % 2 else reversed(ENGINES):
                speed = workers[name].ask(command, tokens)
                if turn > 0:  # round 0 warms up
                    speeds[name][command].append(speed)
    return {
        name: {
            "load_s": worker.load,
            "prefill_tok_s": statistics.median(speeds[name]["prefill"]),
            "decode_tok_s": statistics.median(speeds[name]["decode"]),
            "resident_mib": worker.ask("memory"),
            "rounds": speeds[name],
        }
        for name, worker in workers.items()
    }


def report(result, arguments):
    print(f"{os.path.basename(arguments.model)}: {arguments.prompt_tokens} prompt and {arguments.gen_tokens} generated tokens, "
          f"{arguments.threads} threads, medians of {arguments.rounds} rounds")
    for name, row in result.items():
        memory = row["resident_mib"]
        print(f"{name:10s} load {row['load_s']:6.2f} s   prefill {row['prefill_tok_s']:8.1f} tok/s   decode {row['decode_tok_s']:8.2f} tok/s   "
              f"resident {memory['file']:.0f} MiB of file + {memory['anonymous']:.0f} MiB")
    for command in ("prefill", "decode"):
        ratios = [ours / theirs for ours, theirs in zip(result["ferrum"]["rounds"][command], result["llama.cpp"]["rounds"][command])]
        print(f"{command}: ferrum / llama.cpp = {statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.model, arguments.threads, arguments.context)
    result = compare(arguments)
    print(json.dumps(result)) if arguments.json else report(result, arguments)


if __name__ == "__main__":
    main()
