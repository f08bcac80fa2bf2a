"""CPU seconds of opening a model file with its tokenizer, imports apart.

    RAYON_NUM_THREADS=1 python tools/bench_open.py MODEL.gguf [--runs 7]

The time is that of all threads of the process (time.process_time). The weights are not read.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers  # noqa: E402, F401  the settings above are read at its import

from ferrum.gguf_file import GGUFFile  # noqa: E402
from ferrum.tokenizer import Tokenizer  # noqa: E402
from ferrum_native import _native  # noqa: E402, F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path of a GGUF file")
    parser.add_argument("--runs", type=int, default=7, help="how often it is opened (default 7)")
    arguments = parser.parse_args()

    header, tokenizer, total = [], [], []
    for _ in range(arguments.runs):
        start = time.process_time()
        file = GGUFFile.open(arguments.model)
        opened = time.process_time()
        vocabulary = Tokenizer.from_gguf(file)
        built = time.process_time()
        header.append(opened - start)
        tokenizer.append(built - opened)
        total.append(built - start)
    print(f"{arguments.model}: {vocabulary.vocab_size} tokens, {len(file.tensors)} tensors, {arguments.runs} runs")
    for name, seconds in (("header", header), ("tokenizer", tokenizer), ("together", total)):
        print(f"{name:9}  best {min(seconds):.3f} s  median {statistics.median(seconds):.3f} s  of CPU")


if __name__ == "__main__":
    main()
