"""Rows and runs that the tests of batch jobs share."""

import json
import os
import subprocess
import time

from test_cli import command, environment

SHOTS = "Q: Who is the fox?\nA: The fox is Tom.\n\nQ: Who is the cow?\nA: The cow is Lily.\n\nQ: Who is the "
BAD = {
    "not JSON": '{"prompt": "x"',
    "no prompt": {"promt": "x"},
    "wrong params": {"prompt": "x", "params": {"temperature": -1}},
    "too long": {"prompt": "fox " * 9000},
}


def rows_of_all_kinds(count):
    """Chats, few-shot prompts that begin alike, continuations, samples, and a bad row now and then."""
    kinds = [
        lambda i: {"custom_id": f"chat-{i}", "messages": [{"role": "user", "content": f"Tell me a story about {i} foxes."}]},
        lambda i: {"custom_id": i, "prompt": f"{SHOTS}{'cow' if i % 2 else 'fox'} number {i}?\nA:", "params": {"stop": ["\n"]}, "level": i % 3},
        lambda i: {"prompt": f"Tom has {i}", "continuations": [" cats.", " dogs and a cow."]},
        lambda i: {"prompt": "Once upon a time"},
        lambda i: {"prompt": [14, 409, 294, i % 200], "params": {"n": 2, "temperature": 1.2, "max_tokens": 6}},
        lambda i: list(BAD.values())[i // 6 % len(BAD)],
    ]
    return [kinds[i % len(kinds)](i) for i in range(count)]


def write_rows(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def batch(*arguments, **changes):
    """(exit code, stderr, stdout) of `batch` with one thread."""
    done = subprocess.run(command("batch", *map(str, arguments), "--threads", "1"), capture_output=True, env=environment(**changes), timeout=120)
    return done.returncode, done.stderr.decode(), done.stdout.decode()


def start(*arguments, **streams):
    return subprocess.Popen(command("batch", *map(str, arguments), "--threads", "1"), env=environment(), **{"stderr": subprocess.PIPE, **streams})


def size_of(path):
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def wait_for_growth(path, process, before):
    """Whether the file has grown while the process lived."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if size_of(path) > before:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    raise AssertionError(f"{path} does not grow")


def journal_of(output):
    return f"{output}.journal"


def manifest_of(output):
    return json.loads(open(f"{output}.manifest.json", encoding="utf-8").read())


def files_of(output):
    """The names of what a job has left beside its output."""
    folder, name = os.path.split(output)
    return sorted(each.removeprefix(name) for each in os.listdir(folder) if each.startswith(name) and each != name)
