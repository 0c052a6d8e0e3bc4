"""Export of a checkpoint as a diffusers model: a whole pipeline or its UNet alone, with LoRA adapters next to it.

`model/` is what `from_pretrained` loads: adapters are merged into the UNet. `model/lora/` contains the adapters alone,
for `load_lora_weights` on top of the base.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.dataset.errors import ModelError, ShardCorrupt, TrainingError
from pipelines.dataset.model_fetch import IGNORED
from pipelines.dataset.model_files import MODEL_INDEX, ModelSource, read_config, read_model_index, weight_files
from pipelines.dataset.storage import Storage
from training.config import ExportConfig, LoraConfig
from training.state.checkpoint_format import Reader, list_checkpoints, read_parameters
from training.state.ema import EMA
from training.state.zero import WEIGHT

if TYPE_CHECKING:
    import numpy as np

Weights = dict[str, "np.ndarray[Any, np.dtype[np.float32]]"]
"""Trained parameters by name, each one whole."""
UNET, VAE, LORA = "unet", "vae", "lora"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
STEM = "diffusion_pytorch_model"
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
LOST_HINT = "remove the run's stages/train.json and run `mapo train`, which resumes from the newest complete checkpoint"


def marker(config: ExportConfig) -> str:
    """Return the file that is written last: an exported folder that contains it is complete."""
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
    extra_files: Mapping[str, bytes] | None = None,
    prediction_type: str | None = None,
) -> None:
    """Write the base pipeline with the trained UNet to the folder `target` of the storage.

    Everything except the UNet is copied from the base byte for byte; weights of a variant get plain names here, and a
    separate VAE replaces the pipeline's own. The folder is complete once it contains its `marker`, which is written
    last, and removed first when an older export is replaced. Nothing of the older export stays.

    Args:
        storage: The storage of checkpoint and target.
        checkpoint: A training checkpoint's folder.
        source: The base pipeline, as the section `encode` names it.
        target: The folder to write.
        card: The model card, in Markdown.
        config: The section `export`; by default the whole pipeline, with the average if there is one.
        lora: The adapters that were trained; None if the whole UNet was.
        extra_files: More files for the folder, by name.
        prediction_type: What the UNet predicts, if the base's scheduler file is wrong: that one key is corrected.

    Raises:
        ModelError: The checkpoint is missing, has no average, or is of another UNet; or the hub refused the upload.
        ShardCorrupt: The checkpoint is damaged.
        TrainingError: A weight is not finite.
    """
    config = config or ExportConfig()
    weights = read_weights(storage, checkpoint, config.weights)
    with tempfile.TemporaryDirectory(prefix="mapo-export-") as work:
        exported = Path(work) / "model"
        exported.mkdir()
        if config.parts == "pipeline":
            _copy_pipeline(source, exported)
            correct_schedule(exported / SCHEDULER_FILE, prediction_type)
        _save_unet(source, weights, lora, exported)
        (exported / "README.md").write_text(card)
        for name, data in (extra_files or {}).items():
            (exported / name).write_bytes(data)
        _replace(storage, target, exported, last=marker(config))
        if config.push_to_hub is not None:
            push(exported, config.push_to_hub)


def _replace(storage: Storage, target: str, exported: Path, *, last: str) -> None:
    """Replace the contents of a folder on the storage with the exported files.

    Args:
        storage: The storage.
        target: The folder on it.
        exported: The files, locally.
        last: The file that is written last and removed first.
    """
    for each in (MODEL_INDEX, f"{UNET}/config.json"):
        storage.delete(f"{target}/{each}")
    found = [file for file in sorted(exported.rglob("*")) if file.is_file()]
    files = {f"{target}/{file.relative_to(exported).as_posix()}": file for file in found}
    marked = files.pop(f"{target}/{last}")
    for name, file in files.items():
        storage.upload(name, file)
    for name in storage.names(target):
        if name not in files:
            storage.delete(name)
    storage.upload(f"{target}/{last}", marked)


def read_weights(storage: Storage, checkpoint: str, wanted: str = "auto") -> Weights:
    """Read the trained parameters of a checkpoint: whole float32 numpy arrays by name.

    Args:
        storage: The storage of the checkpoint.
        checkpoint: The checkpoint's folder.
        wanted: `ema`, `raw`, or `auto`: the average if there is one.

    Raises:
        ModelError: There is no such checkpoint, or it has no average.
        ShardCorrupt: The checkpoint is damaged.
        TrainingError: A weight is not finite.
    """
    import numpy as np

    parent = checkpoint.rpartition("/")[0]
    manifest = next((each for each in list_checkpoints(storage, parent) if each.folder == checkpoint), None)
    if manifest is None:
        raise ModelError(f"there is no complete checkpoint {storage.uri(checkpoint)}", LOST_HINT)
    try:
        reader = Reader(storage, manifest)
        has_average = EMA in reader.kinds()
        if wanted == "ema" and not has_average:
            raise ModelError(
                f"{checkpoint} has no moving average", "set `export.weights: raw`, or train with `train.ema`"
            )
        weights = dict(read_parameters(reader, EMA if has_average and wanted != "raw" else WEIGHT))
    except ShardCorrupt as error:
        raise ShardCorrupt(error.message, LOST_HINT) from error
    _check_finite([name for name, weight in weights.items() if not np.isfinite(weight).all()], len(weights))
    return weights


def _check_finite(broken: list[str], total: int, where: str = "") -> None:
    if broken:
        raise TrainingError(
            f"{len(broken)} of {total} weights are not finite{where}, {broken[0]} first", "lower `train.learning_rate`"
        )


def _copy_pipeline(source: ModelSource, exported: Path) -> None:
    """Copy all of the base except its UNet, and only those weights that are loaded."""
    base = source.folder()
    unread = shutil.ignore_patterns(".*", "README.md", "*.safetensors*", *IGNORED, *PICKLES)
    files = {file.name for file in base.iterdir() if file.is_file()}
    for name in files - unread(str(base), list(files)):
        shutil.copyfile(base / name, exported / name)
    for part, kind in read_model_index(base).items():
        is_part = isinstance(kind, list) and kind[0] is not None and (base / part).is_dir()
        if part == VAE and source.vae is not None:
            folder = source.vae_folder()
            (exported / VAE).mkdir()
            for file in (folder / "config.json", *weight_files(folder, STEM)):
                shutil.copyfile(file, exported / VAE / file.name)
        elif is_part and part != UNET:
            _copy_part(base / part, exported / part, source.variant)


def correct_schedule(file: Path, prediction_type: str | None) -> None:
    """Make a scheduler file say what the UNet was trained to predict; a correct file stays byte for byte."""
    config = read_config(file)
    if prediction_type in (None, config.get("prediction_type") or "epsilon"):  # where it is left out it is epsilon
        return
    config["prediction_type"] = prediction_type
    file.write_text(json.dumps(config, indent=2) + "\n")


def _copy_part(part: Path, target: Path, variant: str | None) -> None:
    """Copy a part with its weights under plain names; copy pickles only if there is nothing else."""
    is_safe = any(part.glob("*.safetensors"))
    shutil.copytree(part, target, ignore=shutil.ignore_patterns(".*", *IGNORED, *(PICKLES if is_safe else ())))
    if is_safe:
        stem = STEM if any(part.glob(f"{STEM}*")) else "model"
        of_variant = f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"
        has_variant = any((part / name).is_file() for name in of_variant)  # a safety checker often has none
        _give_plain_names(target, stem, variant if has_variant else None)


def _give_plain_names(part: Path, stem: str, variant: str | None) -> None:
    """Keep only the weights of a variant in a part, under the names that are loaded without a variant."""
    kept = {file.name for file in weight_files(part, stem, variant)}
    for file in [*part.glob("*.safetensors"), *part.glob("*.safetensors.index*.json")]:
        if file.name not in kept:
            file.unlink()
    if variant is None:
        return
    single, index = part / f"{stem}.{variant}.safetensors", part / f"{stem}.safetensors.index.{variant}.json"
    if index.is_file():  # its shards keep their names, which it says
        index.rename(part / f"{stem}.safetensors.index.json")
    else:
        single.rename(part / f"{stem}.safetensors")


def _save_unet(source: ModelSource, weights: Weights, lora: LoraConfig | None, exported: Path) -> None:
    """Save the base's UNet with the trained weights, in the stored type; merge adapters, and save them too.

    Args:
        source: The base pipeline.
        weights: From `read_weights`; emptied on the way to save memory.
        lora: The section `train.lora`, if the weights are adapters.
        exported: The folder of the exported model.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from training.model import add_lora

    base, variant = source.folder() / UNET, source.variant
    stored = _stored_dtype(base, variant)
    dtype = stored if lora is None else torch.float32  # adapters are merged before anything is rounded
    unet = UNet2DConditionModel.from_pretrained(base, use_safetensors=True, variant=variant, dtype=dtype)
    if lora is not None:
        add_lora(unet, lora, seed=0)
    trained = {name: tuple(weight.shape) for name, weight in unet.named_parameters() if weight.requires_grad}
    found = {name: weight.shape for name, weight in weights.items()}
    if others := sorted({name for name, _ in trained.items() ^ found.items()}):
        raise ModelError(
            f"the checkpoint does not fit the UNet of {source.model}: {len(others)} weights differ, {others[0]} first",
            "export with the same `encode.model` and `train.lora` as in training",
        )
    tensors = {name: torch.from_numpy(weights.pop(name)).to(dtype) for name in trained}
    unet.load_state_dict(tensors, strict=False, assign=True)
    if lora is not None:
        _save_adapters(unet, exported / LORA)
        unet.fuse_lora()
        unet.unload_lora()
        torch.nn.Module.to(unet, stored)  # diffusers' own warns of the modules to keep in float32: an empty list
    state = unet.state_dict()
    broken = [name for name, weight in state.items() if not weight.isfinite().all()]
    _check_finite(broken, len(state), f" in {stored}, the type of the base")
    unet.save_pretrained(exported / UNET, safe_serialization=True)
    shutil.copyfile(base / "config.json", exported / UNET / "config.json")  # ours would name this machine's folder


def _save_adapters(unet: Any, folder: Path) -> None:
    """Save the adapters by themselves, float32, with their scale; one file for pipelines of every family.

    Under peft's names: diffusers' conversion knows those of attention alone, and cannot load a mixture of the two.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft.utils import get_peft_model_state_dict

    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def _stored_dtype(part: Path, variant: str | None) -> Any:
    """Return the type of a model's weights on disk."""
    from safetensors import safe_open

    files = weight_files(part, STEM, variant)
    with safe_open(next(file for file in files if file.suffix == ".safetensors"), "pt") as stored:
        return stored.get_tensor(next(iter(stored.keys()))).dtype


def push(folder: Path, repository: str) -> None:
    """Upload an exported folder to the hub, as a private repository if it is new; other weights there are removed.

    Raises:
        ModelError: The hub cannot be reached, or refused the upload.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="mapo export",
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],  # of an older export, in other files
        )
    except Exception as error:  # the hub's tree, httpx's and OSError
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot push to {repository}: {cause[0]}",
            "the model itself is exported; check HF_TOKEN and the network, then run `mapo export` again",
        ) from error
