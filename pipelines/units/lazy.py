"""Actors by name: their module, and torch with it, is imported where they run and not in the driver."""

import importlib
from collections.abc import Callable
from typing import Any, ClassVar

import pyarrow as pa


class ActorByName:
    """A Ray Data actor that stands for another class; a subclass says which."""

    place: ClassVar[str]
    """The class, as `module:Class`."""

    def __init__(self, *arguments: Any) -> None:
        module, _, name = self.place.partition(":")
        self._actor = getattr(importlib.import_module(module), name)(*arguments)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Pass the batch on."""
        found: pa.Table = self._actor(batch)
        return found


def actor_by_name(place: str) -> Callable[[pa.Table], pa.Table]:
    """Return a class for `run_units` that makes an actor of the class at `place`, as `module:Class`."""
    made: Any = type(place.partition(":")[2], (ActorByName,), {"place": place})
    return made  # type: ignore[no-any-return]
