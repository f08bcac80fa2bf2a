"""Several samples of one prompt, which is read once, and the log-probabilities of their tokens.

    python tools/examples/best_of.py [MODEL.gguf]
"""

import sys

from ferrum import LLM, SamplingParams


def main() -> None:
    params = SamplingParams(n=4, max_tokens=25, temperature=1.0, min_p=0.05, seed=3, logprobs=0)
    with LLM(*sys.argv[1:2]) as llm:
        (output,) = llm.generate("Once upon a time", params)
        for completion in sorted(output.outputs, key=lambda completion: completion.cumulative_logprob, reverse=True):
            print(f"{completion.cumulative_logprob:8.2f}  seed {completion.seed} {completion.text!r}")


if __name__ == "__main__":
    main()
