"""Ask from as many threads as you like: all texts run together on one engine.

    python tools/examples/many_threads.py [MODEL.gguf]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from ferrum import LLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=24)


def main() -> None:
    with LLM(*sys.argv[1:2]) as llm, ThreadPoolExecutor(8) as threads:
        for output in threads.map(lambda name: llm.generate(f"Once upon a time {name}", PARAMS)[0], ["Tom", "Anna", "Ben", "Lily"] * 4):
            print(f"{output.prompt}{output.outputs[0].text.splitlines()[0]}")


if __name__ == "__main__":
    main()
