"""What the README and tools/examples show runs, as they show it, with the demo model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "tools" / "examples").glob("*.py"))
SHOWN = {  # a line of each example's output
    "async_streams.py": r"^in a hurry: .+ \[(length|stop)\]$",
    "batch_job.py": r"^12 rows, \d+ of them done before, 0 errors$",
    "best_of.py": r"^ +-\d+\.\d\d  seed [3-6] '.+'$",
    "chat_session.py": r"^\[92 prompt tokens; 7\d were in the KV cache before\]$",
    "fit_memory.py": r"^within 27MiB: weights 12\.6 MiB, KV cache \d\.\d MiB for 1\d{3} tokens, scratch \d+\.\d MiB$",
    "logits_processor.py": r"^[01] the, [01] and: ",
    "many_prompts.py": r"^Once upon a time.+  \[(length|stop), \d+ tokens\]$",
    "many_threads.py": r"^Once upon a time Lily.+",
    "score_choices.py": r"^ +-\d+\.\d{3} ' sleep\.', by token \[.+\]$",
    "stream_reply.py": r"^\d+ tokens/s$",
}


def run(*command):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FERRUM_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES} == set(SHOWN)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_promises(path):
    assert re.search(SHOWN[path.name], run(sys.executable, str(path)), re.MULTILINE)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_the_readme_runs(code):
    assert run(sys.executable, "-c", code).strip()


def command_lines():
    """Commands of the README that need no model file."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m ferrum ") and ".gguf" not in line]


@pytest.mark.parametrize("line", command_lines())
def test_commands_of_the_readme_run(line):
    arguments = line.removeprefix("python -m ferrum ")
    assert run("bash", "-c", f"set -o pipefail; {sys.executable} -m ferrum {arguments} < /dev/null").strip()
