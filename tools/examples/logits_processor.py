"""Edit the logits before each token: here no word of a list may be told twice.

    python tools/examples/logits_processor.py [MODEL.gguf]
"""

import sys

import numpy as np

from ferrum import LLM, SamplingParams


def main() -> None:
    with LLM(*sys.argv[1:2]) as llm:
        once = {llm.tokenize(word, add_bos=False)[0] for word in (" the", " and", " a", " was")}

        def told_once(token_ids: list[int], logits: np.ndarray) -> None:
            logits[list(once.intersection(token_ids))] = -np.inf

        for processors in ((), (told_once,)):
            params = SamplingParams(temperature=0, max_tokens=40, logits_processors=processors)
            (output,) = llm.generate("Once upon a time", params)
            words = output.outputs[0].text.split()
            print(f"{words.count('the')} the, {words.count('and')} and: {' '.join(words)}")


if __name__ == "__main__":
    main()
