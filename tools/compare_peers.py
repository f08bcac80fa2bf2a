"""ferrum beside llama.cpp (the PyPI package llama-cpp-python) on one model, in interleaved rounds.

    python tools/compare_peers.py MODEL.gguf [--prompts 512,2048] [--batch 1,4,8,16] [--gen-tokens 32] [--rounds 3] [--threads 2] [--ik BUILD]

llama.cpp runs in both of its modes: weights repacked at load, which is its default, and in place. Each engine lives in a process of its own
and works while the others wait. All get the same random token ids; the sequences of a batch get different ones, as equal ones would meet the
same experts. Decode goes on from `--depth` tokens of each sequence. Printed are medians with [least, most] of the rounds, and the ratios of
ferrum to the faster mode within a round: machines drift, ratios of neighbours hold. first_token_s: from the start of a process to the first
token of an 8-token prompt. Memory is what the process holds after the first round: pages of the model file, and everything else.

`--ik` names a build folder of ik_llama.cpp; its bin/llama-bench then runs in the same rounds, as it is and with run-time repacking, for
prompts and single decode.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time

SLOTS = 16  # sequence ids of llama.cpp's batched context


def resident_mib():
    """Resident file pages and other pages of this process, MiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    return {kind: int(status[key].split()[0]) / 1024 for kind, key in (("file", "RssFile"), ("anonymous", "RssAnon"))}


class Ferrum:
    """`Engine` with its defaults; like the peers' classes: prompt(tokens), start(prompts), step(tokens), each one computed when it returns."""

    def __init__(self, path, threads, sequence_tokens, batch_tokens, instruction_set):
        from ferrum.gguf_file import GGUFFile
        from ferrum_native._native import Engine

        kv_tokens = max(sequence_tokens, SLOTS * (batch_tokens + 16))
        self.engine = Engine(GGUFFile.open(path), threads=threads, kv_tokens=kv_tokens, max_sequences=SLOTS, instruction_set=instruction_set)

    def prompt(self, tokens):
        self.engine.reset()
        self.engine.prefill(0, tokens)

    def start(self, prompts):
        self.engine.reset()
        for sequence, tokens in enumerate(prompts):
            self.engine.prefill(sequence, tokens, logits="none")

    def step(self, tokens):
        self.engine.decode_batch(list(range(len(tokens))), tokens)


class LlamaCpp:
    """llama.cpp through the package's low-level API: one model, a context for a long prompt and one for many sequences."""

    repack = True

    def __init__(self, path, threads, sequence_tokens, batch_tokens, _instruction_set):
        import llama_cpp

        self.api = api = llama_cpp
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.use_extra_bufts = self.repack
        self.model = api.llama_model_load_from_file(path.encode(), params)
        self.threads = threads
        self.long = self.context(sequence_tokens, 1)
        self.many = None
        self.many_tokens = batch_tokens
        self.tokens = api.llama_batch_init(512, 0, 1)

    def context(self, tokens, sequences):
        params = self.api.llama_context_default_params()
        params.n_ctx = tokens * sequences
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        return self.api.llama_init_from_model(self.model, params)

    def decode(self, context, items):
        """Items (token, position, sequence, whether its logits are wanted), at most 512."""
        batch = self.tokens
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if self.api.llama_decode(context, batch):
            sys.exit("error: llama_decode failed.")
        self.api.llama_synchronize(context)

    def prompt(self, tokens):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.long), False)
        for first in range(0, len(tokens), 512):
            part = range(first, min(first + 512, len(tokens)))
            self.decode(self.long, [(tokens[i], i, 0, i == len(tokens) - 1) for i in part])

    def start(self, prompts):
        self.many = self.many or self.context(256 * (1 + self.many_tokens // 256), SLOTS)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.many), False)
        for sequence, tokens in enumerate(prompts):
            for first in range(0, len(tokens), 512):
                part = range(first, min(first + 512, len(tokens)))
                self.decode(self.many, [(tokens[i], i, sequence, i == part[-1]) for i in part])
        self.position = len(prompts[0])

    def step(self, tokens):
        self.decode(self.many, [(token, self.position, sequence, True) for sequence, token in enumerate(tokens)])
        self.position += 1


class LlamaCppInPlace(LlamaCpp):
    repack = False


ENGINES = {"ferrum": Ferrum, "llama.cpp": LlamaCpp, "llama.cpp in place": LlamaCppInPlace}
PEERS = [name for name in ENGINES if name != "ferrum"]


def serve(arguments):
    """The worker: one JSON command a line in, one JSON answer a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # a peer that prints does not disturb the answers
    engine = ENGINES[arguments.serve](arguments.model, arguments.threads, arguments.sequence_tokens, arguments.batch_tokens, arguments.instruction_set)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        command, given = json.loads(line)
        result = None
        if command == "memory":
            result = resident_mib()
        elif command == "start":
            engine.start(given)
        else:
            begun = time.perf_counter()
            for tokens in [given] if command == "prompt" else given:
                getattr(engine, command)(tokens)
            result = time.perf_counter() - begun
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, name, arguments):
        command = [sys.executable, os.path.abspath(__file__), arguments.model, "--serve", name, "--threads", str(arguments.threads)]
        command += ["--sequence-tokens", str(arguments.sequence_tokens), "--batch-tokens", str(arguments.batch_tokens)]
        command += ["--instruction-set", arguments.instruction_set] if arguments.instruction_set else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the worker of {self.name} ended early. Run it by hand with --serve, then type a line.")
        return json.loads(line)

    def ask(self, command, given=()):
        self.process.stdin.write(json.dumps([command, given]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()


class IkBench:
    """ik_llama.cpp's own benchmark program, a run for each measurement."""

    def __init__(self, build, arguments, repack):
        self.command = [os.path.join(build, "bin", "llama-bench"), "-m", arguments.model, "-t", str(arguments.threads), "-r", "1", "-o", "json"]
        self.command += ["-rtr", "1"] if repack else []

    def speed(self, prompt, generated):
        done = subprocess.run([*self.command, "-p", str(prompt), "-n", str(generated)], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)[0]["avg_ts"]


def first_token_s(name, arguments, tokens):
    begun = time.perf_counter()
    worker = Worker(name, arguments)
    worker.ask("prompt", tokens)
    seconds = time.perf_counter() - begun
    worker.end()
    return seconds


def vocabulary_size(path):
    from ferrum.gguf_file import GGUFFile

    return GGUFFile.open(path).tensors["token_embd.weight"].shape[0]


def measure(arguments, tell):
    """{row: {engine: figures of the rounds}}, and memory; rows are "prefill N", "decode N" (tokens a second) and "first_token_s"."""
    rng = random.Random(7)
    vocab = vocabulary_size(arguments.model)
    ids = lambda count: [rng.randrange(vocab) for _ in range(count)]  # noqa: E731
    rows = {}
    note = lambda row, name, figure: rows.setdefault(row, {}).setdefault(name, []).append(figure)  # noqa: E731
    ik = {} if not arguments.ik else {"ik_llama.cpp": IkBench(arguments.ik, arguments, False), "ik_llama.cpp repacked": IkBench(arguments.ik, arguments, True)}
    workers = {name: Worker(name, arguments) for name in ENGINES}
    memory = {}
    for turn in range(arguments.rounds + 1):
        tell(f"round {turn} of {arguments.rounds}" if turn else "a round to warm up")
        order = list(workers) if turn % 2 else list(reversed(workers))
        for count in arguments.prompts:
            prompt = ids(count)
            for name in order:
                seconds = workers[name].ask("prompt", prompt)
                if turn:
                    note(f"prefill {count}", name, count / seconds)
        for batch in arguments.batch:
            prompts = [ids(arguments.depth) for _ in range(batch)]
            steps = [ids(batch) for _ in range(arguments.gen_tokens)]
            for name in order:
                workers[name].ask("start", prompts)
                seconds = workers[name].ask("step", steps)
                if turn:
                    note(f"decode {batch}", name, batch * len(steps) / seconds)
        memory = memory or {name: worker.ask("memory") for name, worker in workers.items()}
        if not turn:
            continue
        for name, bench in ik.items():
            for count in arguments.prompts:
                note(f"prefill {count}", name, bench.speed(count, 0))
            note("decode 1", name, bench.speed(0, arguments.gen_tokens))
        for name in ENGINES:
            note("first_token_s", name, first_token_s(name, arguments, ids(8)))
    for worker in workers.values():
        worker.end()
    return rows, memory


def ratios(row, figures):
    """ferrum's advantage over the faster llama.cpp mode in each round."""
    if row == "first_token_s":
        return [min(peers) / ours for ours, *peers in zip(figures["ferrum"], *(figures[name] for name in PEERS))]
    return [ours / max(peers) for ours, *peers in zip(figures["ferrum"], *(figures[name] for name in PEERS))]


def spread(figures, digits):
    return f"{statistics.median(figures):.{digits}f} [{min(figures):.{digits}f}, {max(figures):.{digits}f}]"


def report(rows, memory, arguments):
    print(f"{os.path.basename(arguments.model)}, {arguments.threads} threads, medians [least, most] of {arguments.rounds} rounds; tokens/s of all sequences together, "
          f"decode of {arguments.gen_tokens} tokens from {arguments.depth}")
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    print(f"{'':<14}" + "".join(f"{name:>24}" for name in names) + f"{'ferrum / best llama.cpp':>28}")
    for row, figures in rows.items():
        digits = 2 if row == "first_token_s" else 1
        cells = "".join(f"{spread(figures[name], digits) if name in figures else '':>24}" for name in names)
        print(f"{row:<14}{cells}{spread(ratios(row, figures), 2):>28}")
    print(f"{'memory, MiB':<14}" + "".join(f"{held['file']:>10.0f} + {held['anonymous']:<11.0f}" for held in memory.values()) + "  file + other")


def numbers(text):
    return [int(part) for part in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=numbers, default=[512, 2048], help="tokens of the prompts (512,2048)")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 8, 16], help=f"sequences that decode together, at most {SLOTS} (1,4,8,16)")
    parser.add_argument("--depth", type=int, default=64, help="tokens of each sequence where decode begins (64)")
    parser.add_argument("--gen-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine (the CPUs of this process)")
    parser.add_argument("--ik", metavar="BUILD", help="a build folder of ik_llama.cpp")
    parser.add_argument("--instruction-set", help="of ferrum's kernels, such as avx2 beside peers that were built for it (the best of this machine)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--sequence-tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batch-tokens", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if max(arguments.batch) > SLOTS:
        parser.error(f"--batch goes to {SLOTS}")
    if arguments.serve:
        return serve(arguments)
    arguments.sequence_tokens = max(arguments.prompts) + 256
    arguments.batch_tokens = arguments.depth + arguments.gen_tokens
    rows, memory = measure(arguments, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps({"rows": rows, "memory": memory})) if arguments.json else report(rows, memory, arguments)


if __name__ == "__main__":
    main()
