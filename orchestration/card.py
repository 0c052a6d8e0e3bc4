"""The model card of an exported model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import RunConfig
from orchestration.journal import StageRecord
from pipelines.dataset.model_files import HUB_ID, read_family
from training.config import TrainConfig

PAPERS = {
    "mapo": "2406.06424", "mapo_paper": "2406.06424", "dpo": "2311.12908", "ipo": "2310.12036", "simpo": "2405.14734",
    "orpo": "2403.07691",
}  # fmt: skip
"""Method -> where it was published, on arXiv."""


def model_card(
    config: RunConfig, trained: StageRecord, checkpoint: str, rounds: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Markdown with the front matter that the hub knows: data, settings, numbers, and where each comes from.

    Args:
        config: The run's; what it says of training counts only where the record does not.
        trained: The record of its training.
        checkpoint: The one that is exported.
        rounds: From the first one on, as `lineage.json` has them.
    """
    assert config.encode is not None
    train = trained_with(config, trained)
    paper = PAPERS.get(train.method)
    method = train.method if paper is None else f"{train.method}, [arXiv {paper}](https://arxiv.org/abs/{paper})"
    model, step = config.encode.model, int(re.findall(r"step-(\d+)", checkpoint)[-1])
    front: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front["tags"] = ["text-to-image", "mapo", *(["lora"] if train.lora else [])]
    if HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        front["base_model"] = model  # the hub refuses a card that names a folder here
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {config.name}

`{model}`, aligned with human preferences ({method}).

## Numbers

{_validations(trained.details["history"]["validations"], step)}
## Lineage

| | |
|---|---|
{_lineage(config, train, trained, checkpoint, step)}{_rounds(rounds)}
## Settings

```yaml
{yaml.safe_dump(train.model_dump(mode="json"), sort_keys=False)}```

## Use

```python
{_usage(config, train)}
```
"""


def trained_with(config: RunConfig, trained: StageRecord) -> TrainConfig:
    """The section `train` as it was when the weights were trained; that of today if the record does not say."""
    if "config" in trained.details:
        return TrainConfig.model_validate(trained.details["config"])
    assert config.train is not None
    return config.train


def _validations(validations: list[dict[str, float]], step: int) -> str:
    """Held-out numbers before, in the middle, at the exported step and at the end."""
    if not validations:
        return "No pair was held out, so nothing was measured.\n"
    last = len(validations) - 1
    measured = max((i for i, each in enumerate(validations) if each["step"] <= step), default=0)
    lines = ["| step | loss | chosen error | margin | implicit accuracy |", "|---|---|---|---|---|"]
    for i in sorted({0, last // 2, measured, last}):
        each = validations[i]
        numbers = (each["loss"], each["mse_chosen"], each["margin"], each["implicit_accuracy"])
        shown = f"{int(each['step']):,}" + (" (this model)" if i == measured else "")
        lines.append(f"| {shown} | {' | '.join(f'{number:.4g}' for number in numbers)} |")
    return "\n".join(lines) + f"\n\nOver {validations[-1]['num_pairs']:,.0f} pairs of prompts that were held out.\n"


def _lineage(config: RunConfig, train: TrainConfig, trained: StageRecord, checkpoint: str, step: int) -> str:
    """From the weights back to the sources."""
    details, snapshot = trained.details, trained.details["snapshot"]
    is_average = train.ema is not None and config.export.weights != "raw"
    rows: dict[str, Any] = {
        "checkpoint": f"`{checkpoint}`: step {step:,} of {details['steps']:,}, {train.global_batch_size:,} pairs each",
        "weights": f"the moving average of the trained ones, decay {train.ema.decay}"
        if is_average and train.ema
        else "as trained",
        "pairs that were trained on": f"digest `{details['digest']}` of their keys, step by step to the last",
        "data set": f"`{config.storage}`, version {snapshot['pairs_version']} of the table of pairs",
        "latents": f"fingerprint `{snapshot['latents_fingerprint']}`, version {snapshot['latents_version']}",
        "text": f"fingerprint `{snapshot['text_fingerprint']}`, version {snapshot['text_version']}",
        "training": f"key `{trained.key}`, seed {details.get('seed', config.seed)}",
    }
    for number, source in enumerate(config.ingest.sources if config.ingest else (), 1):
        rows[f"source {number} ({source.format})"] = f"`{source.path}`"
    return "".join(f"| {name} | {value} |\n" for name, value in _escaped(rows).items())


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The chain of rounds, if there is more than one."""
    if len(rounds) < 2:
        return ""
    lines = ["", "| round | goes on from | table of pairs | steps | finished | key |", "|---|---|---|---|---|---|"]
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
    """A bar would end the cell."""
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
            "\n# the adapters are merged; to put them on the base instead:",
            f"from diffusers import {name}\n",
            f'pipeline = {name}.from_pretrained("{config.encode.model}")',
            'pipeline.load_lora_weights("this folder/lora")',
        ]
    return "\n".join(dict.fromkeys(lines))
