#!/usr/bin/env python3
"""Runs a model on two devices op by op and stops at the first op whose output differs: how a faulty kernel is found.

    python tools/compare_backends.py --device metal --beside cpu [-m model.gguf] [--text "Once upon a time"] [-n 3] [--tolerance 1e-4]

Prints what was compared, or the op, its number in the step, the layer, the place and both values (exit status 1). Both devices compute with
float32 activations and keys and values in float32, and each op gets the reference's inputs.
"""
import argparse
import sys

from ferrum.errors import DeviceError
from ferrum.gguf_file import GGUFFile
from ferrum.options import DEFAULT_MODEL
from ferrum.tokenizer import Tokenizer
from ferrum_native._native import Engine


def compare(arguments):
    file = GGUFFile.open(arguments.model)
    tokens = Tokenizer.from_gguf(file).encode(arguments.text)
    with Engine(file, device=arguments.device, compare_with=arguments.beside, compare_tolerance=arguments.tolerance, activations="float32", kv_type="f32",
                threads=1, kv_tokens=len(tokens) + 16 * (arguments.n + 1), max_sequences=2, prefill_chunk=min(len(tokens), 512)) as engine:
        print(f"{engine.device}, tolerance {arguments.tolerance:g} of the largest value of a row")
        engine.prefill(0, tokens)
        print(f"equal: a prompt of {len(tokens)} tokens")
        engine.fork(0, 1)
        for number in range(arguments.n):
            best = engine.candidates(1).ids[-1, 0]
            engine.decode_batch([0, 1], [best, best])
            print(f"equal: token {number + 1} of {arguments.n}, of two sequences")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="metal", help="the device to judge")
    parser.add_argument("--beside", default="cpu", help="the device that is right")
    parser.add_argument("--text", default="Once upon a time there was a little dog", help="the prompt")
    parser.add_argument("-n", type=int, default=3, help="tokens to generate")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except DeviceError as error:
        sys.exit(f"different: {error}")


if __name__ == "__main__":
    main()
