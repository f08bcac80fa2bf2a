"""Continue many prompts at once: they share every step of the engine, and each text is the one it would be alone.

    python tools/examples/many_prompts.py [MODEL.gguf]
"""

import sys

from ferrum import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The little fox", "Tom looked at the sea and", "One rainy day, a frog"]


def main() -> None:
    params = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, seed=7, stop=["\n\n"])
    with LLM(*sys.argv[1:2]) as llm:
        for output in llm.generate(PROMPTS, params):
            completion = output.outputs[0]
            print(f"{output.prompt}{completion.text}  [{completion.finish_reason}, {len(completion.token_ids)} tokens]")


if __name__ == "__main__":
    main()
