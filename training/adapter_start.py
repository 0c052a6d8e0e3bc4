"""Loads the adapters that a training starts from into the UNet, the reference and the float32 weights."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipelines.dataset.errors import ConfigError, ModelError
from training.config import LoraConfig
from training.model import ADAPTER, START, add_lora
from training.spec import TrainSpec, adapter_file
from training.state.ema import ShardedEma
from training.state.parent import on_all_ranks
from training.state.zero import ZeroState

METADATA = "lora_adapter_metadata"
PREFIX = "unet."
Matrices = dict[str, Tensor]
"""Weights of adapters in float32, by `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""


def load_adapter(spec: TrainSpec, unet: Any) -> Matrices:
    """Read the run's copy of the file, with its own scale folded into the weights.

    Args:
        spec: The training.
        unet: The UNet, for its configuration.

    Raises:
        ModelError: The copy is missing or damaged, or a weight is not finite.
    """
    assert spec.adapter_digest is not None
    assert spec.config.lora is not None
    data = spec.storage.read(adapter_file(spec.folder, spec.adapter_digest))
    if hashlib.sha256(data).hexdigest() != spec.adapter_digest:
        raise ModelError(
            f"the run's copy of the adapters {spec.config.lora.weights} is damaged",
            f"remove {spec.storage.uri(adapter_file(spec.folder, spec.adapter_digest))} and start the run again",
        )
    return read_matrices(data, spec.config.lora, unet.config)


def read_matrices(data: bytes, lora: LoraConfig, unet_config: Any) -> Matrices:
    """Return the matrices of a safetensors file, so that at the scale of `train.lora` they are the same adapters.

    Args:
        data: The file.
        lora: The section `train.lora`; its alpha / rank is the scale in training.
        unet_config: Configuration of the UNet; kohya's names of SDXL are of another numbering of its blocks.

    Raises:
        ModelError: A weight or a scale is not a finite number.
    """
    import safetensors.torch
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    try:
        stored = safetensors.torch.load(data)
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(stored, unet_config=unet_config)
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"train.lora.weights {lora.weights}: diffusers cannot read its names: {error}",
            "use adapters of a UNet of Stable Diffusion or SDXL",
        ) from error
    alphas = alphas or {}
    scale_of_ours = (lora.rank if lora.alpha is None else lora.alpha) / lora.rank
    scales = _Scales.of(data)
    found: Matrices = {}
    for name, weight in state.items():
        renamed = next(iter(convert_unet_state_dict_to_peft({name.removeprefix(PREFIX): None})))
        layer, _, side = renamed.rpartition(".lora_")
        matrix = weight.to(torch.float32)
        if side.startswith("B"):
            # diffusers names kohya's alpha after the first matrix of its layer.
            alpha = alphas.get(name.replace(".up.", ".down.").split(".lora.")[0] + ".alpha")
            rank = weight.shape[1]
            scale = scales.scale(layer, rank) if alpha is None else alpha / rank
            matrix = matrix * (scale / scale_of_ours)
        if not matrix.isfinite().all():
            raise ModelError(f"train.lora.weights {lora.weights}: {name} is not finite", "use an undamaged file")
        found[renamed] = matrix
    return found


class _Scales:
    """The scales of a file that peft described: its alpha / rank of each layer; 1 without a description.

    Args:
        described: peft's configuration of the adapters, as far as the file has it.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._described = described

    @staticmethod
    def of(data: bytes) -> "_Scales":
        """Read the description from the header of a safetensors file."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
        of_unet = {name.removeprefix(PREFIX): value for name, value in described.items() if name.startswith(PREFIX)}
        return _Scales(of_unet)

    def scale(self, layer: str, rank: int) -> float:
        """Return the scale of a layer's adapter."""
        from peft.utils.other import get_pattern_key

        pattern = self._described.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), layer), self._described.get("lora_alpha", rank))
        divisor = rank**0.5 if self._described.get("use_rslora") else rank
        return float(alpha) / divisor


def start_unet(unet: Any, matrices: Matrices, lora: LoraConfig, *, name: str = ADAPTER) -> None:
    """Set the UNet's adapters to the file's.

    Args:
        unet: A UNet with the adapters of `add_lora`.
        matrices: See `read_matrices`.
        lora: The section `train.lora`, for errors.
        name: The adapters to set.

    Raises:
        ConfigError: The file has adapters of other layers, or of layers of other sizes.
    """
    named = dict(unet.named_parameters())
    ours = {
        parameter.replace(f".{name}.weight", ".weight"): weight
        for parameter, weight in named.items()
        if parameter.endswith((f".lora_A.{name}.weight", f".lora_B.{name}.weight"))
    }
    _check_layers(matrices, ours, lora)
    with torch.no_grad():
        for parameter, weight in ours.items():
            weight.copy_(matrices[parameter])


def _check_layers(matrices: Matrices, ours: Mapping[str, Tensor], lora: LoraConfig) -> None:
    found, wanted = ({name.rpartition(".lora_")[0] for name in each} for each in (matrices, ours))
    differences = [
        f"{len(layers)} layers {where}, {min(layers)} first"
        for layers, where in ((found - wanted, "only in the file"), (wanted - found, "only in `train.lora.targets`"))
        if layers
    ]
    for name in sorted(matrices.keys() & ours.keys()):
        if matrices[name].shape != ours[name].shape:
            differences.append(f"{name} has the shape {tuple(matrices[name].shape)}, not {tuple(ours[name].shape)}")
            break
    if differences:
        targets = ", ".join(sorted({_target(layer) for layer in found}))
        raise ConfigError(
            f"train.lora.weights {lora.weights} does not fit: {'; '.join(differences)}",
            f"the file has adapters of [{targets}]: set `train.lora.targets` to these; if they are the same, the file "
            "is of another base model, or of a part of the layers alone",
        )


def _target(layer: str) -> str:
    """Return the end of a layer's name that `targets` has to have, such as `to_q`, `to_out.0` or `net.2`."""
    parts = layer.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def add_starting_adapters(spec: TrainSpec, unet: Any, *, with_reference: bool) -> None:
    """Add the adapters of the file: those to train, and if needed the same again, frozen, as a reference.

    Raises:
        ConfigError: See `start_unet` and `add_lora`.
        ModelError: See `load_adapter`.
    """
    lora = spec.config.lora
    assert lora is not None
    matrices = load_adapter(spec, unet)
    for name in (START, ADAPTER) if with_reference else (ADAPTER,):  # the last one is active, and the others frozen
        add_lora(unet, lora, seed=spec.seed, name=name)
        start_unet(unet, matrices, lora, name=name)


def start_from_adapter(spec: TrainSpec, unet: Any, state: ZeroState, ema: ShardedEma | None) -> None:
    """Set this rank's part of the float32 weights, and of their average, to the file's values; collective.

    In a 16-bit training the engine would take rounded ones from the cast model.

    Args:
        spec: The training.
        unet: The UNet inside the engine.
        state: The engine's state, before its first step.
        ema: The average of the weights, if the training keeps one.

    Raises:
        ModelError: See `load_adapter`; on every rank alike.
    """

    def read() -> dict[str, Tensor]:
        matrices = load_adapter(spec, unet)
        whole = {part.name: matrices[part.name.replace(f".{ADAPTER}.weight", ".weight")] for part in state.fragments}
        return {
            part.name: whole[part.name].flatten()[part.start : part.start + part.numel].clone()
            for part in state.fragments
        }

    weights = on_all_ranks(read)
    state.start_from(weights)
    if ema is not None:
        ema.load(weights)
