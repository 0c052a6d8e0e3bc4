"""The services behind the trackers, one class each, and the registry of them. `training.tracking.trackers` guards them.

Importing this loads none of the services, neither ray nor torch: the configuration takes the names from here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from PIL import Image

PROJECT = "mapo"  # of wandb and MLflow, unless their own variables say otherwise
MAX_PARAMETERS = 100  # of one MLflow request
MAX_PARAMETER_LENGTH = 6000  # characters that MLflow takes


class Uploads(Protocol):
    """The part of the run's storage that a service needs."""

    def upload_folder(self, name: str, local_folder: Path) -> None:
        """Upload every file of a local folder below `name`."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a service sees it.

    Args:
        storage: The storage of the run.
        folder: The run's folder on it.
        identity: A name that all parts of one training share, and no other training has.
        start: Steps that earlier parts of the training have finished.
        parameters: The resolved configuration of training.
    """

    storage: Uploads
    folder: str
    identity: str
    start: int
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.folder.rsplit("/", 1)[-1]


class Backend(Protocol):
    """One service. Every method may raise, and may take its time.

    It is opened on the tracker's thread with the run and a local folder that lasts as long as the tracker.
    """

    name: ClassVar[str]
    """Its name in `train.trackers`."""
    package: ClassVar[str]
    """The Python package that must be importable."""
    extra: ClassVar[str | None]
    """The extra of `mapo` that installs the package; None if it is always installed."""
    resumes: ClassVar[str]
    """For the docs: what happens to the curves when a run is resumed."""
    variables: ClassVar[str]
    """For the docs: the environment variables that configure it."""

    def __init__(self, run: TrackedRun, local: Path) -> None:
        """Open the service for a run."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step; names have a group, as in train/loss."""

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Log an image in RGB."""

    def flush(self) -> None:
        """Send or write everything logged so far."""

    def close(self, *, failed: bool) -> None:
        """End the run, or this part of it."""


class TensorBoard(Backend):
    """Event files in a local folder, which is copied to `<run>/tensorboard` at each flush."""

    name = "tensorboard"
    package = "tensorboard"
    extra = None
    resumes = "steps after the checkpoint replace those of the failed part"
    variables = "none; events are written to `<run>/tensorboard`"

    def __init__(self, run: TrackedRun, local: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._local = run, local
        # TensorBoard drops what an earlier part wrote at this step or later; step `start` itself is finished.
        self._writer = SummaryWriter(str(local), purge_step=run.start + 1 if run.start else 0)
        parameters = json.dumps(run.parameters, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{parameters}\n```", run.start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Add one image."""
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Copy the events to the storage."""
        self._writer.flush()
        self._run.storage.upload_folder(f"{self._run.folder}/tensorboard", self._local)

    def close(self, *, failed: bool) -> None:
        """Copy the events once more: those of a failed run matter most."""
        self._writer.close()
        self._run.storage.upload_folder(f"{self._run.folder}/tensorboard", self._local)


class Wandb(Backend):
    """One wandb run for all parts of a training; the files of an offline run are copied to `<run>/wandb`."""

    name = "wandb"
    package = "wandb"
    extra = "wandb"
    resumes = "continues the wandb run, whose id is made from storage, run and key"
    variables = (
        "`WANDB_API_KEY`, `WANDB_PROJECT` (`mapo`), `WANDB_NAME` (the run's), `WANDB_ENTITY`, `WANDB_MODE`, "
        "`WANDB_BASE_URL`, `WANDB_DIR`"
    )

    def __init__(self, run: TrackedRun, local: Path) -> None:
        import wandb

        self._wandb, self._of, self._local = wandb, run, local
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=run.identity,
            resume="allow",
            config=dict(run.parameters),
            dir=os.environ.get("WANDB_DIR", local),
            settings=wandb.Settings(console="off", silent=True, symlink=False, disable_git=True, allow_val_change=True),
        )
        # An axis of our own: wandb's only goes up, but a resumed run trains what follows its checkpoint again.
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one row."""
        self._run.log({**metrics, "step": step})

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Log a row with the image."""
        self._run.log({name: self._wandb.Image(image), "step": step})

    def flush(self) -> None:
        """Copy the files of an offline run; online, wandb's own process sends the data."""
        if self._run.offline:  # wandb names its folder by the second alone
            part = f"{self._of.folder}/wandb/from-step-{self._of.start}"
            self._of.storage.upload_folder(part, self._local / "wandb")

    def close(self, *, failed: bool) -> None:
        """Finish the run; wandb marks a run with an exit code as failed."""
        self._run.finish(exit_code=int(failed))
        self.flush()


class Mlflow(Backend):
    """One MLflow run for all parts of a training, found again by its tag."""

    name = "mlflow"
    package = "mlflow"
    extra = "mlflow"
    resumes = "continues the MLflow run with its tag `mapo.run`"
    variables = (
        "`MLFLOW_TRACKING_URI` (required), `MLFLOW_EXPERIMENT_NAME` (`mapo`), `MLFLOW_TRACKING_TOKEN` and the others "
        "of MLflow"
    )
    TAG = "mapo.run"

    def __init__(self, run: TrackedRun, local: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        if "MLFLOW_TRACKING_URI" not in os.environ:
            raise RuntimeError("MLFLOW_TRACKING_URI is not set on the node of rank 0")
        self._client, self._metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{run.identity}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={self.TAG: run.identity}, run_name=run.name).info.run_id
        flat = [Param(name, str(value)[:MAX_PARAMETER_LENGTH]) for name, value in flat_parameters(run.parameters)]
        for first in range(0, len(flat), MAX_PARAMETERS):  # MLflow's cannot change, so only a new run gets them
            self._client.log_batch(self._id, params=flat[first : first + MAX_PARAMETERS])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send one request."""
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now_ms, step) for name, value in metrics.items()])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Log an artifact that MLflow shows by step."""
        self._client.log_image(self._id, image, key=name, step=step)

    def flush(self) -> None:
        """Do nothing: each call sends its data before it returns."""

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


BACKENDS: Mapping[str, type[Backend]] = MappingProxyType({each.name: each for each in (TensorBoard, Wandb, Mlflow)})
"""`train.trackers` -> the service: the only list of them."""


def extras_of(names: Iterable[str]) -> list[str]:
    """Return the extras of `mapo` that install these trackers' packages, in the same order."""
    return [extra for name in names if (extra := BACKENDS[name].extra) is not None]


def flat_parameters(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by dotted name, as in `-o`."""
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value:
            yield from flat_parameters(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
