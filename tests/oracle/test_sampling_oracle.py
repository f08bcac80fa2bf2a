"""The sampling rule against `transformers`' own logits processors; needs the extra `oracle`."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from ferrum.logit_edits import LogitEdits  # noqa: E402
from ferrum.sampling import SamplingParams, full_row, sample  # noqa: E402
from test_sampling import kept_and_drawn, spread_row  # noqa: E402

pytestmark = pytest.mark.oracle
VOCAB = 200


def transformers_probabilities(logits, params, ids):
    """Of each token, as `generate` chains the processors; 0 for those that do not stay."""
    torch = pytest.importorskip("torch", reason="needs the extra oracle: torch is not installed")
    pytest.importorskip("transformers", reason="needs the extra oracle: transformers is not installed")
    from transformers import (MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
                              TypicalLogitsWarper)

    chain = [
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty), TemperatureLogitsWarper(params.temperature),
        TopKLogitsWarper(params.top_k) if params.top_k else None, TopPLogitsWarper(params.top_p) if params.top_p < 1 else None,
        MinPLogitsWarper(params.min_p) if params.min_p else None, TypicalLogitsWarper(params.typical_p) if params.typical_p < 1 else None,
    ]
    ids, scores = torch.tensor([ids]), torch.tensor(logits[None].astype(np.float64))
    for processor in chain:
        scores = scores if processor is None else processor(ids, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("fields", [
    dict(repetition_penalty=(0.5, 2.0)), dict(top_k=(1, 60)), dict(top_p=(0.01, 0.999)), dict(min_p=(0.001, 0.9)), dict(typical_p=(0.01, 0.999)),
    dict(repetition_penalty=(0.5, 2.0), top_k=(1, 60), top_p=(0.3, 0.999), min_p=(0.001, 0.1), typical_p=(0.3, 0.999)),
], ids=lambda fields: "+".join(fields))
def test_the_rule_keeps_and_weighs_what_transformers_does(fields):
    rng = np.random.default_rng(5)
    for _ in range(60):
        values = {name: int(rng.integers(*ends)) if name == "top_k" else float(rng.uniform(*ends)) for name, ends in fields.items()}
        params = SamplingParams(temperature=float(rng.uniform(0.2, 3)), **values)
        logits, prompt, text = spread_row(rng, VOCAB), rng.integers(0, VOCAB, 15).tolist(), rng.integers(0, VOCAB, 10).tolist()
        probabilities = transformers_probabilities(logits, params, prompt + text)
        edits = LogitEdits(params, prompt, ())
        for token in text:
            edits.add(token)
        row = full_row(edits.apply(logits))
        assert set(kept_and_drawn(logits, params, 0.5, prompt, text)[0]) == set(np.flatnonzero(probabilities))
        start = 0.0
        for id in row.ids[0]:  # the token stands from u = start to start + its probability
            if probabilities[id] > 1e-5:
                assert sample(row, params, start + probabilities[id] / 2) == id
            start += probabilities[id]
