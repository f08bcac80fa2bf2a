"""Run a job that may be interrupted and started again: what is finished stays finished, and the file is the same in the end.

    python tools/examples/batch_job.py [MODEL.gguf]
"""

import json
import sys
import tempfile
from pathlib import Path

import ferrum.batch

ANIMALS = ["fox", "bear", "owl", "frog", "cow", "mouse"]


def rows():
    for animal in ANIMALS:
        yield {"custom_id": f"story-{animal}", "messages": [{"role": "user", "content": f"Tell me a story about a {animal}."}]}
        yield {"custom_id": f"size-{animal}", "prompt": f"The {animal} was very", "continuations": [" big", " small"]}


def interrupt(progress) -> None:
    if progress.rows is not None and progress.done >= 3:
        raise KeyboardInterrupt


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        job = dict(model=sys.argv[1] if sys.argv[1:] else None, params={"max_tokens": 30, "temperature": 0.8, "seed": 1})
        try:
            ferrum.batch.run(rows(), output, progress=interrupt, **job)
        except KeyboardInterrupt:
            print("interrupted, as Ctrl-C or a crash would")
        summary = ferrum.batch.run(rows(), output, resume=True, **job)
        print(f"{summary.rows} rows, {summary.rows_before} of them done before, {summary.errors} errors")
        for line in output.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "scores" in row:
                print(row["custom_id"], max(row["scores"], key=lambda score: score["logprob"])["continuation"])
            else:
                print(row["custom_id"], repr(row["text"][:60]))


if __name__ == "__main__":
    main()
