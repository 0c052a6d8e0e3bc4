"""Storages of versions before go on working: their keys, fingerprints and digests are computed as they were."""

import json
from dataclasses import replace

import recorded

from training.config import TrainConfig
from training.spec import Parent, Snapshot, TrainSpec

RECORDED = json.loads(recorded.FILE.read_text())
CHANGED = {
    "defaults", "fp16 with a rate", "lora", "lora, round 2", "dpo", "dpo, round 2", "ema in fp32",
    "ema in fp32, round 2", "ema of adapters", "ema of adapters, round 2",
}  # fmt: skip
"""What trains otherwise since December 2026: 16-bit weights from the base, averages, and the default rates of adapters
and of dpo."""


def specs() -> dict[str, TrainSpec]:
    snapshot = Snapshot(3, "a" * 32, 4, "b" * 32, 5)
    parent = Parent(1, "c" * 16, "runs/r/checkpoints/c/step-1", "d" * 64, "raw", "e" * 16, None)
    found = {}
    for name, section in recorded.TRAIN.items():
        of_base: tuple = ("/storage", "run", None, "e" * 16, 7, TrainConfig.model_validate(section), snapshot)
        found |= {name: TrainSpec(*of_base), f"{name}, round 2": TrainSpec(*of_base, 2, parent)}
    return found


def test_fingerprints_and_digests_are_those_of_before() -> None:
    assert recorded.fingerprints() == RECORDED["fingerprints"]
    assert recorded.digests() == RECORDED["digests"]


def test_a_training_has_the_key_of_before_unless_its_arithmetic_changed() -> None:
    keys = {name: spec.key for name, spec in specs().items()}
    assert keys == recorded.train_keys()
    assert {name for name, key in keys.items() if key != RECORDED["train"][name]} == CHANGED


def test_every_training_of_before_is_found_under_its_key_with_its_settings() -> None:
    for name, spec in specs().items():
        before = spec.as_legacy()
        assert before.key == RECORDED["train"][name], name
        assert not before.starts_from_float32
        assert before.config.ema is None or not before.config.ema.warmup
        given = recorded.TRAIN[name.removesuffix(", round 2")].get("learning_rate", 1e-7)
        assert before.config.learning_rate == given


def test_a_key_that_is_added_later_changes_no_key_at_its_default() -> None:
    """Written out or left out, defaults are one training; anything else is another."""
    spec = specs()["fp32"]
    for name, other in (("null_prompt", "empty"), ("flips", "pair"), ("prediction_type", "v_prediction")):
        default = TrainConfig.model_fields[name].default
        for value, is_same in ((default, True), (other, False)):
            config = TrainConfig.model_validate({"precision": "fp32", name: value})
            changed = TrainSpec("/storage", "run", None, "e" * 16, 7, config, spec.snapshot)  # type: ignore[arg-type]
            assert (changed.key == spec.key) is is_same, name
    assert replace(changed, is_prediction_type_stated=True).key == spec.key, "the scheduler file says the same"
