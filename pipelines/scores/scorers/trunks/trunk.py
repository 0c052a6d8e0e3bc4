"""What a trunk is, how it is loaded once for all scorers of a process, and the precision that it runs in.

Letters: B images or prompts, C channels, H rows, W columns, S tokens, D embedding size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from pipelines.dataset.errors import ModelError
from pipelines.dataset.safetensors_header import check_safetensors, tensor_types
from pipelines.scores.parts import MODEL
from pipelines.scores.scorers.images import Picture, prepare
from pipelines.scores.weights import files_digest

CHUNK = 32
"""Number of images or prompts in one forward pass, so that memory does not follow the size of a batch."""
DAMAGED = "fetch the weights again: `mapo scorers fetch NAME`"

Shared = TypeVar("Shared", bound="ImageTrunk | TextTrunk | nn.Module")
_SHARED: "WeakValueDictionary[tuple[str, ...], Any]" = WeakValueDictionary()


class ImageTrunk:
    """A model that turns images into embeddings.

    Args:
        key: The weights' digest and the preprocessing: trunks of one key give equal embeddings.
        preprocessing: The name of the preprocessing.
        model: The module, in float32.
    """

    def __init__(self, key: tuple[str, ...], preprocessing: str, model: nn.Module, device: torch.device) -> None:
        self.key, self.preprocessing, self.device = key, preprocessing, device
        self.model: Any = frozen(model, device)
        self.num_forwards = 0
        """Number of forward passes so far."""

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return one embedding for each prepared image."""
        raise NotImplementedError

    def embed(self, pictures: Sequence[Picture]) -> Tensor:
        """Prepare images and return their embeddings, on the trunk's device; float32."""
        check_float32(self.model)
        found = []
        with full_precision(self.device):
            for start in range(0, len(pictures), CHUNK):
                pixels_BCHW = prepare(pictures[start : start + CHUNK], self.preprocessing).to(self.device)
                found.append(self.forward(pixels_BCHW))
                self.num_forwards += 1
        return torch.cat(found) if found else torch.zeros((0, 1), device=self.device)


class TextTrunk:
    """A model that turns prompts into embeddings; see `ImageTrunk`."""

    def __init__(self, key: tuple[str, ...], model: nn.Module, device: torch.device) -> None:
        self.key, self.device = key, device
        self.model: Any = frozen(model, device)
        self.num_forwards = 0

    def forward(self, prompts: Sequence[str]) -> tuple[Tensor, list[float]]:
        """Return one embedding for each prompt, and the share of its tokens that did not fit."""
        raise NotImplementedError

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, list[float]]:
        """Return one embedding for each prompt, on the trunk's device; and the share of its tokens that did not fit."""
        check_float32(self.model)
        found, cut = [], []
        with full_precision(self.device):
            for start in range(0, len(prompts), CHUNK):
                embedded, cut_ratios = self.forward(prompts[start : start + CHUNK])
                found.append(embedded)
                cut += cut_ratios
                self.num_forwards += 1
        return torch.cat(found), cut


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a module ready for evaluation in float32 on a device."""
    return model.float().eval().requires_grad_(False).to(device)


def check_float32(model: nn.Module) -> None:
    """Check that nobody changed the type of a model after it was loaded.

    Raises:
        ModelError: A weight is not float32.
    """
    found = next((parameter.dtype for parameter in model.parameters() if parameter.dtype != torch.float32), None)
    if found is not None:
        raise ModelError(
            f"a scorer has weights of {found}, and scores are defined in float32 alone",
            "do not cast or wrap the models of scorers",
        )


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute without gradients in plain float32: neither autocast nor tf32, whatever the caller has switched on."""
    switches: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


def check_weights(folder: Path) -> str:
    """Check the weights of a part before they are loaded, and return their digest.

    Raises:
        ModelError: The file is damaged, or was rounded to bfloat16.
    """
    file = folder / MODEL
    check_safetensors(file)
    if "BF16" in tensor_types([file]):
        raise ModelError(
            f"{file} is bfloat16: scores would move by 4 % of their standard deviation, which flips close pairs",
            "give the published weights in float32 or float16",
        )
    return files_digest(folder, [name for name in (MODEL, "config.json") if (folder / name).is_file()])


def shared(key: tuple[str, ...], device: torch.device, build: Callable[[], Shared]) -> Shared:
    """Return the trunk or model of a key on a device; all scorers of this process that need it hold the same one.

    Trunks that differ in preprocessing alone share their model.
    """
    place = (*key, str(device))
    found: Shared | None = _SHARED.get(place)
    if found is None:
        _SHARED[place] = found = build()
    return found


def load_pretrained(model_class: Any, folder: Path, config: Any = None, **options: Any) -> nn.Module:
    """Load a class of transformers from a folder, and check that the file has all its weights.

    Args:
        model_class: The class.
        folder: The part's folder.
        config: The configuration; None for that of the folder.
        options: Further arguments of the class.

    Raises:
        ModelError: Weights are missing, have another shape, or cannot be read.
    """
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # transformers and safetensors have no common tree
        text = str(error).strip() or type(error).__name__
        raise ModelError(f"cannot load {folder}: {text.splitlines()[0]}", DAMAGED) from error
    lacking = [*(info.get("missing_keys") or ()), *map(str, info.get("mismatched_keys") or ())]
    if lacking:
        raise ModelError(f"{folder / MODEL} lacks {len(lacking)} tensors, such as {sorted(lacking)[0]}", DAMAGED)
    loaded: nn.Module = model
    return loaded


def load_state(model: nn.Module, state: dict[str, Tensor], folder: Path) -> nn.Module:
    """Load a state dict that has exactly the weights of a module.

    Raises:
        ModelError: It has others.
    """
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(f"{folder / MODEL} does not fit the model: {' '.join(lines[1:2])[:300]}", DAMAGED) from error
    return model
