"""Answer a message piece by piece.

    python tools/examples/stream_reply.py [MODEL.gguf]
"""

import sys

from ferrum import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "Tell me a story about a fox."}]


def main() -> None:
    # enable_thinking is a variable of the template: Qwen3's asks the model to think first unless it is False.
    with LLM(*sys.argv[1:2]) as llm, llm.stream_chat(MESSAGES, SamplingParams(max_tokens=80, seed=1), enable_thinking=False) as stream:
        for piece in stream:
            print(piece.text, end="", flush=True)
        print(f"\n{stream.output.timings.decode_tokens_per_s:.0f} tokens/s")


if __name__ == "__main__":
    main()
