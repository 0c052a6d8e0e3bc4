"""The model card of an exported model."""

from typing import Any

import yaml

from orchestration.config import RunConfig
from orchestration.journal import StageRecord
from pipelines.dataset.model_files import read_family

PAPER = "https://arxiv.org/abs/2406.06424"


def model_card(config: RunConfig, trained: StageRecord, checkpoint: str) -> str:
    """Markdown with the front matter that the hub knows: data, settings, numbers, and where each comes from.

    Args:
        config: The run's.
        trained: The record of its training.
        checkpoint: The one that is exported.
    """
    assert config.encode is not None
    assert config.train is not None
    settings = yaml.safe_dump(config.train.model_dump(mode="json"), sort_keys=False)
    tags = ["text-to-image", "mapo", *(["lora"] if config.train.lora else [])]
    front = yaml.safe_dump({"library_name": "diffusers", "base_model": config.encode.model, "tags": tags})
    return f"""---
{front}---

# {config.name}

`{config.encode.model}`, aligned with human preferences ({config.train.method}; MaPO, [arXiv 2406.06424]({PAPER})).

## Numbers

{_validations(trained.details["history"]["validations"])}
## Lineage

| | |
|---|---|
{_lineage(config, trained, checkpoint)}
## Settings

```yaml
{settings}```

## Use

```python
{_usage(config)}
```
"""


def _validations(validations: list[dict[str, float]]) -> str:
    """Held-out numbers before, in the middle and after."""
    if not validations:
        return "No pair was held out, so nothing was measured.\n"
    shown = sorted({0, len(validations) // 2, len(validations) - 1})
    lines = ["| step | loss | chosen error | margin | implicit accuracy |", "|---|---|---|---|---|"]
    for each in (validations[i] for i in shown):
        numbers = (each["loss"], each["mse_chosen"], each["margin"], each["implicit_accuracy"])
        lines.append(f"| {int(each['step']):,} | {' | '.join(f'{number:.4g}' for number in numbers)} |")
    return "\n".join(lines) + f"\n\nOver {validations[-1]['num_pairs']:,.0f} pairs of prompts that were held out.\n"


def _lineage(config: RunConfig, trained: StageRecord, checkpoint: str) -> str:
    """From the weights back to the sources."""
    assert config.train is not None
    details, snapshot = trained.details, trained.details["snapshot"]
    rows: dict[str, Any] = {
        "checkpoint": f"`{checkpoint}` of {details['steps']:,} steps, {config.train.global_batch_size:,} pairs each",
        "pairs that were trained on": f"digest `{details['digest']}` of their keys, step by step",
        "data set": f"`{config.storage}`, version {snapshot['pairs_version']} of the table of pairs",
        "latents": f"fingerprint `{snapshot['latents_fingerprint']}`, version {snapshot['latents_version']}",
        "text": f"fingerprint `{snapshot['text_fingerprint']}`, version {snapshot['text_version']}",
        "training": f"key `{trained.key}`, seed {config.seed}",
    }
    for source in config.ingest.sources if config.ingest else ():
        rows[f"source ({source.format})"] = f"`{source.path}`"
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items()) + "\n"


def _usage(config: RunConfig) -> str:
    assert config.encode is not None
    if config.export.parts == "unet":
        return (
            "from diffusers import UNet2DConditionModel\n\n"
            'unet = UNet2DConditionModel.from_pretrained("this folder", subfolder="unet")'
        )
    name = read_family(config.encode.source.folder()).pipeline_class
    return f'from diffusers import {name}\n\npipeline = {name}.from_pretrained("this folder")'
