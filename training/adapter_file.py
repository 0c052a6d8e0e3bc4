"""The file of adapters that a training starts from: checked, identified by its bytes, and kept on the storage.

Light: needs neither ray, torch nor diffusers. `training.adapter_start` loads the weights.
"""

import json
import re
from collections import Counter

from pipelines.dataset.adapter_files import find_adapter
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.safetensors_header import tensor_shapes
from pipelines.dataset.storage import Storage, file_sha256
from training.config import LoraConfig
from training.spec import TrainSpec, adapter_file

DOWN = re.compile(r"(.+?)[._](?:lora_A|lora_down|lora\.down)\.weight")
"""The first matrix of an adapter and its layer, in the forms that diffusers reads: peft's, kohya's, its own."""
UP = re.compile(r"(.+?)[._](?:lora_B|lora_up|lora\.up)\.weight")
ALPHA = re.compile(r"(lora_unet_.+)\.alpha")
TEXT_ENCODERS = re.compile(r"lora_te\d?_|text_encoder")
OF_UNET = re.compile(r"lora_unet_|unet\.")
OTHER_NETWORKS = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": (".hada_",),
    "LoKr": (".lokr_",),
    "OFT": (".oft_", ".boft_"),
    "GLoRA": (".a1.weight", ".b1.weight"),
    "LoCon with a Tucker core": (".lora_mid.",),
    "full weight differences": (".diff", ".diff_b"),
    "LoRA with biases": (".lora_B.bias", ".lora_up.bias"),
}
"""Kinds of adapters that training does not continue -> what their tensors have in their names."""
HINT = "continue from plain LoRA adapters of the UNet's linear layers, as diffusers, peft or kohya's scripts save them"


def pinned_digest(storage: Storage, folder: str, lora: LoraConfig | None) -> str | None:
    """Return the sha256 of the file `train.lora.weights`; None if there is none.

    If the file is gone, the run's own copy of it counts, so that a begun training can be resumed.

    Args:
        storage: The run's storage.
        folder: The run's folder on it.
        lora: The section `train.lora`.

    Raises:
        ModelError: The file is missing and was never used by this run, or contains something else than adapters.
        ConfigError: Its ranks differ from `train.lora.rank`.
    """
    if lora is None or lora.weights is None:
        return None
    try:
        file = find_adapter(lora.weights)
    except ModelError:
        digest = _recorded(storage, folder).get(lora.weights)
        if digest is None or not storage.exists(adapter_file(folder, digest)):
            raise
        return digest
    check_adapter(tensor_shapes([file]), lora)
    return file_sha256(file)


def keep_adapter(spec: TrainSpec) -> None:
    """Copy the file to the storage, where every worker reads it, unless it is there already.

    Raises:
        ModelError: The file changed since the training was pinned.
    """
    lora, digest = spec.config.lora, spec.adapter_digest
    if digest is None or lora is None or lora.weights is None:
        return
    storage, kept = spec.storage, adapter_file(spec.folder, digest)
    if not storage.exists(kept):
        file = find_adapter(lora.weights)
        if file_sha256(file) != digest:
            raise ModelError(f"the adapters {lora.weights} have just changed", "run the command again")
        storage.upload(kept, file)
    recorded = _recorded(storage, spec.folder)
    if recorded.get(lora.weights) != digest:
        storage.write(_record(spec.folder), json.dumps(recorded | {lora.weights: digest}).encode())


def _record(folder: str) -> str:
    return f"{folder}/adapters/index.json"


def _recorded(storage: Storage, folder: str) -> dict[str, str]:
    """Return the digests of the files that the run has used, by their places."""
    found: dict[str, str] = json.loads(storage.read_if_there(_record(folder)) or b"{}")
    return found


def check_adapter(shapes: dict[str, tuple[int, ...]], lora: LoraConfig) -> None:
    """Check from the header of a file that it has plain adapters of the UNet alone, of the configured rank.

    Args:
        shapes: The shape of every tensor, by name.
        lora: The section `train.lora`, with `weights`.

    Raises:
        ModelError: It has adapters of another kind, of text encoders or of convolutions, or tensors of no adapter.
        ConfigError: A rank differs.
    """
    about = f"train.lora.weights {lora.weights}"
    _check_kind(about, shapes)
    layers = {match[1]: shape for name, shape in shapes.items() if (match := DOWN.fullmatch(name))}
    known = {match[1] for name in shapes if (match := UP.fullmatch(name))}
    strange = [name for name in shapes if not _is_of_adapter(name)] or sorted(known ^ layers.keys())
    if strange or not layers:
        what = _some(strange) if strange else "it is empty"
        raise ModelError(f"{about} is not a file of LoRA adapters: {what}", HINT)
    _check_ranks(about, {layer: shape[0] for layer, shape in layers.items()}, lora.rank)


def _check_kind(about: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse by its name what peft, kohya's scripts and LyCORIS save besides plain adapters of linear layers."""
    for kind, marks in OTHER_NETWORKS.items():
        if found := [name for name in shapes if any(mark in name for mark in marks)]:
            raise ModelError(f"{about} has {kind}: {_some(found)}", HINT)
    if found := [name for name in shapes if TEXT_ENCODERS.match(name)]:
        raise ModelError(
            f"{about} also has adapters of text encoders, which training does not load: {_some(found)}",
            "save the adapters of the UNet alone: the prompts were encoded without those of the text encoders",
        )
    if found := [name for name, shape in shapes.items() if len(shape) > 2]:
        raise ModelError(f"{about} has adapters of convolutions (LoCon): {_some(found)}", HINT)


def _is_of_adapter(name: str) -> bool:
    return bool(OF_UNET.match(name)) and any(form.fullmatch(name) for form in (DOWN, UP, ALPHA))


def _check_ranks(about: str, ranks: dict[str, int], rank: int) -> None:
    others = [layer for layer, found in ranks.items() if found != rank]
    if others:
        counts = ", ".join(
            f"rank {found} in {count} layers" for found, count in sorted(Counter(ranks.values()).items())
        )
        hint = f"set `train.lora.rank: {ranks[others[0]]}`" if len(set(ranks.values())) == 1 else HINT
        raise ConfigError(f"{about} does not fit train.lora.rank {rank}: it has {counts}, {others[0]} first", hint)


def _some(names: list[str]) -> str:
    return f"{len(names)} tensors, such as {names[0]}"
