"""The model card of an exported model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import RunConfig
from orchestration.run.journal import StageRecord
from orchestration.stages.licence import licence_of
from pipelines.dataset.model_fetch import HUB_ID
from pipelines.dataset.model_files import read_family
from pipelines.encode.geometry import bucket_list
from training.config import TrainConfig
from training.methods import METHODS
from training.schedule import MIN_SHARE, average_share, of_average

MAX_BUCKETS = 6  # that are listed


def model_card(
    config: RunConfig,
    trained: StageRecord,
    checkpoint: str,
    rounds: Sequence[Mapping[str, Any]] = (),
    *,
    weights: str | None = None,
    latents: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as Markdown with the hub's front matter: data, settings, numbers, and their origin.

    Args:
        config: The run's configuration; its `train` is used only where the record has no settings.
        trained: The record of the training.
        checkpoint: The exported checkpoint.
        rounds: The rounds from `lineage.json`, from the first on.
        weights: Which of the checkpoint's weights are exported, `raw` or `ema`; as configured by default.
        latents: The parts of the latents' fingerprint; by default the current section `encode`.
    """
    assert config.encode is not None
    train = trained_with(config, trained)
    is_average = weights == "ema" if weights else train.ema is not None and config.export.weights != "raw"
    paper = METHODS[train.method].paper
    method = train.method if paper is None else f"{train.method}, [arXiv {paper}](https://arxiv.org/abs/{paper})"
    model, step = config.encode.model, int(re.findall(r"step-(\d+)", checkpoint)[-1])
    licence = licence_of(config.encode.source)
    return f"""---
{_front_matter(config, train, licence)}---

# {config.name}

`{model}`, aligned with human preferences ({method}).

## Numbers

{_validations(trained.details["history"]["validations"], step, train, is_average=is_average)}
## Lineage

| | |
|---|---|
{_lineage(config, train, trained, checkpoint, step, is_average=is_average)}{_rounds(rounds)}
## Data

| | |
|---|---|
{_data(config, train, latents or {}, licence)}
## Settings

```yaml
{yaml.safe_dump(train.model_dump(mode="json") | {"loss": train.loss_parameters}, sort_keys=False)}```

## Use

```python
{_usage(config, train)}
```
"""


def _front_matter(config: RunConfig, train: TrainConfig, licence: Mapping[str, str]) -> str:
    """Return the metadata at the top, in the hub's own terms."""
    assert config.encode is not None
    model = config.encode.model
    front: dict[str, Any] = {**licence, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["tags"] = ["text-to-image", "mapo", *(["lora"] if train.lora else [])]
    if HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        front |= {"base_model": model, "base_model_relation": "finetune"}  # the hub refuses a folder here
    return str(yaml.safe_dump(front, sort_keys=False))


def trained_with(config: RunConfig, trained: StageRecord) -> TrainConfig:
    """Return the section `train` that the weights were trained with; today's if the record does not say."""
    if "config" in trained.details:
        section = dict(trained.details["config"])
        if section.get("ema"):  # a record of before December 2026 says nothing of a warm-up: there was none
            section["ema"] = {"warmup": False} | section["ema"]
        return TrainConfig.model_validate(section)
    assert config.train is not None
    return config.train


def _validations(validations: list[dict[str, float]], step: int, train: TrainConfig, *, is_average: bool) -> str:
    """Return the validation metrics before, in the middle, at the exported step and at the end of training."""
    if not validations:
        return "No pairs were held out, so nothing was measured.\n"
    average = of_average(validations) if is_average else None
    is_of_this_model = is_average == (average is not None)
    validations = average or validations
    last = len(validations) - 1
    measured = max((i for i, each in enumerate(validations) if each["step"] <= step), default=0)
    lines = ["| step | loss | chosen error | margin | implicit accuracy |", "|---|---|---|---|---|"]
    for i in sorted({0, last // 2, measured, last}):
        each = validations[i]
        numbers = (each["loss"], each["mse_chosen"], each["margin"], each["implicit_accuracy"])
        shown = f"{int(each['step']):,}" + (" (this model)" if i == measured and is_of_this_model else "")
        lines.append(f"| {shown} | {' | '.join(f'{number:.4g}' for number in numbers)} |")
    of = "the trained weights" if average is None else "the moving average of the weights, which is this model"
    if not is_of_this_model:
        of += " themselves; their moving average, which is this model, was not measured"
    return "\n".join(lines) + f"\n\nOver {validations[-1]['num_pairs']:,.0f} held-out pairs. Measured on {of}.\n"


def _weights(train: TrainConfig, step: int, *, is_average: bool) -> str:
    """Describe the model's weights, and for an average how much of the training it contains."""
    if not is_average or train.ema is None:
        return "as trained"
    share = average_share(train, step)
    text = f"the moving average of the trained weights, decay {train.ema.decay}"
    text += f"{', with warm-up' if train.ema.warmup else ''}: it contains about {share:.0%} of the training"
    return text if share >= MIN_SHARE else f"{text}. **The model is mostly its base**"


def _data(config: RunConfig, train: TrainConfig, latents: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """Describe the images, labels and ties of the training, and the licence that it inherits."""
    encode, ingest = config.encode, config.ingest
    assert encode is not None
    buckets = latents.get("buckets") or [list(each) for each in bucket_list(encode.resolution, encode.buckets)]
    sides = ", ".join(f"{height} x {width}" for height, width in buckets[:MAX_BUCKETS])
    rows = {
        "resolution": f"{latents.get('resolution', encode.resolution)} pixels",
        "buckets": f"{len(buckets)}: {sides}{', ...' if len(buckets) > MAX_BUCKETS else ''} (height x width)",
        "latents": f"{latents.get('dtype', encode.dtype)}, from a VAE in {latents.get('vae_dtype', encode.vae_dtype)}",
        "precision": f"{train.precision}, with float32 weights in the optimizer",
        "labels": f"{train.labels}, ties {ingest.ties if ingest else 'as in the data set'}",
        "licence of the base": licence.get("license_name") or licence.get("license") or "not stated in its files",
    }
    return "".join(f"| {name} | {value} |\n" for name, value in _escaped(rows).items())


def _lineage(
    config: RunConfig, train: TrainConfig, trained: StageRecord, checkpoint: str, step: int, *, is_average: bool
) -> str:
    """Trace the weights back to the sources."""
    details, snapshot = trained.details, trained.details["snapshot"]
    rows: dict[str, Any] = {
        "checkpoint": f"`{checkpoint}`: step {step:,} of {details['steps']:,}, {train.global_batch_size:,} pairs each",
        "weights": _weights(train, step, is_average=is_average),
        "pairs trained on": f"digest `{details['digest']}` of their keys, over all steps",
        "data set": f"`{config.storage}`, version {snapshot['pairs_version']} of the table of pairs",
        "latents": f"fingerprint `{snapshot['latents_fingerprint']}`, version {snapshot['latents_version']}",
        "text": f"fingerprint `{snapshot['text_fingerprint']}`, version {snapshot['text_version']}",
        "training": f"key `{trained.key}`, seed {details.get('seed', config.seed)}",
    }
    for number, source in enumerate(config.ingest.sources if config.ingest else (), 1):
        rows[f"source {number} ({source.format})"] = f"`{source.path}`"
    return "".join(f"| {name} | {value} |\n" for name, value in _escaped(rows).items())


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Describe the chain of rounds, if there is more than one."""
    if len(rounds) < 2:
        return ""
    lines = ["", "| round | starts from | table of pairs | steps | finished | key |", "|---|---|---|---|---|---|"]
    for each in rounds:
        if each.get("is_lost"):
            lines.append(f"| {each['round']} | no record | | | | `{each['key']}` |")
            continue
        start = (
            "the base" if each["parent"] is None else f"round {each['parent']['round']}, `{each['parent']['weights']}`"
        )
        numbers = f"version {each['snapshot']['pairs_version']} | {each['step']:,} of {each['steps']:,}"
        lines.append(f"| {each['round']} | {start} | {numbers} | {each['finished_at']} | `{each['key']}` |")
    return "\n".join(lines) + "\n"


def _escaped(rows: dict[str, Any]) -> dict[str, str]:
    """Escape bars, which would end the cell."""
    return {name: str(value).replace("|", r"\|").replace("\n", " ") for name, value in rows.items()}


def _usage(config: RunConfig, train: TrainConfig) -> str:
    assert config.encode is not None
    name = read_family(config.encode.source.folder()).pipeline_class
    if config.export.parts == "unet":
        lines = [
            "from diffusers import UNet2DConditionModel\n",
            'unet = UNet2DConditionModel.from_pretrained("this folder", subfolder="unet")',
        ]
    else:
        lines = [f"from diffusers import {name}\n", f'pipeline = {name}.from_pretrained("this folder")']
    if train.lora:
        lines += [
            "\n# the adapters are merged into this model; to load them on top of the base instead:",
            f"from diffusers import {name}\n",
            f'pipeline = {name}.from_pretrained("{config.encode.model}")',
            'pipeline.load_lora_weights("this folder/lora")',
        ]
    return "\n".join(dict.fromkeys(lines))
