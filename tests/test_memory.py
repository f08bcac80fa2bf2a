"""What a loaded model takes: the file is mapped, and nothing of it is expanded."""

import json
import subprocess
import sys

import pytest

from ferrum.options import DEFAULT_MODEL

MIB = 1 << 20

PROBE = """
import json, sys
from ferrum.gguf_file import GGUFFile
from ferrum_native._native import Engine, plan
import numpy

def resident():
    with open("/proc/self/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    return {key: int(status[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")}

file = GGUFFile.open(sys.argv[1])
before = resident()
options = dict(threads=2, kv_tokens=1024, kv_type=sys.argv[2])
engine = Engine(file, **options)
engine.warm_up()
engine.prefill(0, list(range(700)))
for token in range(50):
    engine.decode(0, token)
engine.candidates(64)
running = resident()
engine.close()
after = resident()
print(json.dumps({"plan": plan(file, **options), "before": before, "running": running, "after": after}))
"""


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def measured(request):
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run([sys.executable, "-c", PROBE, DEFAULT_MODEL, request.param], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow_under_sanitizers
def test_anonymous_memory_stays_within_the_plan(measured):
    plan = measured["plan"]
    grown = measured["running"]["RssAnon"] - measured["before"]["RssAnon"]
    # The demo model's experts alone are 56 MiB as floats: an expanded tensor does not fit the allowance.
    assert grown <= plan["kv_bytes"] + plan["scratch_bytes"] + 12 * MIB


@pytest.mark.slow_under_sanitizers
def test_file_pages_are_at_most_the_file(measured):
    grown = measured["running"]["RssFile"] - measured["before"]["RssFile"]
    assert grown <= measured["plan"]["weights_bytes"] + 4 * MIB


@pytest.mark.slow_under_sanitizers
def test_close_gives_the_memory_back(measured):
    assert measured["after"]["RssFile"] - measured["before"]["RssFile"] <= 4 * MIB
    assert measured["after"]["RssAnon"] - measured["before"]["RssAnon"] <= 4 * MIB
