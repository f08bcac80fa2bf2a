"""Settings of the whole test run."""

import os

import pytest

# numpy's own threads fight with the engine's on a small machine; read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_f16():
    """Path of the demo model in F16, which is not in the repository (44 MB)."""
    path = os.environ.get("FERRUM_DEMO_F16", "")
    if not os.path.exists(path):
        pytest.skip("FERRUM_DEMO_F16 does not name the demo model's F16 file")
    return path
