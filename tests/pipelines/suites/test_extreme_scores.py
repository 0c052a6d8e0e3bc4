"""Scores at the ends of what can be imported: finite results, and sentences that a person can read."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipelines.suites.cells import VALUES_SCHEMA
from pipelines.suites.reduce import reduce_suite
from pipelines.suites.results import Results
from pipelines.suites.suite import Suite, SuitePrompt

LARGEST = 3.4028234663852886e38


def words_of(base: list[float], other: list[float]) -> str:
    prompts = tuple(SuitePrompt.of(f"prompt {place}") for place in range(len(base)))
    rows = [
        {"model": model, "scorer": "x", "prompt_id": prompt.prompt_id, "index": 0, "value": value}
        for model, values in (("base", base), ("other", other))
        for prompt, value in zip(prompts, values, strict=True)
    ]
    suite = Suite("own", 1, prompts, scorers=("x",), primary=("x",))
    values = pa.Table.from_pylist(rows, schema=VALUES_SCHEMA)
    result = reduce_suite(values, suite, against="base", models=("base", "other"), seed=0, num_draws=200)
    json.dumps(Results({"own": result}).to_json(), allow_nan=False)
    return result.against["other"]["x"].words


@pytest.mark.parametrize("scale", [LARGEST, 1e30, 1e9, 1.0, 1e-9, 1e-300, 5e-324])
def test_scores_of_any_size_are_told_in_a_line(scale: float) -> None:
    rng = np.random.default_rng(0)
    base, other = (rng.uniform(-1, 1, 40) * scale for _ in range(2))
    assert len(words_of(base.tolist(), other.tolist())) < 140
    assert len(words_of([scale] * 40, [-scale] * 40)) < 140


def test_usual_sizes_have_no_exponent() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.001, 1.0, 1000.0):
        base = rng.normal(size=40) * scale
        assert "e-" not in words_of(base.tolist(), (base + rng.normal(size=40) * scale).tolist())
