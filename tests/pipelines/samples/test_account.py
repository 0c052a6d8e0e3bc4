"""What was drawn of each model: counted, timed by itself, and said."""

from collections import Counter

import pyarrow as pa
import pytest

from pipelines.dataset.layout import SAMPLES_SCHEMA
from pipelines.progress import ProgressStep, observers
from pipelines.samples.account import Account
from pipelines.units.stats import Effort


def rows(num_kept: int, num_quarantined: int = 0) -> pa.Table:
    found = [{"status": "kept"}] * num_kept + [{"status": "quarantined", "reason": "non_finite"}] * num_quarantined
    return pa.Table.from_pylist(found, SAMPLES_SCHEMA)


def effort(batch_size: int = 4) -> Effort:
    seconds: Counter[str] = Counter({"fetch": 1.5, "encode": 2.0, "pack": 0.5})  # type: ignore[dict-item]
    return Effort(seconds, num_images=4, batch_size=batch_size, device="cpu")


def test_a_model_has_its_own_count_progress_and_cost(capfd: pytest.CaptureFixture[str]) -> None:
    steps: list[ProgressStep] = []
    observers.append(steps.append)
    try:
        account = Account("evaluate", "dpo", "f" * 32, 8, 4, 2)
        account.add(rows(4), effort())
        assert not account.is_done
        account.add(rows(3, 1), effort(2))
        assert account.is_done
        account.close()
        account.close()
    finally:
        observers.remove(steps.append)
    drawn = account.result()
    assert (drawn.name, drawn.num_drawn, drawn.num_quarantined, drawn.worker_s) == ("dpo", 7, 1, 7.0)
    assert drawn.speed is not None
    assert (drawn.speed.items, drawn.speed.halved_to) == (8, 2)
    assert drawn.to_json()["worker_s"] == 7.0
    assert [(step.stage, step.done, step.total) for step in steps] == [("evaluate dpo", 4, 8), ("evaluate dpo", 8, 8)]
    assert steps[1].statuses == {"kept": 3, "quarantined": 1}
    said = capfd.readouterr().err
    assert "evaluate dpo: cpu ran out of memory with batches of 4; continuing with batches of 2" in said
    assert said.count("evaluate dpo: 1 of 8 samples are not finite numbers") == 1


def test_a_model_of_which_nothing_was_drawn_cost_nothing() -> None:
    account = Account("evaluate", "base", "f" * 32, 8, 4, 2)
    account.close()
    drawn = account.result()
    assert (drawn.num_drawn, drawn.seconds, drawn.worker_s, drawn.speed) == (0, 0.0, 0.0, None)
