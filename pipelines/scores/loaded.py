"""A judge's scorer on a node: weights found or brought, loaded, fitted, and checked to be the one that was planned."""

import importlib.util
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import MapoError, ModelError
from pipelines.dataset.storage import Storage
from pipelines.scores.cluster_weights import bring
from pipelines.scores.judges import Judge, fingerprint_of, shaping_of
from pipelines.scores.scorers import load_scorer, new_scorer
from pipelines.scores.scorers.scorer import BuiltIn


@dataclass(frozen=True)
class LoadedJudge:
    """A judge with its scorer, ready to score."""

    judge: Judge
    scorer: Any

    @property
    def preprocessing(self) -> str | None:
        """The preprocessing of its images, which reading threads can do; None if it has none by name."""
        name = self.scorer.preprocessing if isinstance(self.scorer, BuiltIn) else "none"
        return None if name == "none" else name


def load_judge(judge: Judge, storage: Storage, device: Any) -> LoadedJudge:
    """Load a judge's scorer on this node; those of one process share their trunks.

    Args:
        judge: The judge, as the driver planned with it.
        storage: The storage of its weights and of the pairs that it learns from.
        device: A torch device.

    Raises:
        ModelError: This node has another version of the scorer or of its weights, or they cannot be loaded.
    """
    make_importable(judge)
    scorer = new_scorer(judge.entry.name, judge.entry.options)
    found = fingerprint_of(shaping_of(scorer, judge.entry.name, judge.parts, judge.fit))
    if found != judge.fingerprint:
        raise ModelError(
            f"the fingerprint of the scorer {judge.name} is {found} on the node {socket.gethostname()}, "
            f"but {judge.fingerprint} on the driver's",
            "put the same version of mapo, and of the scorer's module, on every node",
        )
    folders = {part.name: bring(part, storage, judge.entry.name) for part in judge.parts}
    weights: Any = None
    if isinstance(scorer, BuiltIn):
        weights = folders
    elif folders:
        (weights,) = folders.values()
    try:
        load_scorer(scorer, weights, device)
        if judge.fit is not None:
            learnt = judge.fit.read(storage)
            scorer.fit(learnt.chosen, learnt.rejected, learnt.prompts)
    except MapoError:
        raise
    except Exception as error:  # of a user's own scorer: anything
        raise ModelError(
            f"the scorer {judge.name} could not be prepared on the node {socket.gethostname()}: {describe(error)}",
            f"see `load` and `fit` of {judge.entry.name}" + _folder_hint(weights),
        ) from error
    return LoadedJudge(judge, scorer)


def make_importable(judge: Judge) -> None:
    """Let a worker of the driver's machine import a user's own scorer from where the driver does.

    Elsewhere its module arrives with the job (`mapo submit`) or is installed.
    """
    module = judge.entry.name.partition(":")[0]
    if judge.folder is None or judge.folder in sys.path or not Path(judge.folder).is_dir():
        return
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        sys.path.append(judge.folder)


def _folder_hint(weights: object) -> str:
    return f"; its weights are in {weights}" if isinstance(weights, Path) else ""


def describe(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
