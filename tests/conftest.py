"""Settings of the whole test run."""

import os

# numpy's own threads fight with the engine's on a small machine; read when numpy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
