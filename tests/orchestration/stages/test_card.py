"""What the card of an exported model says is what was measured, of the weights that were exported."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from orchestration.config import RunConfig, parse_config
from orchestration.rounds.series import exported_of
from orchestration.run.context import Run
from orchestration.run.journal import StageRecord
from orchestration.stages.licence import licence_of
from orchestration.stages.model_card import model_card, trained_with
from pipelines.dataset.model_files import ModelSource
from training.schedule import average_share

HUB_LICENCES = {
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "cc-by-nc-4.0", "cc-by-4.0", "other",
    "unknown",
}  # fmt: skip
"""Some of the identifiers that the hub's metadata takes (huggingface.co/docs/hub/repositories-licenses)."""
PIPELINE_TAG, LIBRARY = "text-to-image", "diffusers"


def configuration(base: Path | str, *overrides: str) -> RunConfig:
    settings = {
        "name": "small", "storage": "/storage",
        "ingest": {"sources": [{"format": "pickapic", "path": "/data/*.parquet"}], "ties": "keep"},
        "encode": {"model": str(base), "resolution": 64, "buckets": [[64, 64], [48, 80]]},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 8},
    }  # fmt: skip
    return parse_config(yaml.safe_dump(settings), overrides)


def numbers(loss: float, *, average: float | None = None) -> dict[str, float]:
    measured = {"loss": loss, "mse_chosen": loss / 2, "margin": 0.1, "implicit_accuracy": 1 - loss}
    of_average = {} if average is None else numbers(average)
    return {**measured, **{f"average_{name}": value for name, value in of_average.items()}}


def record(config: RunConfig, *, average: bool = False, **changes: Any) -> StageRecord:
    """Raw weights were best at step 8, their average at step 4."""
    assert config.train is not None
    losses = {0: (0.5, 0.5), 4: (0.4, 0.21), 8: (0.3, 0.25)}
    validations = [
        {"step": step, "num_pairs": 9, **numbers(raw, average=mean if average else None)}
        for step, (raw, mean) in losses.items()
    ]
    details: dict[str, Any] = {
        "checkpoint": "c/step-00000008-a", "best_checkpoint": "c/step-00000008-a",
        "best_average_checkpoint": "c/step-00000004-a", "steps": 8, "digest": "c0ffee", "seed": 0,
        "history": {"steps": [], "validations": validations}, "config": config.train.model_dump(mode="json"),
        "snapshot": {
            "pairs_version": 3, "latents_fingerprint": "a" * 32, "latents_version": 1, "text_fingerprint": "b" * 32,
            "text_version": 2,
        },
    }  # fmt: skip
    return StageRecord("train", "0123", "8 steps", 1.0, "2026-11-30T00:00:00+00:00", details | changes)


def card_of(config: RunConfig, trained: StageRecord, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], str]:
    run = Run.open(config.model_copy(update={"storage": str(tmp_path)}), lambda line: None)
    checkpoint, kind = exported_of(run, trained)
    assert checkpoint is not None
    _, front, body = model_card(config, trained, checkpoint, weights=kind, **options).split("---\n", 2)
    return yaml.safe_load(front), body


def rows(body: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ", 1) for line in body.splitlines() if line.startswith("| ")]
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.mark.parametrize(
    ("overrides", "best_step", "loss", "of"),
    [
        (["train.ema={}"], 4, "0.21", "Measured on the moving average of the weights, which is this model."),
        (["train.ema={}", "export.weights=raw"], 8, "0.3", "Measured on the trained weights."),
        ([], 8, "0.3", "Measured on the trained weights."),
    ],
)
def test_the_numbers_and_the_best_checkpoint_are_of_the_weights_that_are_exported(
    overrides: list[str], best_step: int, loss: str, of: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = configuration(tiny_pipeline, "export.checkpoint=best", *overrides)
    _, body = card_of(config, record(config, average=config.train.ema is not None), tmp_path)  # type: ignore[union-attr]
    assert f"step {best_step} of 8" in rows(body)["checkpoint"]
    assert rows(body)[f"{best_step} (this model)"].startswith(f"{loss} | ")
    assert of in body


def test_an_average_that_was_not_measured_is_said(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A training of before December 2026: its average had no warm-up either, and holds little."""
    config = configuration(tiny_pipeline, "train.ema={decay: 0.9999}")
    old = record(config)
    old.details["config"]["ema"] = {"decay": 0.9999}
    del old.details["best_average_checkpoint"]
    assert trained_with(config, old).ema.warmup is False  # type: ignore[union-attr]
    _, body = card_of(config, old, tmp_path)
    assert "(this model)" not in body
    assert "their moving average, which is this model, was not measured" in body
    assert "it contains about 0% of the training. **The model is mostly its base**" in rows(body)["weights"]


def test_card_and_plan_say_the_same_of_the_average(tiny_pipeline: Path, tmp_path: Path) -> None:
    from orchestration.stages.training_notes import training_notes

    config = configuration(tiny_pipeline, "train.ema={decay: 0.9}")
    assert config.train is not None
    share = f"{average_share(config.train):.0%}"
    _, body = card_of(config, record(config, average=True), tmp_path)
    assert f"it contains about {share} of the training" in rows(body)["weights"]
    assert f"the moving average will contain about {share} of the training" in training_notes(config.train)
    without = configuration(tiny_pipeline, "train.ema={warmup: false}")
    assert without.train is not None
    assert any(note.startswith("warning: an export of that average") for note in training_notes(without.train))


def test_the_card_tells_what_was_trained_on_and_with(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tiny_pipeline, "train.precision=bf16")
    latents = {"resolution": 96, "buckets": [[96, 96]], "dtype": "float32", "vae_dtype": "tf32"}
    _, body = card_of(config, record(config), tmp_path)
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert settings["loss"] == {"beta": 8.0}, "the parameters that were used, not the ones that were written"
    assert settings["learning_rate"] == 1e-7
    found = rows(body)
    assert found["resolution"] == "64 pixels"
    assert found["buckets"] == "2: 48 x 80, 64 x 64 (height x width)"
    assert found["latents"] == "float16, from a VAE in float32"
    assert found["precision"].startswith("bf16")
    assert found["labels"] == "soft, ties keep"
    assert found["licence of the base"] == "not stated in its files"
    _, body = card_of(config, record(config), tmp_path, latents=latents)
    assert rows(body)["resolution"] == "96 pixels"
    assert rows(body)["latents"] == "float32, from a VAE in tf32"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: openrail++\n---\n# SDXL\n", {"license": "openrail++"}),
        (
            "---\nlicense: other\nlicense_name: stabilityai\nlicense_link: https://example.org/l\n---\n",
            {"license": "other", "license_name": "stabilityai", "license_link": "https://example.org/l"},
        ),
        ("---\nlicense: other\n---\n", {}),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("# no front matter\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_what_the_base_states(
    card: str | None, expected: dict[str, str], tiny_pipeline: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    if card is not None:
        (base / "README.md").write_text(card)
    assert licence_of(ModelSource(str(base))) == expected
    config = configuration(base)
    front, body = card_of(config, record(config), tmp_path)
    assert {key: front[key] for key in expected} == expected
    assert ("license" in front) == bool(expected)
    assert rows(body)["licence of the base"] == expected.get(
        "license_name", expected.get("license", "not stated in its files")
    )


def test_the_metadata_is_what_the_hub_takes(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "folder", lambda self: tiny_pipeline)
    config = configuration("stabilityai/stable-diffusion-xl-base-1.0", "train.lora={rank: 4}")
    trained = record(config)
    card = ModelCard(model_card(config, trained, trained.details["checkpoint"]))
    front = card.data.to_dict()
    assert set(front) == {
        "license", "library_name", "pipeline_tag", "tags", "base_model", "base_model_relation",
    }  # fmt: skip
    assert front["license"] in HUB_LICENCES
    assert (front["library_name"], front["pipeline_tag"]) == (LIBRARY, PIPELINE_TAG)
    assert all(isinstance(tag, str) for tag in front["tags"])
    validate_repo_id(front["base_model"])
    assert front["base_model_relation"] in {"adapter", "merge", "quantized", "finetune"}
