"""Starts a round from the weights of its parent's checkpoint, and nothing else of the parent."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.dataset.errors import ConfigError, MapoError, ModelError, ShardCorrupt
from pipelines.dataset.storage import Storage
from training.methods import NEEDS_REFERENCE
from training.spec import Parent, TrainSpec
from training.state.checkpoint_format import MANIFEST, Manifest, Reader, list_checkpoints, read_parameters
from training.state.ema import EMA, ShardedEma
from training.state.zero import WEIGHT, ZeroState

KINDS = {"raw": WEIGHT, "ema": EMA}
LOST_HINT = "restore it from a copy, or train from the base model with `train.rounds: restart`"


def open_parent(storage: Storage, parent: Parent) -> Reader:
    """Open the parent's checkpoint, and compare its manifest with the digest that the round recorded.

    Raises:
        ModelError: The checkpoint is missing, or is another one.
        ShardCorrupt: The checkpoint is damaged.
    """
    name = f"{parent.checkpoint}/{MANIFEST}"
    data = storage.read_if_there(name)
    if data is None:
        raise ModelError(f"the checkpoint of {parent}, which this round starts from, is missing", LOST_HINT)
    if (found := hashlib.sha256(data).hexdigest()) != parent.manifest:
        raise ModelError(
            f"the checkpoint of {parent} is not the one that this round starts from: its manifest has the digest "
            f"{found[:12]}, not {parent.manifest[:12]}",
            LOST_HINT,
        )
    with _named(parent):
        reader = Reader(storage, Manifest.parse(parent.checkpoint, data))
        if KINDS[parent.weights] not in reader.kinds():
            raise ModelError(f"the checkpoint of {parent} has no weights of the kind {parent.weights}", LOST_HINT)
        return reader


def check_parent_is_there(spec: TrainSpec) -> None:
    """Check before any worker starts that the parent exists; a round with a checkpoint may not need it any more.

    Raises:
        ModelError: See `open_parent`.
        ShardCorrupt: An index file is damaged, or a file of weights is truncated.
    """
    needs_reference = spec.config.method in NEEDS_REFERENCE
    if spec.parent is not None and (needs_reference or not list_checkpoints(spec.storage, spec.checkpoints)):
        open_parent(spec.storage, spec.parent)


@contextmanager
def _named(parent: Parent) -> Iterator[None]:
    try:
        yield
    except ShardCorrupt as error:
        raise ShardCorrupt(f"{parent}, which this round starts from: {error.message}", LOST_HINT) from error


def start_from_parent(spec: TrainSpec, unet: Any, state: ZeroState, ema: ShardedEma | None) -> None:
    """Set this rank's part of the float32 weights, and of their average, to the parent's values; collective.

    Each rank reads its own fragments, whichever rank wrote them. In a 16-bit training they are the parent's exact
    float32 weights, unlike those that the engine makes from a cast model.

    Args:
        spec: This round's training.
        unet: The UNet inside the engine.
        state: The engine's state.
        ema: The average of the weights, if the round keeps one.

    Raises:
        ModelError: See `open_parent`; on every rank alike.
        ShardCorrupt: A fragment is damaged.
        ConfigError: The checkpoint is of another UNet.
    """
    assert spec.parent is not None
    parent, fragments = spec.parent, state.fragments
    kind = KINDS[parent.weights]

    def read() -> dict[str, torch.Tensor]:
        reader = open_parent(spec.storage, parent)
        owned = {fragment.name: fragment.shape for fragment in fragments}
        _check_shapes(reader.shapes(kind), owned, _trained(unet), parent)
        arrays = reader.read((kind, part.name, part.start, part.numel) for part in fragments)
        with _named(parent):
            return {part.name: torch.from_numpy(array.copy()) for part, array in zip(fragments, arrays, strict=True)}

    weights = on_all_ranks(read)
    state.start_from(weights)
    if ema is not None:
        ema.load(weights)


def load_parent(spec: TrainSpec, unet: Any) -> None:
    """Load the parent's weights into a whole UNet in place, one parameter after another; for a reference.

    Raises:
        ModelError: See `open_parent`.
        ShardCorrupt: A parameter is damaged.
        ConfigError: The checkpoint is of another UNet.
    """
    assert spec.parent is not None
    reader, kind = open_parent(spec.storage, spec.parent), KINDS[spec.parent.weights]
    named = dict(unet.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in named.items()}
    _check_shapes(reader.shapes(kind), shapes, _trained(unet), spec.parent)
    with _named(spec.parent), torch.no_grad():
        for name, array in read_parameters(reader, kind):
            named[name].copy_(torch.from_numpy(array.copy()))


def _trained(unet: Any) -> set[str]:
    return {name for name, weight in unet.named_parameters() if weight.requires_grad}


def _check_shapes(
    found: dict[str, tuple[int, ...]], known: dict[str, tuple[int, ...]], trained: set[str], parent: Parent
) -> None:
    """Check that the parent has the parameters that are trained here, in the same shapes."""
    others = sorted(trained ^ found.keys()) or sorted(
        name for name in known.keys() & trained if tuple(found[name]) != tuple(known[name])
    )
    if others:
        raise ConfigError(
            f"{parent} has another UNet: {len(others)} of {len(trained)} weights differ, {others[0]} first",
            "keep the `encode.model` and `train.lora` of that round; or use `train.rounds: restart`, or another `name`",
        )


def on_all_ranks(read: Callable[[], Any]) -> Any:
    """Return the result of `read`; raise one rank's error on all, so that no rank waits in a collective."""
    result, problem = None, None
    try:
        result = read()
    except MapoError as error:
        problem = error
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    found = [each for each in problems if each is not None]
    if found:
        raise found[0]
    return result
