"""Which single images a training saw is what the groups of its index hold, by its method."""

from collections import Counter
from pathlib import Path

import pytest
from encoded import write_encoded

from orchestration.rounds.seen_pairs import TrainedRound, count_pairs, seen_pairs
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import JUDGED, PAIR, PRIOR
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.data.order import Plan
from training.methods import METHODS
from training.spec import Snapshot, TrainSpec
from training.worker import load_pairs

GOOD, BAD = "good", "bad"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def mixed(storage: Storage, tmp_path: Path) -> Snapshot:
    """Few pairs and judged images, many of a class; in two sizes."""
    written = {"num_train": 8, "num_validation": 2, "num_judged": 7, "num_judged_validation": 2, "num_prior": 61}
    return write_encoded(storage, tmp_path, **written, sides=(8, 12), labels=(0.0, 0.5, 1.0))


def spec_of(storage: Storage, snapshot: Snapshot, method: str, labels: str) -> TrainSpec:
    settings = {"method": method, "labels": labels, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 9}
    return TrainSpec(storage.url, "run", ModelSource("m"), "base", 3, TrainConfig(**settings), snapshot)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        ("mapo", {PAIR: 8}),
        ("kto", {PAIR: 8, GOOD: 3, BAD: 4}),
        ("dco", {PAIR: 8, GOOD: 3}),
        ("dreambooth", {PAIR: 8, GOOD: 3, PRIOR: 61}),
    ],
)
def test_what_was_seen_is_what_the_groups_hold(
    storage: Storage, mixed: Snapshot, method: str, kinds: dict[str, int], labels: str
) -> None:
    spec, counts = spec_of(storage, mixed, method, labels), Counter[str]()
    found = load_pairs(spec)
    index, plan = found.index, found.plan
    in_order: dict[str, None] = {}
    for bucket, size in enumerate(index.bucket_sizes):
        for record in (index.pair(bucket, element) for element in range(size)):
            if record.pair_key not in in_order:
                counts[(GOOD if record.is_good else BAD) if record.kind == JUDGED else record.kind] += 1
                in_order[record.pair_key] = None
    assert counts == kinds | {PAIR: 8 if labels == "soft" else 5}
    for steps in (0, 1, 3, 9, 40):
        keys = {
            index.pair(group.bucket, int(element)).pair_key
            for step in range(steps)
            for group in (plan.group(step, slot) for slot in range(plan.num_slots))
            for element in group.elements
        }
        trained = TrainedRound(1, mixed, spec.seed, 2, 8, labels, steps, method)  # type: ignore[arg-type]
        seen = seen_pairs(storage, trained)
        told = [f"{high:016x}{low:016x}" for high, low in seen.keys.tolist()]
        assert told == list(in_order), "in the order of the index"
        assert {key for key, is_seen in zip(told, seen.is_seen.tolist(), strict=True) if is_seen} == keys
        assert count_pairs(spec, steps) == (len(index), len(keys))
    assert len(keys) == len(index)


def test_the_few_are_all_seen_long_before_the_many(storage: Storage, mixed: Snapshot) -> None:
    spec = spec_of(storage, mixed, "dreambooth", "soft")
    index = load_pairs(spec).index
    assert isinstance(load_pairs(spec).plan, Plan)
    few = sum(size for size, kind in zip(index.bucket_sizes, index.kinds, strict=True) if kind != PRIOR)
    assert few == 6 * 11, "round(61 / 11) visits of each of 8 pairs and 3 good images"
    num_pairs, num_seen = count_pairs(spec, 5)
    assert num_pairs == 72
    assert 11 < num_seen < 40


def test_a_record_says_its_method_and_an_unknown_one_is_named(storage: Storage, mixed: Snapshot) -> None:
    order = {"micro_batch_size": 2, "global_batch_size": 8, "labels": "soft", "seed": 3}
    record = {"round": 2, "step": 4, "snapshot": vars(mixed), "order": order, "method": "kto"}
    known = TrainedRound.of_record(record)
    assert known == TrainedRound(2, mixed, 3, 2, 8, "soft", 4, "kto")
    assert len(seen_pairs(storage, known).keys) == 15
    assert "later" not in METHODS
    with pytest.raises(SnapshotError, match="round 2 was trained with the method later, which is not one of: mapo, "):
        seen_pairs(storage, TrainedRound.of_record(record | {"method": "later"}))
