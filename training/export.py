"""A checkpoint becomes a diffusers model: a whole pipeline, or its UNet alone, with LoRA adapters beside it.

`model/` is what `from_pretrained` loads: adapters are merged into the UNet. `model/lora/` has them by themselves, for
`load_lora_weights` on top of the base.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ModelError, TrainingError
from pipelines.dataset.model_files import MODEL_INDEX, ModelSource, read_family, weight_files
from pipelines.dataset.storage import Storage
from training.checkpoint_format import Reader, committed, read_parameters
from training.config import ExportConfig, LoraConfig
from training.ema import EMA
from training.zero import WEIGHT

UNET, VAE, LORA = "unet", "vae", "lora"
STEM = "diffusion_pytorch_model"


def marker(config: ExportConfig) -> str:
    """The file that is written last: with it the exported folder is complete."""
    return MODEL_INDEX if config.parts == "pipeline" else f"{UNET}/config.json"


def export_model(
    storage: Storage,
    *,
    checkpoint: str,
    source: ModelSource,
    target: str,
    card: str,
    config: ExportConfig | None = None,
    lora: LoraConfig | None = None,
) -> None:
    """Write the base pipeline with the trained UNet to the folder `target` of the storage.

    Everything but the UNet is the base's own files, byte for byte; weights of a variant have plain names here, and a
    separate VAE takes the place of the pipeline's own. The folder is complete once its `marker` is there: it is
    written last, and removed first when an older export is replaced.

    Args:
        storage: Where checkpoint and target lie.
        checkpoint: A training checkpoint's folder.
        source: The base pipeline, as the section `encode` names it.
        target: Where to write.
        card: The model card, Markdown.
        config: What to write; the whole pipeline, of the average if there is one, by default.
        lora: The adapters that were trained; None if it was the whole UNet.

    Raises:
        ModelError: The checkpoint is not there, or lacks what is asked for.
        ShardCorrupt: It is damaged.
        TrainingError: A weight is not finite.
    """
    config = config or ExportConfig()
    weights = read_weights(storage, checkpoint, config.weights)
    base = source.folder()
    with tempfile.TemporaryDirectory(prefix="mapo-export-") as work:
        exported = Path(work) / "model"
        exported.mkdir()
        if config.parts == "pipeline":
            _copy_pipeline(source, base, exported)
        if lora is None:
            _save_unet(base / UNET, source.variant, weights, exported / UNET)
        else:
            _save_lora(base / UNET, source.variant, weights, lora, exported)
        (exported / "README.md").write_text(card)
        last = exported / marker(config)
        apart = Path(work) / "last"
        last.rename(apart)
        for each in (MODEL_INDEX, f"{UNET}/config.json"):
            storage.delete(f"{target}/{each}")
        storage.upload_folder(target, exported)
        storage.upload(f"{target}/{marker(config)}", apart)
        if config.push_to_hub is not None:
            apart.rename(last)
            push(exported, config.push_to_hub)


def _copy_pipeline(source: ModelSource, base: Path, exported: Path) -> None:
    """All of the base but its UNet."""
    unwanted = shutil.ignore_patterns(UNET, "README.md", ".*", "*.bin", "*.ckpt")
    shutil.copytree(base, exported, ignore=unwanted, dirs_exist_ok=True)
    if source.variant is not None:
        _give_plain_names(exported / VAE, STEM, source.variant)
        for part in (*read_family(base).text_encoders, "safety_checker"):
            if (exported / part).is_dir():
                _give_plain_names(exported / part, "model", source.variant)
    if source.vae is not None:
        shutil.rmtree(exported / VAE, ignore_errors=True)
        shutil.copytree(source.vae_folder(), exported / VAE)


def _give_plain_names(part: Path, stem: str, variant: str) -> None:
    """Let the weights of a variant be the only ones of a part, under the names that are read without a variant."""
    kept = {file.name for file in weight_files(part, stem, variant)}
    for file in [*part.glob("*.safetensors"), *part.glob("*.safetensors.index*.json")]:
        if file.name not in kept:
            file.unlink()
    single, index = part / f"{stem}.{variant}.safetensors", part / f"{stem}.safetensors.index.{variant}.json"
    if index.is_file():  # its shards keep their names, which it says
        index.rename(part / f"{stem}.safetensors.index.json")
    else:
        single.rename(part / f"{stem}.safetensors")


def read_weights(storage: Storage, checkpoint: str, wanted: str = "auto") -> dict[str, Any]:
    """The trained parameters of a checkpoint by name, whole, float32 numpy arrays.

    Args:
        storage: Where it is.
        checkpoint: Its folder.
        wanted: `ema`, `raw`, or `auto`: the average if there is one.

    Raises:
        ModelError: There is no such checkpoint, or it has no average.
        ShardCorrupt: It is damaged.
        TrainingError: A weight is not finite.
    """
    import numpy as np

    parent = checkpoint.rpartition("/")[0]
    manifest = next((each for each in committed(storage, parent) if each.folder == checkpoint), None)
    if manifest is None:
        raise ModelError(f"there is no whole checkpoint {storage.uri(checkpoint)}", "train again; was it deleted?")
    reader = Reader(storage, manifest)
    has_average = EMA in reader.kinds()
    if wanted == "ema" and not has_average:
        raise ModelError(f"{checkpoint} has no moving average", "set `export.weights: raw`, or train with `train.ema`")
    kind = EMA if has_average and wanted != "raw" else WEIGHT
    weights = dict(read_parameters(reader, kind))
    if broken := [name for name, weight in weights.items() if not np.isfinite(weight).all()]:
        raise TrainingError(
            f"{len(broken)} of {len(weights)} weights are not finite, {broken[0]} first", "lower `train.learning_rate`"
        )
    return weights


def _save_unet(base: Path, variant: str | None, weights: dict[str, Any], target: Path) -> None:
    """The trained weights in the base UNet's stored type."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base))
    dtype = _stored_dtype(base, variant)
    tensors = {name: torch.from_numpy(weight).to(dtype) for name, weight in weights.items()}
    unet.load_state_dict(tensors, assign=True)
    unet.save_pretrained(target, safe_serialization=True)


def _save_lora(base: Path, variant: str | None, weights: dict[str, Any], lora: LoraConfig, exported: Path) -> None:
    """The adapters by themselves, and the UNet with them merged, in the base UNet's stored type."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    from training.model import add_lora

    unet = UNet2DConditionModel.from_pretrained(base, use_safetensors=True, variant=variant, dtype=torch.float32)
    add_lora(unet, lora, seed=0)
    unknown = unet.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    assert not unknown.unexpected_keys, unknown.unexpected_keys
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = unet.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(
        exported / LORA, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
    )
    unet.fuse_lora()
    unet.unload_lora()
    unet.to(_stored_dtype(base, variant)).save_pretrained(exported / UNET, safe_serialization=True)


def _stored_dtype(part: Path, variant: str | None) -> Any:
    """The type in which a model's weights lie on disk."""
    from safetensors import safe_open

    files = weight_files(part, STEM, variant)
    with safe_open(next(file for file in files if file.suffix == ".safetensors"), "pt") as stored:
        return stored.get_tensor(next(iter(stored.keys()))).dtype


def push(folder: Path, repository: str) -> None:
    """Upload an exported folder to the hub, as a private repository if it is new.

    Raises:
        ModelError: The hub refused it.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="mapo export")
    except Exception as error:  # the hub's tree, httpx's and OSError
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot push to {repository}: {cause[0]}",
            "the model is exported; set HF_TOKEN and run `mapo export` again",
        ) from error
