"""The model card of an exported model."""

import yaml

from orchestration.config import RunConfig
from orchestration.journal import StageRecord


def model_card(config: RunConfig, trained: StageRecord) -> str:
    """Markdown with the front matter that the hub knows: data, settings, numbers."""
    assert config.encode is not None
    assert config.train is not None
    validations = trained.details["history"]["validations"]
    accuracy = [f"{v['implicit_accuracy']:.3f} at step {int(v['step'])}" for v in validations[:1] + validations[-1:]]
    settings = yaml.safe_dump(config.train.model_dump(mode="json"), sort_keys=False)
    front = yaml.safe_dump(
        {"library_name": "diffusers", "base_model": config.encode.model, "tags": ["text-to-image", "mapo"]}
    )
    return f"""---
{front}---

# {config.name}

`{config.encode.model}`, aligned with preferences by MaPO ({config.train.method}, arXiv 2406.06424).

- Data: `{config.storage}`, version {trained.details["snapshot"]["pairs_version"]} of the table of pairs.
- Steps: {trained.details["steps"]:,} with a global batch of {config.train.global_batch_size:,} pairs.
- Held-out implicit accuracy: {", ".join(accuracy) or "not measured (no pair was held out)"}.
- Checkpoint: `{trained.details["checkpoint"]}`.

```yaml
{settings}```

```python
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("this folder")
```
"""
