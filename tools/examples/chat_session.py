"""A conversation whose earlier turns stay in the KV cache: only what is new is computed.

    python tools/examples/chat_session.py [MODEL.gguf]
"""

import sys

from ferrum import LLM, SamplingParams

QUESTIONS = ["Tell me a story about a fox.", "What did the fox learn?"]


def main() -> None:
    messages: list[dict[str, str]] = []
    with LLM(*sys.argv[1:2]) as llm, llm.session() as session:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            # A session remembers no messages: each turn is given the whole conversation.
            with session.stream_chat(messages, SamplingParams(max_tokens=60, temperature=0)) as stream:
                reply = "".join(piece.text for piece in stream)
            messages.append({"role": "assistant", "content": reply})
            output = stream.output
            print(f"> {question}\n{reply}\n[{output.usage.prompt_tokens} prompt tokens; {output.num_cached_tokens} were in the KV cache before]")


if __name__ == "__main__":
    main()
