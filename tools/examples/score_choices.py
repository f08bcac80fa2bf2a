"""Which of several continuations the model finds likeliest; the prompt is read once.

    python tools/examples/score_choices.py [MODEL.gguf]
"""

import sys

from ferrum import LLM

PROMPT = "The dog was tired, so he went to"
CHOICES = [" sleep.", " the moon.", " school."]


def main() -> None:
    with LLM(*sys.argv[1:2]) as llm:
        scores = llm.score(PROMPT, CHOICES)
        for score in sorted(scores, key=lambda score: score.logprob, reverse=True):
            print(f"{score.logprob:8.3f} {score.continuation!r}, by token {[round(value, 2) for value in score.token_logprobs]}")


if __name__ == "__main__":
    main()
