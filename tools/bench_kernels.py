"""Speed of the CPU's products for every weight type: GB/s of weights at one column beside the memory's rate, and products a second at more.

    python tools/bench_kernels.py [--types Q4_K,Q5_K] [--columns 1,4,16] [--threads 2] [--rows 32768] [--cols 2048] [--rounds 25] [--float32]

One column is a decode step of one sequence, which memory bounds; from some columns on the processor does. Each figure is the best of the
rounds, in which types take turns; the memory's rate is measured after each round.
"""

import argparse
import sys
import time
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reference import BLOCK_OF  # noqa: E402
from tiny_models import random_tensor  # noqa: E402

from ferrum.gguf_file import GGUFFile  # noqa: E402
from ferrum.options import DEFAULT_MODEL  # noqa: E402
from ferrum_native import _native  # noqa: E402

REPEATED_ROWS = 512  # random rows that are repeated up to --rows: making them costs more than the measurement


def place(runner, kind, rows, cols):
    some = random_tensor(kind, (REPEATED_ROWS, cols), cols**-0.5, np.random.default_rng(1))
    raw = np.tile(np.ascontiguousarray(some).view(np.uint8).reshape(REPEATED_ROWS, -1), (rows // REPEATED_ROWS, 1))
    return runner.place_weight(raw, int(gguf.GGMLQuantizationType[kind]), (rows, cols)), raw.nbytes


def seconds(runner, activation, weight):
    started = time.perf_counter()
    runner.linear(activation, [weight])
    return time.perf_counter() - started


def measure(arguments, kinds, columns):
    """Best seconds of each (kind, columns), bytes of each kind, and the memory's best rate in bytes a second."""
    runner = _native.OpRunner("cpu", threads=arguments.threads, instruction_set=arguments.instruction_set, activations="float32" if arguments.float32 else "int8")
    weights = {kind: place(runner, kind, arguments.rows, arguments.cols) for kind in kinds}
    x = np.random.default_rng(2).standard_normal((max(columns), arguments.cols)).astype(np.float32)
    best, rates = {}, []
    with _native.Engine(GGUFFile.open(DEFAULT_MODEL), threads=arguments.threads, kv_tokens=64) as engine:
        for number in range(arguments.rounds + 1):  # the first warms up
            for kind, (weight, _) in weights.items():
                for count in columns:
                    took = seconds(runner, runner.activation(x[:count], [weight]), weight)
                    if number:
                        best[kind, count] = min(took, best.get((kind, count), took))
            rates.append(engine.measure_bandwidth())
    return runner.name, best, {kind: size for kind, (_, size) in weights.items()}, max(rates)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="ggml type names, comma-separated", default=",".join(("F16", *BLOCK_OF)))
    parser.add_argument("--columns", default="1,4,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32768, help=f"a multiple of {REPEATED_ROWS}")
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--float32", action="store_true", help="float activations in place of int8")
    parser.add_argument("--instruction-set", help="scalar, for example; the best of this machine unless given")
    arguments = parser.parse_args()
    kinds, columns = arguments.types.split(","), [int(count) for count in arguments.columns.split(",")]
    name, best, sizes, rate = measure(arguments, kinds, columns)
    products = arguments.rows * arguments.cols
    print(f"{name}; {arguments.rows} x {arguments.cols} weights; memory reads at {rate / 1e9:.1f} GB/s; best of {arguments.rounds} rounds")
    print("type    bits   GB/s at 1 (of memory)  " + "  ".join(f"GMAC/s at {count:2}" for count in columns))
    for kind in kinds:
        speed = sizes[kind] / best[kind, columns[0]]
        figures = "  ".join(f"{products * count / best[kind, count] / 1e9:12.1f}" for count in columns)
        print(f"{kind:6} {8 * sizes[kind] / products:5.2f} {speed / 1e9:14.1f} ({speed / rate:4.0%})      {figures}")


if __name__ == "__main__":
    main()
