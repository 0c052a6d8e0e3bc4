"""Keys, fingerprints and unit ids that existing storages hold: `recorded_keys.json` was written by the version of
2026-11-27, before `learning_rate` had a default for each method and 16-bit weights a float32 start.

A key that is added to a section later leaves every one of them as it was while it has its default. Add a case for a new
kind of key, and never change a recorded value: whoever owns such a storage would train, encode or draw again.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "recorded_keys.json"
MODEL = Path(__file__).parents[2] / "orchestration" / "demo" / "base_model"

TRAIN: dict[str, dict[str, Any]] = {
    "defaults": {},
    "demo": {
        "loss": {"beta": 8}, "num_workers": 2, "global_batch_size": 32, "micro_batch_size": 8, "max_steps": 500,
        "learning_rate": 1e-4, "warmup_steps": 10, "precision": "fp32", "prompt_dropout": 0.15,
    },
    "fp32": {"precision": "fp32"},
    "fp16 with a rate": {"precision": "fp16", "learning_rate": 2e-6},
    "lora": {"lora": {"rank": 64}},
    "lora with a rate": {"lora": {"rank": 64, "alpha": 32}, "learning_rate": 5e-5},
    "dpo": {"method": "dpo"},
    "dpo in fp32 with a rate": {"method": "dpo", "loss": {"beta": 2000}, "precision": "fp32", "learning_rate": 1e-6},
    "ema in fp32": {"ema": {}, "precision": "fp32"},
    "ema of adapters": {"ema": {"decay": 0.99}, "lora": {"rank": 8}, "learning_rate": 1e-4},
    "every other key": {
        "method": "mapo", "loss": {"beta": 0.2, "snr": 0.4}, "labels": "hard", "lr_schedule": "linear",
        "warmup_steps": 7, "optimizer": "adamw_8bit", "weight_decay": 0.1, "max_grad_norm": 2.0, "precision": "fp32",
        "zero_stage": 3, "gradient_checkpointing": "resnets", "attention": "math", "channels_last": False,
        "checkpoint_every": 3, "validate_every": 5, "sample_every": 9, "max_failures": 0, "learning_rate": 3e-6,
        "trouble": {"window": 5}, "trackers": [], "environment": {"A": "b"}, "rounds": "continue",
    },
}  # fmt: skip
"""Sections `train`, by what they are about."""

ENCODE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "demo": {"resolution": 64, "buckets": False, "dtype": "float16", "batch_size": 16},
    "every other key": {
        "resolution": 512, "buckets": [[512, 512], [384, 640]], "dtype": "float32", "vae_dtype": "tf32",
        "num_workers": "1..2", "device": "cpu", "max_drop_ratio": 0.5,
    },
}  # fmt: skip
"""Sections `encode` without their model."""

EVALUATE: dict[str, dict[str, Any]] = {
    "defaults": {},
    "every key": {
        "num_samples": 2, "num_inference_steps": 3, "guidance_scale": 1.0, "batch_size": 1, "scorers": ["a:B"],
    },
}  # fmt: skip


RUN = (
    "{name: n, storage: s, ingest: {sources: [{format: pickapic, path: p}]}, encode: {model: m}, "
    "train: {ema: {decay: 0.9}}}"
)
"""A whole configuration, which the key of a report has in it."""


def train_keys() -> dict[str, str]:
    """The key of each training on one snapshot of one base, from the base and from a parent."""
    from training.config import TrainConfig
    from training.spec import Parent, Snapshot, TrainSpec

    snapshot = Snapshot(3, "a" * 32, 4, "b" * 32, 5)
    parent = Parent(1, "c" * 16, "runs/r/checkpoints/c/step-1", "d" * 64, "raw", "e" * 16, None)
    found = {}
    for name, section in TRAIN.items():
        config = TrainConfig.model_validate(section)
        spec = TrainSpec("/storage", "run", None, "e" * 16, 7, config, snapshot)  # type: ignore[arg-type]
        found[name] = spec.key
        of_round = TrainSpec("/storage", "run", None, "e" * 16, 7, config, snapshot, 2, parent)  # type: ignore[arg-type]
        found[f"{name}, round 2"] = of_round.key
    return found


def fingerprints() -> dict[str, list[str]]:
    """Both fingerprints of the shipped base model under each section `encode`."""
    from pipelines.config import EncodeConfig
    from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint

    configs = {name: EncodeConfig.model_validate(section | {"model": str(MODEL)}) for name, section in ENCODE.items()}
    return {name: [latents_fingerprint(config), text_fingerprint(config)] for name, config in configs.items()}


def digests() -> dict[str, str]:
    """The base digest of the shipped model, and what export and evaluate make of their sections."""
    from orchestration.config import comparable, parse_config
    from orchestration.stages.evaluate import settings_before
    from orchestration.stages.stage import digest
    from pipelines.config import EvaluateConfig
    from pipelines.dataset.model_files import ModelSource
    from training.config import ExportConfig
    from training.spec import base_digest

    found = {"base": base_digest(ModelSource(str(MODEL)))}
    found["report"] = digest(comparable(parse_config(RUN)))
    found["export"] = digest(ExportConfig().model_dump(exclude={"push_to_hub"}))
    for name, section in EVALUATE.items():
        found[f"evaluate, {name}"] = digest(settings_before(EvaluateConfig.model_validate(section)))
    return found


def record() -> dict[str, Any]:
    """All of them, as this version computes them."""
    return {"train": train_keys(), "fingerprints": fingerprints(), "digests": digests()}


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
