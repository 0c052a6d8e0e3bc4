"""The services behind the trackers, of each as little as a run needs. `training.tracking.trackers` guards them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipelines.dataset.storage import Storage

PROJECT = "mapo"  # of wandb and MLflow, unless their own variables say otherwise
MAX_PARAMETERS = 100  # of one MLflow request
MAX_PARAMETER_LENGTH = 6000  # characters that MLflow takes


@dataclass(frozen=True)
class TrackedRun:
    """What a service is told about a run.

    Args:
        storage: The storage of the run.
        folder: The run's folder on it.
        identity: The same for all parts of one training, and of no other.
        start: Steps that earlier parts have finished.
        parameters: The resolved configuration of training.
    """

    storage: Storage
    folder: str
    identity: str
    start: int
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.rsplit("/", 1)[-1]


class Backend(Protocol):
    """One service. Every method may raise, and may take its time."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step; names have a group, as in train/loss."""

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """A picture in RGB."""

    def flush(self) -> None:
        """Bring out what was logged."""

    def close(self, *, failed: bool) -> None:
        """The end of the run, or of this part of it."""


class TensorBoard:
    """Events in a local folder, which is copied to `<run>/tensorboard` at each flush."""

    def __init__(self, run: TrackedRun, local: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._local = run, local
        # TensorBoard drops what an earlier part wrote at this step or later; step `start` itself is finished.
        self._writer = SummaryWriter(str(local), purge_step=run.start + 1 if run.start else 0)
        parameters = json.dumps(run.parameters, indent=2, default=str)
        self._writer.add_text("config", f"```json\n{parameters}\n```", run.start)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """One image."""
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """Copy the events to the storage."""
        self._writer.flush()
        self._run.storage.upload_folder(f"{self._run.folder}/tensorboard", self._local)

    def close(self, *, failed: bool) -> None:
        """The events of a run that failed are wanted most."""
        self._writer.close()
        self._run.storage.upload_folder(f"{self._run.folder}/tensorboard", self._local)


class Wandb:
    """One wandb run for all parts of a training; what an offline run writes is copied to `<run>/wandb`."""

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
        """One row."""
        self._run.log({**metrics, "step": step})

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """One row."""
        self._run.log({name: self._wandb.Image(image), "step": step})

    def flush(self) -> None:
        """A process of wandb's own sends what is online."""
        if self._run.offline:  # wandb names its folder by the second alone
            part = f"{self._of.folder}/wandb/from-step-{self._of.start}"
            self._of.storage.upload_folder(part, self._local / "wandb")

    def close(self, *, failed: bool) -> None:
        """wandb marks a run with an exit code as failed."""
        self._run.finish(exit_code=int(failed))
        self.flush()


class Mlflow:
    """One MLflow run for all parts of a training, found again by its tag."""

    TAG = "mapo.run"

    def __init__(self, run: TrackedRun, local: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        if "MLFLOW_TRACKING_URI" not in os.environ:
            raise RuntimeError("MLFLOW_TRACKING_URI is not set where rank 0 runs")
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
        """One request."""
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now_ms, step) for name, value in metrics.items()])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """An artifact that MLflow shows by step."""
        self._client.log_image(self._id, image, key=name, step=step)

    def flush(self) -> None:
        """Each call has arrived when it returns."""

    def close(self, *, failed: bool) -> None:
        """The run's end."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def flat_parameters(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names, as `-o` takes them."""
    for name, value in parameters.items():
        if isinstance(value, Mapping) and value:
            yield from flat_parameters(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
