"""The stages after training, without training: which checkpoint is exported, what is said of it, what samples it."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import trained_adapters, trained_weights, write_checkpoint
from diffusers import UNet2DConditionModel
from factories import new_pipeline
from sampled import draw_here
from torch import Tensor

from orchestration.config import RunConfig, parse_config
from orchestration.driver.runner import run_stages
from orchestration.driver.status import describe_run
from orchestration.run.context import Run
from orchestration.stages import train as train_stage
from orchestration.stages.judged_models import judged_models
from orchestration.stages.model_card import model_card
from orchestration.stages.registry import STAGES
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.model_files import ModelSource
from training.config import LoraConfig
from training.spec import base_digest

SNAPSHOT = {
    "pairs_version": 3, "latents_fingerprint": "a" * 32, "latents_version": 1, "text_fingerprint": "b" * 32,
    "text_version": 2,
}  # fmt: skip
CHECKPOINTS = "runs/small/checkpoints/0123"


@functools.cache
def weights_of(seed: int) -> dict[str, Tensor]:
    return trained_weights(new_pipeline(seed=seed))


def validation(step: int, accuracy: float) -> dict[str, float]:
    return {"step": step, "loss": 1.0, "mse_chosen": 0.5, "margin": 0.1, "implicit_accuracy": accuracy, "num_pairs": 9}


def configuration(storage: Path, base: Path, *overrides: str) -> RunConfig:
    settings = {
        "name": "small",
        "storage": str(storage),
        "ingest": {"sources": [{"format": "pickapic", "path": "/data/a|b/*.parquet"}]},
        "encode": {"model": str(base), "resolution": 64},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 8},
        "evaluate": {"num_inference_steps": 2, "batch_size": 2},
    }
    return parse_config(yaml.safe_dump(settings), overrides)


def train(config: RunConfig, *, average: bool = False, adapters: bool = False) -> dict[str, Any]:
    """What a training leaves behind: step 4 is the best, step 8 the last. Gives the details of its record."""
    run = Run.open(config, lambda line: None)
    assert config.train is not None
    assert config.encode is not None
    folders = {}
    for step, seed, loss in ((4, 5, 0.1), (8, 6, 0.2)):
        weights = trained_adapters(new_pipeline(), LoraConfig(rank=4), seed=seed) if adapters else weights_of(seed)
        options: dict[str, Any] = {"average": weights_of(seed + 10)} if average else {}
        folders[step] = write_checkpoint(run.storage, CHECKPOINTS, step, weights, validation_loss=loss, **options)
    details = {
        "checkpoint": folders[8], "best_checkpoint": folders[4], "steps": 8, "digest": "c0ffee", "starts": 1,
        "history": {"steps": [], "validations": [validation(0, 0.5), validation(4, 0.9), validation(8, 0.8)]},
        "workers": [], "snapshot": SNAPSHOT, "seed": 0, "base_digest": base_digest(config.encode.source),
        "config": config.train.model_dump(mode="json"),
    }  # fmt: skip
    run.journal.finish("train", key="0123", summary="8 steps", seconds=1, details=details)
    return details


def exported(config: RunConfig) -> Path:
    said: list[str] = []
    run_stages(config, ["export"], said.append)
    assert said[-1].split()[0] == "export"
    return Path(config.storage) / "runs" / "small" / "model"


def unet_of(model: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = UNet2DConditionModel.from_pretrained(model, subfolder="unet").state_dict()
    return state


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def card_of(model: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (model / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_last_or_the_best_checkpoint_is_exported_and_the_card_says_which(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    last = configuration(tmp_path, tiny_pipeline, "export.parts=unet")
    train(last)
    model = exported(last)
    assert same(unet_of(model), weights_of(6))
    assert "step 8 of 8, 8 pairs each" in card_of(model)[1]
    best = configuration(tmp_path, tiny_pipeline, "export.parts=unet", "export.checkpoint=best")
    assert {each.stage: each.state for each in describe_run(best).stages}["export"] == "stale"
    assert same(unet_of(exported(best)), weights_of(5))
    body = card_of(model)[1]
    assert "step 4 of 8, 8 pairs each" in body
    assert "| 4 (this model) | 1 | 0.5 | 0.1 | 0.9 |" in body
    assert {each.stage: each.state for each in describe_run(best).stages}["export"] == "up to date"


def test_the_card_leads_from_the_weights_to_the_sources(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline, "train.ema={decay: 0.9}", "train.learning_rate=0.25")
    train(config, average=True)
    later = configuration(tmp_path, tiny_pipeline, "train.learning_rate=0.75", "export.parts=unet")
    front, body = card_of(exported(later))
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "mapo"],
    }, "a folder of this machine is no base model that the hub knows"
    lines = body.split("| | |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    table = dict(line.strip("| ").split(" | ") for line in lines)
    weights = (
        "the moving average of the trained weights, decay 0.9, with warm-up: it contains about 98% of the training"
    )
    assert table["weights"] == weights
    assert "digest `c0ffee`" in table["pairs trained on"]
    assert table["data set"] == f"`{tmp_path}`, version 3 of the table of pairs"
    assert table["latents"] == f"fingerprint `{'a' * 32}`, version 1"
    assert table["text"] == f"fingerprint `{'b' * 32}`, version 2"
    assert table["training"] == "key `0123`, seed 0"
    assert table["source 1 (pickapic)"] == r"`/data/a\|b/*.parquet`"
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert "[arXiv 2406.06424](https://arxiv.org/abs/2406.06424)" in body
    assert settings["learning_rate"] == 0.25, "as it was trained, not as the configuration is now"


def test_a_base_of_the_hub_is_named_for_the_hub(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, tiny_pipeline, "train.lora={rank: 4}")
    details = train(config, adapters=True)
    record = Run.open(config, lambda line: None).journal.record("train")
    assert record is not None
    monkeypatch.setattr(ModelSource, "folder", lambda self: tiny_pipeline)
    of_hub = configuration(tmp_path, Path("some/model"), "train.lora={rank: 4}")
    _, front, body = model_card(of_hub, record, details["checkpoint"]).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "some/model"
    assert yaml.safe_load(front)["tags"] == ["text-to-image", "mapo", "lora"]
    usage = body.split("```python\n")[1].split("```")[0]
    compile(usage, "card", "exec")
    assert 'from_pretrained("some/model")' in usage
    assert "load_lora_weights" in usage


def test_the_usage_on_the_card_works(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Of adapters beside a UNet alone, the longest one."""
    config = configuration(tmp_path, tiny_pipeline, "train.lora={rank: 4}", "export.parts=unet")
    train(config, adapters=True)
    model = exported(config)
    usage = card_of(model)[1].split("```python\n")[1].split("```")[0].replace("this folder", str(model))
    made: dict[str, Any] = {}
    exec(usage, made)
    inputs = {
        "sample": torch.ones(1, 4, 16, 16), "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.ones(1, 77, 40),
        "added_cond_kwargs": {"text_embeds": torch.ones(1, 24), "time_ids": torch.full((1, 6), 64.0)},
    }  # fmt: skip
    with torch.no_grad():
        merged, on_base = (unet(**inputs).sample for unet in (made["unet"], made["pipeline"].unet))
    torch.testing.assert_close(merged, on_base, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler, of numpy 2
def test_a_unet_alone_is_sampled_as_the_whole_pipeline_is_and_unlike_the_base(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    whole = configuration(tmp_path, tiny_pipeline)
    alone = configuration(tmp_path, tiny_pipeline, "export.parts=unet")
    train(whole)
    prompts, seeds = ["a cat", "a red house"], [0, 1]
    samples = {}
    for config in (whole, alone):
        exported(config)
        run = Run.open(config, lambda line: None)
        base, aligned = judged_models(run, *(run.journal.record(stage) for stage in ("train", "export")))
        samples[config.export.parts] = draw_here(aligned.drawn, prompts, seeds)
    assert not (tmp_path / "runs" / "small" / "model" / "model_index.json").exists()
    assert samples["pipeline"] == samples["unet"]
    of_base = draw_here(base.drawn, prompts, seeds)
    assert all(one != other for one, other in zip(of_base, samples["unet"], strict=True))


def test_where_it_is_pushed_to_makes_the_export_stale_and_not_the_samples(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline, "export.parts=unet")
    train(config)
    exported(config)
    keys = [
        [STAGES[name].look(Run.open(each, lambda line: None)).key for name in ("export", "evaluate")]
        for each in (config, configuration(tmp_path, tiny_pipeline, "export.parts=unet", "export.push_to_hub=me/it"))
    ]
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]


def test_weights_of_another_base_are_not_put_into_this_one(tiny_pipeline: Path, tmp_path: Path) -> None:
    train(configuration(tmp_path / "storage", tiny_pipeline))
    other = tmp_path / "other"
    new_pipeline(seed=9).save_pretrained(other)
    with pytest.raises(ConfigError, match="is not the base that the weights were trained from") as caught:
        exported(configuration(tmp_path / "storage", other))
    assert caught.value.hint
    assert not (tmp_path / "storage" / "runs" / "small" / "model").exists()


def test_adapters_are_exported_as_they_were_trained_whatever_the_configuration_says_now(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    train(configuration(tmp_path, tiny_pipeline, "train.lora={rank: 4}"), adapters=True)
    model = exported(configuration(tmp_path, tiny_pipeline, "train.lora={rank: 8, alpha: 2}", "export.parts=unet"))
    assert (model / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert "rank: 4" in card_of(model)[1]


def test_an_exported_pipeline_says_what_it_was_trained_to_predict(tiny_pipeline: Path, tmp_path: Path) -> None:
    told = configuration(tmp_path, tiny_pipeline, "train.prediction_type=v_prediction")
    train(told)
    model = exported(configuration(tmp_path, tiny_pipeline))  # whatever the configuration says now
    written = json.loads((model / "scheduler/scheduler_config.json").read_text())
    base = json.loads((tiny_pipeline / "scheduler/scheduler_config.json").read_text())
    assert base["prediction_type"] == "epsilon"
    assert written == base | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["export.weights=ema"], "training keeps no average", "train.ema"),
        (["export.checkpoint=best", "train.keep_best=false"], "train.keep_best is false", "train.keep_best"),
        (["export.push_to_hub=me/it"], "which needs HF_TOKEN and no HF_HUB_OFFLINE", "mapo export"),
    ],
)
def test_an_export_that_can_never_be_is_refused_before_training(
    overrides: list[str], message: str, hint: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = configuration(tmp_path, tiny_pipeline, *overrides)
    with pytest.raises(ConfigError, match=message) as caught:
        train_stage.check(Run.open(config, print))
    assert hint in str(caught.value.hint)
    train_stage.check(Run.open(configuration(tmp_path, tiny_pipeline), print))


def test_a_lost_checkpoint_is_one_error_and_a_record_of_old_is_none(tiny_pipeline: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path, tiny_pipeline)
    details = train(config)
    (tmp_path / details["checkpoint"] / "manifest.json").unlink()
    with pytest.raises(ModelError, match="there is no complete checkpoint"):
        exported(config)
    run = Run.open(config, lambda line: None)
    run.journal.finish("train", key="0123", summary="", seconds=1, details={"checkpoint": "checkpoint_000001"})
    best = configuration(tmp_path, tiny_pipeline, "export.checkpoint=best")
    assert STAGES["export"].look(Run.open(best, lambda line: None)).key is None


def test_a_hub_that_cannot_be_reached_is_one_error_and_the_model_is_there(tiny_pipeline: Path, tmp_path: Path) -> None:
    """As a user meets it: the installed command, and nobody who answers."""
    overrides = ["export.push_to_hub=me/aligned"]
    config = configuration(tmp_path / "storage", tiny_pipeline, *overrides)
    train(config)
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [str(Path(sys.executable).with_name("mapo")), "export", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("ModelError: cannot push to me/aligned: "), done.stderr
    assert done.stderr.count("hint: ") == 1
    assert len(done.stderr.splitlines()) == 2
    model = tmp_path / "storage" / "runs" / "small" / "model"
    assert (model / "model_index.json").is_file()
    assert same(unet_of(model), weights_of(6))
    assert {each.stage: each.state for each in describe_run(config).stages}["export"] == "to do"
